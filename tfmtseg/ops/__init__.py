"""Operations that TensorFlow does not have, each with a plain-TensorFlow twin."""

from tfmtseg.ops.info_nce import info_nce, retrieval_accuracy

__all__ = ["info_nce", "retrieval_accuracy"]
