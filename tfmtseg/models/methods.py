"""The methods and the forms of the contrast by name: what each needs and uses."""

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


@dataclass(frozen=True)
class Form:
    """One form of the contrast.

    Args:
        compares: Codes of `"cubes"` (`ContrastiveBranch`), two `"views"` of a volume
            (`DenseContrastiveBranch`), or voxels of `"classes"` (`ClassContrastiveBranch`).
        least_cubes: Along at least one axis: something to predict from, something to predict,
            and where codes keep to their half, between them what both would show.
        across_cases: Whether keys of other cases are positives too.
        needs_labels: Whether it learns nothing without them.
    """

    compares: str
    least_cubes: int = 0
    across_cases: bool = False
    needs_labels: bool = False

    @property
    def aligned(self) -> bool:
        """Whether a place has to show the same anatomy in every case."""
        return self.compares == "views" and self.across_cases


FORMS: dict[str, Form] = {
    "repaired": Form("cubes", least_cubes=3),
    "paper": Form("cubes", least_cubes=2),
    "dense": Form("views"),
    "dense_across": Form("views", across_cases=True),
    "classes": Form("classes", across_cases=True, needs_labels=True),
}
UNLABELLED_FORMS = tuple(name for name, form in FORMS.items() if not form.needs_labels)
