"""MONAI's SegResNet, set up to be the network of tfmtseg.

The residual blocks, convolutions, normalisations and upsampling are MONAI's own. What is
added is what tfmtseg's network has more of (biases, a convolution at the first level,
interpolation with aligned corners), what is taken away is the normalisation before the
head: so both compute the same function of the same weights, see `copy_weights`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet, SegResNetVAE
from monai.networks.nets.segresnet import get_conv_layer

NORM = ("GROUP", {"num_groups": 8})
DROPOUT = 0.2


class VAETwin(SegResNetVAE):
    """With a variational decoder of its own, as in tfmtseg; MONAI's shares the segmentation's."""

    def __init__(self, **kwargs):
        super().__init__(vae_estimate_std=True, vae_nz=128, **kwargs)
        self.vae_down = self.vae_down[:3]
        self.vae_fc_up_sample = self.vae_fc_up_sample[:2]
        self.vae_conv_final = get_conv_layer(3, self.init_filters, self.in_channels, 1)
        self.vae_up_samples = copy.deepcopy(self.up_samples)
        self.vae_up_layers = copy.deepcopy(self.up_layers)

    def _get_vae_loss(self, net_input, vae_input):
        x = self.vae_down(vae_input).flatten(1)
        mean, log_variance = self.vae_fc1(x), self.vae_fc2(x).clamp(-10, 10)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        x = torch.relu(self.vae_fc3(z)).view(-1, self.smallest_filters, *self.fc_insize)
        x = self.vae_fc_up_sample(x)
        for up_sample, layer in zip(self.vae_up_samples, self.vae_up_layers, strict=True):
            x = layer(up_sample(x))
        error = torch.nn.functional.mse_loss(self.vae_conv_final(x).float(), net_input)
        divergence = 0.5 * torch.mean(mean**2 + log_variance.exp() - log_variance - 1)
        return error + divergence


def network(
    width: int, modalities: int, outputs: int, vae_size: Sequence[int] | None = None
) -> torch.nn.Module:
    """The twin of `Segmenter(method="encdec")`, or of `"vaeseg"` for volumes of `vae_size`."""
    arguments = {
        "spatial_dims": 3,
        "init_filters": width,
        "in_channels": modalities,
        "out_channels": outputs,
        "norm": NORM,
        "blocks_down": (1, 2, 2, 4),
        "blocks_up": (1, 1, 1),
        "dropout_prob": DROPOUT,
    }
    if vae_size is None:
        net = SegResNet(**arguments)
    else:
        net = VAETwin(input_image_size=vae_size, **arguments)
    net.dropout = torch.nn.Dropout(DROPOUT)  # of voxels, as in tfmtseg, not of channels
    net.down_layers[0][0] = get_conv_layer(3, width, width)
    net.conv_final = get_conv_layer(3, width, outputs, kernel_size=1)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv3d) and module.bias is None:
            module.bias = torch.nn.Parameter(torch.zeros(module.out_channels))
        if isinstance(module, torch.nn.Upsample):
            module.align_corners = True
    return net


def training_step(net: torch.nn.Module, images: np.ndarray, labels: np.ndarray, bfloat16: bool):
    """A call that makes one update, with the loss and optimizer of tfmtseg's kind.

    Args:
        net: What `network` made.
        images: `(batch, modalities, x, y, z)`, float32.
        labels: Label map, `(batch, 1, x, y, z)`.
        bfloat16: Whether the network runs under autocast.
    """
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    loss = DiceCELoss(
        to_onehot_y=True, softmax=True, squared_pred=True, lambda_dice=0.5, lambda_ce=0.5
    )
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2, fused=True)
    net.train()

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            result = net(images)
        logits, branch_loss = result if isinstance(result, tuple) else (result, 0.0)
        total = loss(logits.float(), labels) + 0.1 * branch_loss
        total.backward()
        optimizer.step()
        return float(total.detach())

    return call


def copy_weights(net: torch.nn.Module, weights: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Gives the twin of `"encdec"` the weights of a `Segmenter`.

    Where a convolution with stride 2 meets an even size, the two systems pad opposite
    ends. They agree on mirrored volumes: so kernels are mirrored here, and volumes have
    to be, on the way in and out.

    Args:
        net: The twin.
        weights: Those of `encoder`, `decoder` and `head`, each in the order in which its
            layers are called: kernel and bias, or gamma and beta.
    """
    encoder, decoder = iter(weights["encoder"]), iter(weights["decoder"])
    _fill([net.convInit, *net.down_layers], encoder)
    for up_sample, layer in zip(net.up_samples, net.up_layers, strict=True):
        _fill([up_sample, layer], decoder)
    _fill([net.conv_final], iter(weights["head"]))


def _fill(modules: Sequence[torch.nn.Module], weights) -> None:
    """Copies weights into the convolutions and normalisations of `modules` in their order."""
    for module in modules:
        for part in _in_order_of_calls(module):
            first, second = next(weights), next(weights)
            if isinstance(part, torch.nn.Conv3d):  # x, y, z, in, out -> out, in, x, y, z
                first = np.flip(first, (0, 1, 2)).transpose(4, 3, 0, 1, 2)
            with torch.no_grad():
                part.weight.copy_(torch.from_numpy(np.ascontiguousarray(first)))
                part.bias.copy_(torch.from_numpy(second))


def _in_order_of_calls(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Convolutions and normalisations; a residual block of MONAI lists its own in another order."""
    if isinstance(module, (torch.nn.Conv3d, torch.nn.GroupNorm)):
        return [module]
    names = [name for name, _ in module.named_children()]
    if "norm1" in names:
        names = ["norm1", "conv1", "norm2", "conv2"]
    return [part for name in names for part in _in_order_of_calls(getattr(module, name))]
