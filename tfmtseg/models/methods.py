"""The methods by name: which branch each has, and which cases it uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to train the common encoder and decoder.

    Args:
        branch: The second task, or None.
        uses_unlabelled: Whether cases without a label take part.
        copy_paste: Whether a teacher labels the unlabelled patches, which are then
            mixed with labelled ones.
    """

    branch: str | None
    uses_unlabelled: bool
    copy_paste: bool = False

    @property
    def can_pretrain(self) -> bool:
        """Whether there is something to learn without any label."""
        return self.branch in ("contrastive", "vae")


METHODS: dict[str, Method] = {
    "encdec": Method(branch=None, uses_unlabelled=False),
    "vaeseg": Method(branch="vae", uses_unlabelled=False),
    "ssvaeseg": Method(branch="vae", uses_unlabelled=True),
    "boundseg": Method(branch="boundary", uses_unlabelled=False),
    "cpcseg": Method(branch="contrastive", uses_unlabelled=False),
    "sscpcseg": Method(branch="contrastive", uses_unlabelled=True),
    "bcp": Method(branch=None, uses_unlabelled=True, copy_paste=True),
    "bcpcpcseg": Method(branch="contrastive", uses_unlabelled=True, copy_paste=True),
}

# "dense" and "dense_across" are forms of `DenseContrastiveBranch`, "classes" is
# `ClassContrastiveBranch`, the others are forms of `ContrastiveBranch`.
UNLABELLED_FORMS = ("repaired", "paper", "dense", "dense_across")  # need no label to learn
CONTRASTIVE_FORMS = (*UNLABELLED_FORMS, "classes")
