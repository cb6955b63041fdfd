"""GroupNorm and ReLU in one step."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg.ops import library, native, reference


def group_norm_relu(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    groups: int,
    *,
    epsilon: float = 1e-5,
    implementation: str = "auto",
) -> tf.Tensor:
    """`relu(gamma * (x - mean) / sqrt(variance + epsilon) + beta)`, for groups of channels.

    Mean and variance of a group are over its channels and all voxels of a volume, and
    float32 at any precision of `x`.

    Args:
        x: Float32, bfloat16 or float16, `(batch, x, y, z, channels)`; the channels a
            multiple of `groups`.
        gamma: Scale, `(channels,)`, used as float32.
        beta: Offset, `(channels,)`, used as float32.
        groups: Channel groups that share mean and variance.
        epsilon: Added to the variance.
        implementation: As for `tfmtseg.ops.library.choose`. The native op does not run
            under XLA.

    Returns:
        The shape and type of `x`. Differentiable once in `x`, `gamma` and `beta`.

    Raises:
        ValueError: If a shape, type or name is wrong.
        tfmtseg.ops.library.NativeOpsError: If `"native"` is asked for and cannot be
            built or loaded.

    Reference:
        [Wu and He, 2018](https://arxiv.org/abs/1803.08494), equations 1 to 3.
    """
    x = tf.convert_to_tensor(x)
    gamma, beta = tf.cast(gamma, tf.float32), tf.cast(beta, tf.float32)
    if x.dtype not in (tf.float32, tf.bfloat16, tf.float16):
        raise ValueError(f"x: type is {x.dtype.name}, must be float32, bfloat16 or float16")
    channels = x.shape[-1] if x.shape.rank == 5 else None
    if channels is None:
        raise ValueError(f"x: shape is {x.shape}, must be (batch, x, y, z, channels)")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: value is {groups}, must divide {channels}, the channels of x")
    for name, values in (("gamma", gamma), ("beta", beta)):
        if not values.shape.is_compatible_with([channels]):
            raise ValueError(f"{name}: shape is {values.shape}, must be ({channels},)")
    backend = native if library.choose(implementation) == "native" else reference

    @tf.custom_gradient
    def forward(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        y, mean, rstd = backend.group_norm_relu(x, gamma, beta, groups, epsilon)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            return backend.group_norm_relu_gradients(upstream, x, y, gamma, beta, mean, rstd)

        return y, gradient

    y = forward(x, gamma, beta)
    y.set_shape(x.shape)
    return y
