"""The methods by name: which branch each has, and which cases it uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to train the common encoder and decoder.

    Args:
        branch: The second task, or None.
        uses_unlabelled: Whether cases without a label take part.
    """

    branch: str | None
    uses_unlabelled: bool


METHODS: dict[str, Method] = {
    "encdec": Method(branch=None, uses_unlabelled=False),
    "vaeseg": Method(branch="vae", uses_unlabelled=False),
    "ssvaeseg": Method(branch="vae", uses_unlabelled=True),
    "boundseg": Method(branch="boundary", uses_unlabelled=False),
    "cpcseg": Method(branch="contrastive", uses_unlabelled=False),
    "sscpcseg": Method(branch="contrastive", uses_unlabelled=True),
}
