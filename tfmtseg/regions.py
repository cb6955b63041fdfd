"""What is segmented: which labels make up which region, and how heads encode them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from scipy import ndimage

from tfmtseg.errors import InputError

# Nested tumour regions by the numbering of the label files. The Medical
# Segmentation Decathlon stores 1 oedema, 2 non-enhancing core, 3 enhancing; BraTS
# itself, from 2017 to 2021, 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing,
# and since 2023 3 enhancing.
PRESETS: dict[str, dict[str, tuple[int, ...]]] = {
    "brats_msd": {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)},
    "brats_124": {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)},
    "brats_123": {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)},
}


MAX_LABEL = 255  # label maps are kept as uint8
_OTHER_SIDE = {"left": "right", "l": "r", "lh": "rh", "lt": "rt"}


@dataclass(frozen=True)
class Regions:
    """The regions a model segments and a report lists.

    Two kinds exist. *Exclusive* regions are the label values themselves; one
    softmax over background and labels tells them apart. *Nested* regions are
    unions of labels that may contain each other (whole tumour, tumour core,
    enhancing tumour); each has a two-class softmax of its own.

    Args:
        names: One name per region, background not counted.
        members: The label values of each region.
        nested: Whether every region has a head of its own. Nested regions run
            from the largest to the smallest.

    Reference:
        Iwasawa et al., 2020, section 3 (three two-class outputs for BraTS).
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    nested: bool

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.members):
            raise InputError("regions", "names", self.names, "one per region", "name each region")
        if len(set(self.names)) != len(self.names):
            raise InputError("regions", "names", self.names, "all different", "rename one")
        if "mean" in self.names:  # which tables call the mean over the regions
            raise InputError("regions", "name", "'mean'", "another", "rename this region")
        lowest = min(min(values, default=0) for values in self.members)
        highest = max(max(values, default=0) for values in self.members)
        if lowest < 1 or highest > MAX_LABEL or not all(self.names):
            raise InputError(
                "regions", "definition", dict(zip(self.names, self.members, strict=True)),
                f"names with labels in 1..{MAX_LABEL}",
                "leave out the background, name each region, and renumber higher labels",
            )  # fmt: skip
        if self.nested:
            for (outer, inner), name in zip(
                zip(self.members, self.members[1:], strict=False), self.names[1:], strict=False
            ):
                if not set(inner) < set(outer):
                    raise InputError(
                        f"region {name}", "labels", inner, f"a proper part of {outer}",
                        "list nested regions from the largest to the smallest",
                    )  # fmt: skip
        elif self.members != tuple((value,) for value in range(1, len(self.names) + 1)):
            raise InputError(
                "regions", "labels", self.members, "1, 2, ... without a gap",
                "renumber the labels, or declare nested regions",
            )  # fmt: skip

    @classmethod
    def exclusive(cls, names: Sequence[str]) -> Regions:
        """One region per label value 1, 2, ..., in the order of `names`."""
        return cls(tuple(names), tuple((i + 1,) for i in range(len(names))), nested=False)

    @classmethod
    def of(cls, regions: Regions | Mapping[str, Any] | str | Sequence[str] | int) -> Regions:
        """From whatever says what is segmented.

        Args:
            regions: A `Regions`, its configuration, a text as of `parse`, the names of labels
                1, 2, ..., or their number.

        Raises:
            InputError: If it says nothing that can be segmented.
        """
        if isinstance(regions, Regions):
            return regions
        if isinstance(regions, Mapping):
            return cls.from_config(regions)
        if isinstance(regions, str):
            return cls.parse(regions)
        if isinstance(regions, Sequence):
            return cls.exclusive(regions)
        try:
            return cls.exclusive([str(i + 1) for i in range(index(regions))])
        except TypeError:
            raise InputError(
                "regions", "value", repr(regions), "a Regions, text, names or a number",
                "name the labels, or give their number",
            ) from None  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Regions:
        """Reads a preset's name, or a definition such as `WT=1,2,3;TC=2,3;ET=3`.

        Raises:
            InputError: If `text` is neither.
        """
        if text in PRESETS:
            definition = list(PRESETS[text].items())
        else:
            try:
                pairs = [part.split("=") for part in text.split(";")]
                definition = [
                    (name.strip(), tuple(map(int, values.split(",")))) for name, values in pairs
                ]
            except ValueError:
                raise InputError(
                    "--regions", "value", repr(text),
                    f"one of {', '.join(PRESETS)} or like WT=1,2,3;TC=2,3;ET=3",
                    "correct the flag, or leave it out for one class per label",
                ) from None  # fmt: skip
        names, members = zip(*definition, strict=True)
        return cls(names, members, nested=True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Regions:
        """The inverse of `get_config`."""
        members = tuple(tuple(values) for values in config["members"])
        return cls(tuple(config["names"]), members, bool(config["nested"]))

    def get_config(self) -> dict[str, Any]:
        """JSON-ready arguments of this object."""
        return {
            "names": list(self.names),
            "members": [list(values) for values in self.members],
            "nested": self.nested,
        }

    @property
    def mirror_pair(self) -> tuple[str, str] | None:
        """Two regions that the names tell apart by side alone, if there are such ones."""
        words = {tuple(re.findall(r"[a-z]+|\d+", name.casefold())): name for name in self.names}
        for name_words, name in words.items():
            other = tuple(_OTHER_SIDE.get(word, word) for word in name_words)
            if other != name_words and other in words:
                return name, words[other]
        return None

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Channels of each softmax; they follow each other in the logits."""
        return (2,) * len(self.names) if self.nested else (len(self.names) + 1,)

    @property
    def num_outputs(self) -> int:
        """Channels of the logits."""
        return sum(self.head_sizes)

    @property
    def own_labels(self) -> tuple[int, ...]:
        """The label that a label map shows where a region, and no smaller one, is."""
        smaller = (*self.members[1:], ()) if self.nested else ((),) * len(self.members)
        return tuple(
            min(set(values) - set(inner))
            for values, inner in zip(self.members, smaller, strict=True)
        )

    def labels_beside(self, declared: Iterable[int]) -> list[int]:
        """The labels of the regions that are not among those declared, in order."""
        return sorted(set().union(*self.members) - set(declared))

    def masks(self, label_map: np.ndarray) -> np.ndarray:
        """Region masks of a label map.

        Args:
            label_map: Integers, any shape.

        Returns:
            Booleans, one more axis at the end: one channel per region.
        """
        return np.stack([np.isin(label_map, values) for values in self.members], axis=-1)

    def largest_components(self, label_map: np.ndarray) -> np.ndarray:
        """What is left when each region keeps its largest piece only.

        Of nested regions, the largest piece within the piece that the next larger region
        keeps.

        Args:
            label_map: Integers, `(x, y, z)`. Voxels are connected by their faces.

        Returns:
            The same type and shape.

        Raises:
            ValueError: If it is not one volume: pieces would go on from one to the next.
        """
        if np.ndim(label_map) != 3:
            raise ValueError(
                f"label_map: shape is {np.shape(label_map)}, must be (x, y, z). Fix: give one "
                "volume at a time."
            )
        result = np.zeros_like(label_map)
        kept = np.ones(label_map.shape, bool)
        for values, label in zip(self.members, self.own_labels, strict=True):
            mask = np.isin(label_map, values)
            pieces, count = ndimage.label(mask & kept if self.nested else mask)
            sizes = np.bincount(pieces.ravel())[1:]
            kept = pieces == 1 + np.argmax(sizes) if count else np.zeros_like(kept)
            result[kept] = label
        return result

    def label_map(self, logits: np.ndarray) -> np.ndarray:
        """The label map that `logits` stand for.

        Nested regions are painted from the largest to the smallest, each with
        the label that belongs to it and to no smaller region.

        Args:
            logits: `(..., num_outputs)`, or anything with the same order of
                channels within each head (such as probabilities).

        Returns:
            `uint8`, the shape of `logits` without its last axis.

        Raises:
            ValueError: If the channels are others.
            FloatingPointError: If anything is NaN, as all of a network's logits are after one
                voxel that is: it would look like background.
        """
        if np.shape(logits)[-1] != self.num_outputs:
            raise ValueError(
                f"logits: channels are {np.shape(logits)[-1]}, must be {self.num_outputs}. Fix: "
                "give those of a model with these regions."
            )
        if np.isnan(logits).any():
            raise FloatingPointError(
                "logits: value is NaN, must be a number. Fix: look for NaN in the image."
            )
        if not self.nested:
            return np.argmax(logits, axis=-1).astype(np.uint8)
        result = np.zeros(logits.shape[:-1], np.uint8)
        for i, label in enumerate(self.own_labels):
            result[logits[..., 2 * i + 1] > logits[..., 2 * i]] = label
        return result
