"""Lists everything that is wrong with a data folder, and changes nothing.

Exit status 0 if all of it can be used, 2 if not.
"""

from __future__ import annotations

from absl import app, flags

from tfmtseg.console import flags_only, report_problems
from tfmtseg.data.check import check_data_folder
from tfmtseg.errors import InputErrors
from tfmtseg.regions import Regions

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder with dataset.json, or with NIfTI images.", required=True
)
_REGIONS = flags.DEFINE_string(
    "regions",
    None,
    "Regions that will be segmented (brats_msd, brats_124, brats_123, or 'WT=1,2,3;TC=2,3;ET=3').",
)
_ALLOW_ROOT = flags.DEFINE_string(
    "allow_root", None, "Another folder that links in the data folder may lead into."
)


def _check() -> None:
    regions = Regions.parse(_REGIONS.value) if _REGIONS.value else None
    findings = check_data_folder(_DATA_DIR.value, regions=regions, allow_root=_ALLOW_ROOT.value)
    for text in findings.warnings:
        print(f"warning: {text}")
    print(
        f"{_DATA_DIR.value}: {findings.num_cases} cases read, {len(findings.errors)} errors, "
        f"{len(findings.warnings)} warnings."
    )
    if findings.images_only:
        print(
            "There is no dataset.json, so these are images alone: for --unlabeled_dir of train.py "
            "and --images_dir of predict.py, not for --data_dir."
        )
    if findings.errors:
        raise InputErrors(findings.errors)


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_check)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
