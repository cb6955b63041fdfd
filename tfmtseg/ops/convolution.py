"""A 3x3x3 convolution to few channels, at the speed of one to twice as many.

On CPUs with AVX-512, oneDNN (TensorFlow 2.15 to 2.21) computes 16 output channels even
where there are 8 or fewer. Here two neighbours along z are the two halves of one output
of 16 channels: a kernel of four voxels along z, which moves on by two, holds the 3x3x3
kernel twice, one voxel apart. A quarter of its products are with zero, where half was
idle before. In float32, results and gradients are those of TensorFlow's convolution, bit
for bit; in bfloat16 the gradient by the input may be rounded otherwise.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfmtseg.ops import library
from tfmtseg.processor import processor_features

MOST_FILTERS = 8  # half an AVX-512 register of float32
LEAST_DEPTH = 16  # for fewer voxels along z the gain is lost in the shorter rows

_STRIDES = [1] * 5


def pays(x: tf.Tensor, filters: int) -> bool:
    """Whether `paired_convolution` is faster than TensorFlow's on this machine."""
    depth = x.shape[3]
    return (
        filters <= MOST_FILTERS
        and depth is not None
        and depth >= LEAST_DEPTH
        and depth % 2 == 0
        and "avx512f" in processor_features()
        and not library.uses_gpu()
    )


def paired_convolution(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """A 3x3x3 convolution with "same" padding, two voxels along z at a time.

    Args:
        x: `(batch, x, y, z, channels)`, z even.
        kernel: `(3, 3, 3, channels, filters)`, of the same type.
        bias: `(filters,)`, of the same type.

    Returns:
        `(batch, x, y, z, filters)`. Differentiable once.
    """

    @tf.custom_gradient
    def convolve(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tuple[tf.Tensor, Any]:
        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            if kernel.shape[3] <= MOST_FILTERS:
                mirrored = tf.transpose(tf.reverse(kernel, [0, 1, 2]), [0, 1, 2, 4, 3])
                dx = _pairs(upstream, mirrored)
            else:
                dx = tf.raw_ops.Conv3DBackpropInputV2(
                    input_sizes=tf.shape(x), filter=kernel, out_backprop=upstream,
                    strides=_STRIDES, padding="SAME",
                )  # fmt: skip
            dkernel = tf.raw_ops.Conv3DBackpropFilterV2(
                input=x, filter_sizes=tf.shape(kernel), out_backprop=upstream,
                strides=_STRIDES, padding="SAME",
            )  # fmt: skip
            return dx, dkernel, tf.raw_ops.BiasAddGrad(out_backprop=upstream)

        return _pairs(x, kernel, bias), gradients

    return convolve(x, kernel, bias)


def _pairs(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None = None) -> tf.Tensor:
    first, second = ([[0, 0], [0, 0], along_z, [0, 0], [0, 0]] for along_z in ([0, 1], [1, 0]))
    both = tf.concat([tf.pad(kernel, first), tf.pad(kernel, second)], -1)
    y = tf.nn.conv3d(x, both, [1, 1, 1, 2, 1], "SAME")
    if bias is not None:  # before the next line: oneDNN then adds it by the way
        y = tf.nn.bias_add(y, tf.concat([bias, bias], 0))
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], kernel.shape[-1:]], 0))
    y.set_shape([*x.shape[:-1], kernel.shape[-1]])
    return y
