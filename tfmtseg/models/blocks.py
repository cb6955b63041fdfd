"""Building blocks of encoder, decoder and branches.

Volumes are `(batch, x, y, z, channels)`. Reference for the blocks: Iwasawa et al., 2020,
section 3.1 and its public code: GroupNorm with 8 groups, LeCun-normal kernels, biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfmtseg import compat
from tfmtseg.compat import keras
from tfmtseg.ops import group_norm_relu
from tfmtseg.ops.convolution import paired_convolution, pays
from tfmtseg.ops.interpolation import interpolation_matrix

GROUPS = 8

Factors = tuple[int, int, int]


def per_axis(strides: Sequence[Sequence[int]]) -> tuple[Factors, ...]:
    """Strides of several levels as tuples; they come as lists from JSON."""
    return tuple((x, y, z) for x, y, z in strides)


@compat.register
class Convolution(keras.layers.Conv3D):
    """Keras' 3D convolution, faster to few channels, without an error of oneDNN in bfloat16.

    On CPUs with AVX-512 but not AMX, the gradient of a 3x3x3 kernel is wrong, at times
    infinite, where the volume has two voxels along its first axis (TensorFlow 2.15 to
    2.21). With a third layer of zeros, which "same" padding adds anyway, it is right. It is
    not padded on: without a gradient, TensorFlow fuses padding, convolution and bias into an op
    that gives garbage here.
    """

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """As that of Keras."""
        unsafe = x.dtype == tf.bfloat16 and x.shape[1] == 2 and self.strides[0] == 1
        if unsafe and self.kernel_size[0] > 1:
            return super().call(tf.concat([x, tf.zeros_like(x[:, :1])], 1))[:, :2]
        plain = self.kernel_size == (3, 3, 3) and self.strides == (1, 1, 1)
        if plain and pays(x, self.filters):
            kernel, bias = tf.cast(self.kernel, x.dtype), tf.cast(self.bias, x.dtype)
            return self.activation(paired_convolution(x, kernel, bias))
        return super().call(x)


def convolution(filters: int, size: int = 3, strides: Factors = (1, 1, 1), **kwargs: Any) -> Any:
    """A 3D convolution as the method uses it everywhere: same padding, bias, LeCun-normal."""
    return Convolution(
        filters,
        size,
        strides=strides,
        padding="same",
        kernel_initializer="lecun_normal",
        **kwargs,
    )


@compat.register
class GroupNormReLU(keras.layers.Layer):
    """GroupNorm followed by ReLU, statistics in float32.

    Args:
        groups: Channel groups that share mean and variance.
        **kwargs: As for every Keras layer.

    Raises:
        ValueError: At build, if the channels are no multiple of `groups`.
    """

    def __init__(self, groups: int = GROUPS, **kwargs: Any):
        super().__init__(**kwargs)
        self.supports_jit = False  # the op has no XLA form; Keras 3 then compiles without XLA
        self.groups = groups

    def build(self, input_shape: Any) -> None:
        """Makes gamma (ones) and beta (zeros), one of each per channel."""
        channels = input_shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"{self.name}: channels is {channels}, must be a multiple of {self.groups}. "
                "Fix: choose --width as a multiple of 8."
            )
        self.gamma = compat.float32_weight(
            self, name="gamma", shape=(channels,), initializer="ones"
        )
        self.beta = compat.float32_weight(self, name="beta", shape=(channels,), initializer="zeros")
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps `(batch, x, y, z, channels)` to the same shape."""
        return group_norm_relu(x, self.gamma, self.beta, self.groups)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        return {**super().get_config(), "groups": self.groups}


@compat.register
class ResidualBlock(keras.layers.Layer):
    """`x + conv(norm_relu(conv(norm_relu(x))))`, nothing after the sum.

    Args:
        filters: Channels of input and output.
        **kwargs: As for every Keras layer.
    """

    def __init__(self, filters: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters = filters
        self.norm1 = GroupNormReLU(name="norm1")
        self.conv1 = convolution(filters, name="conv1")
        self.norm2 = GroupNormReLU(name="norm2")
        self.conv2 = convolution(filters, name="conv2")

    def build(self, input_shape: Any) -> None:
        """Builds both normalisations and convolutions."""
        for layer in (self.norm1, self.conv1, self.norm2, self.conv2):
            layer.build((*input_shape[:-1], self.filters))
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps `(batch, x, y, z, filters)` to the same shape."""
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        return {**super().get_config(), "filters": self.filters}


@compat.register
class Upsample(keras.layers.Layer):
    """Trilinear upsampling, one matrix product per axis.

    As matrix products, it and its gradient run at the speed of a matrix library;
    resizing by slices costs more time in the gradient than the convolutions beside it.

    Args:
        factors: How many times larger each of x, y and z becomes.
        **kwargs: As for every Keras layer.
    """

    def __init__(self, factors: Factors = (2, 2, 2), **kwargs: Any):
        super().__init__(**kwargs)
        self.factors = tuple(factors)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps `(batch, x, y, z, channels)` to `factors` times its spatial size."""
        static = list(x.shape)
        # Along z first, while there is little: these products are small and many. That along
        # x is one for each volume.
        for axis, factor in reversed(list(enumerate(self.factors, start=1))):
            if factor == 1:
                continue
            shape = tf.shape(x)
            size = shape[axis] if static[axis] is None else static[axis]
            matrix = tf.cast(interpolation_matrix(size, factor), x.dtype)
            before = tf.reduce_prod(shape[:axis])
            after = tf.reduce_prod(shape[axis + 1 :])
            y = tf.matmul(matrix[None], tf.reshape(x, (before, size, after)))
            x = tf.reshape(y, tf.concat([shape[:axis], [factor * size], shape[axis + 1 :]], 0))
            static[axis] = None if static[axis] is None else factor * static[axis]
            x.set_shape(static)
        return x

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The input's shape with each spatial size multiplied."""
        sizes = [
            None if size is None else size * factor
            for size, factor in zip(input_shape[1:4], self.factors, strict=True)
        ]
        return (input_shape[0], *sizes, input_shape[4])

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        return {**super().get_config(), "factors": self.factors}


@compat.register
class UpBlock(keras.layers.Layer):
    """A decoder's level without skip connection.

    1x1x1 convolution, trilinear upsampling, residual block.

    Args:
        filters: Channels of the output.
        factors: How many times larger each of x, y and z becomes.
        **kwargs: As for every Keras layer.
    """

    def __init__(self, filters: int, factors: Factors = (2, 2, 2), **kwargs: Any):
        super().__init__(**kwargs)
        self.filters = filters
        self.reduce = convolution(filters, 1, name="reduce")
        self.upsample = Upsample(factors, name="upsample")
        self.block = ResidualBlock(filters, name="block")

    def build(self, input_shape: Any) -> None:
        """Builds convolution and residual block; only the channels matter."""
        self.reduce.build(input_shape)
        self.block.build((*input_shape[:-1], self.filters))
        self.built = True

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Maps `(batch, x, y, z, channels)` to `filters` channels at `factors` times the size."""
        return self.block(self.upsample(self.reduce(x)))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The upsampled shape."""
        return (*self.upsample.compute_output_shape(input_shape)[:-1], self.filters)

    def get_config(self) -> dict[str, Any]:
        """Arguments of this layer."""
        config = {"filters": self.filters, "factors": self.upsample.factors}
        return {**super().get_config(), **config}
