"""`dataset.json`: the names of the data, its channels and its labels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfmtseg.data.cases import repeated
from tfmtseg.data.layouts.root import DataRoot, read_text
from tfmtseg.errors import InputError, InputWarning
from tfmtseg.regions import MAX_LABEL, Regions

MAX_JSON_DEPTH = 20
PRINTABLE = "of printable characters"


@dataclass
class Description:
    """The content of a `dataset.json`, and what was found wrong with it so far."""

    file: Path
    content: dict[str, Any]
    errors: list[InputError] = field(default_factory=list)

    def problem(self, field: str, value: object, rule: str, fix: str) -> None:
        """Notes a problem of the file, as of `InputError`."""
        self.errors.append(InputError(self.file, field, value, rule, fix))

    def entry(self, key: str, kind: type, form: str) -> Any:
        """`content[key]`, or an empty one and a problem if it is not a `kind`."""
        value = self.content.get(key)
        if not isinstance(value, kind) or not value:
            shown = "missing" if key not in self.content else shown_value(value)
            self.problem(f"'{key}'", shown, form, f"correct the entry '{key}'")
            return kind()
        return value

    def warn(self, text: str) -> None:
        """Tells at once of what is odd but clear enough to go on."""
        warnings.warn(f"{self.file}: {text}.", InputWarning, stacklevel=3)


def read_json(root: DataRoot, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = repeated([key for key, _ in pairs])
            raise InputError(
                path, "JSON", f"holding {', '.join(twice)} twice", "an object with distinct keys",
                "remove one of the two entries",
            )  # fmt: skip
        return content

    fix = "correct the file, or restore it from where it came"
    text = read_text(path, root.path, root.allow_root)
    if not text.strip():
        raise InputError(path, "file", "empty", "a JSON object", fix)
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except InputError:  # which is a ValueError
        raise
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(path, "JSON", f"bad at {where} ({error.msg})", "valid", fix) from None
    except RecursionError:
        raise InputError(path, "JSON", "nested too deep", "a flat object", fix) from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(path, "JSON", f"bad ({error})", "valid", fix) from None
    if _depth(content) > MAX_JSON_DEPTH:
        raise InputError(path, "JSON", "nested too deep", "a flat object", fix)
    if not isinstance(content, dict):
        raise InputError(path, "JSON", f"a {type(content).__name__}", "an object", fix)
    return content


def _depth(value: Any) -> int:
    """How many objects and lists lie in each other; without recursion."""
    level, depth = [value], -1
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return depth


def read_name(description: Description) -> str:
    """The name of the data, if it has one."""
    name = str(description.content.get("name", ""))
    if not name.isprintable():
        description.problem("'name'", shown_value(name), PRINTABLE, "correct the name")
    return name


def read_numbered(description: Description, key: str) -> tuple[str, ...]:
    """The values of `{"0": ..., "1": ...}` in the order of their numbers."""
    names = description.entry(key, dict, 'an object like {"0": "MRI"}')
    if set(names) != {str(i) for i in range(len(names))}:
        description.problem(
            f"'{key}'", list(names), "numbered 0, 1, ... without a gap", "renumber the entries"
        )
    texts = tuple(str(names[str(i)]) for i in range(len(names)) if str(i) in names)
    if not "".join(texts).isprintable():
        description.problem(f"'{key}'", shown_value(names), PRINTABLE, "correct the names")
    return texts


def read_regions(
    description: Description, regions: Regions | None, images_only: bool
) -> tuple[Regions | None, tuple[int, ...]]:
    """What is segmented, and the label values that are declared; nothing and a problem if bad.

    Labels are `{"0": "background", "1": "a"}` or `{"background": 0, "a": 1}`. Lists of
    values, `{"core": [2, 3]}`, are nested regions as of nnU-Net.

    Args:
        description: The `dataset.json`.
        regions: What is segmented; by default what is declared.
        images_only: Whether labels do not matter.
    """
    if images_only:
        return None, ()
    labels = description.entry("labels", dict, 'an object like {"0": "background", "1": "core"}')
    if not labels:
        return None, ()

    def refuse(rule: str, fix: str, value: str = shown_value(labels)) -> tuple[None, tuple[()]]:
        description.problem("'labels'", value, rule, fix)
        return None, ()

    without_gap = "background 0 and labels 1, 2, ... without a gap"
    renumber = "renumber the labels, in the files too, or name the regions to segment (--regions)"
    try:
        values = _label_values(labels)
    except ValueError:
        return refuse(without_gap, renumber)
    if not "".join(values).isprintable():
        return refuse(PRINTABLE, "correct the names")
    declared = sorted({0}.union(*values.values()))
    if declared[0] < 0 or declared[-1] > MAX_LABEL:
        return refuse(f"in 0..{MAX_LABEL}", "renumber the labels, in the files too")
    if "ignore" in values:
        return refuse(
            "without 'ignore' (every voxel counts here)", "label these voxels, or drop the cases"
        )
    if regions is not None:
        if unknown := regions.labels_beside(declared):
            return refuse(
                f"declaring {', '.join(map(str, unknown))}, of the regions to segment",
                "correct --regions, or this entry",
            )
    elif any(len(members) > 1 for members in values.values()):
        try:
            regions = _nested_regions(values)
        except InputError as error:
            return refuse(error.rule, error.fix, f"{error.value} for {error.file}")
    else:
        by_number = {members[0]: name for name, members in values.items()}
        if sorted(by_number) != list(range(len(labels))) or len(labels) < 2:
            return refuse(without_gap, renumber)
        try:
            regions = Regions.exclusive([by_number[i] for i in range(1, len(labels))])
        except InputError as error:
            return refuse(error.rule, error.fix)
    return regions, tuple(declared)


def _label_values(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label values by name, from either notation.

    Raises:
        ValueError: If a value is not a whole number.
    """
    if all(isinstance(name, str) for name in labels.values()):
        if len(set(labels.values())) != len(labels):
            raise ValueError("repeated name")
        return {name: (int(value),) for value, name in labels.items()}
    result = {}
    for name, value in labels.items():
        members = value if isinstance(value, list) and value else [value]
        if not all(type(member) is int for member in members):
            raise ValueError("not an integer")
        result[name] = tuple(members)
    return result


def _nested_regions(values: Mapping[str, tuple[int, ...]]) -> Regions:
    regions = {name: members for name, members in values.items() if members != (0,)}
    names = sorted(regions, key=lambda name: -len(regions[name]))
    return Regions(tuple(names), tuple(regions[name] for name in names), nested=True)


def shown_value(value: object) -> str:
    """The value in a message, cut to a length that can be read."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
