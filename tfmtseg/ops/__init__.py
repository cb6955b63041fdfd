"""Operations that TensorFlow does not have, each with a plain-TensorFlow twin."""

from tfmtseg.ops.group_norm import group_norm_relu
from tfmtseg.ops.info_nce import info_nce, nt_xent, retrieval_accuracy, supervised_contrastive

__all__ = [
    "group_norm_relu",
    "info_nce",
    "nt_xent",
    "retrieval_accuracy",
    "supervised_contrastive",
]
