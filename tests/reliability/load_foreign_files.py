"""Offers files that run code when they are loaded carelessly, wherever a file is taken.

    python tests/reliability/load_foreign_files.py

Each file leaves a mark when its code runs; that it does when loaded carelessly is shown
first. Wherever it is offered it must be refused by name, or, in a cache, be made anew,
and leave no mark.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from tfmtseg import Segmenter  # isort: skip  before tensorflow
import tensorflow as tf

from tfmtseg.compat import keras
from tfmtseg.data.cache import Record, build_cache
from tfmtseg.data.cases import Case, read_case_list
from tfmtseg.data.folder import read_data_folder
from tfmtseg.data.nifti import read_image
from tfmtseg.data.phantom import MODALITIES, write_phantoms
from tfmtseg.data.splits import Splits, make_splits
from tfmtseg.files import write_json, write_text
from tfmtseg.inference.predict import predict_folder
from tfmtseg.training.checkpoint import initialize, write_model, write_weights
from tfmtseg.training.config import TrainConfig, read_settings
from tfmtseg.training.finished_run import load_run


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def write_bombs(folder: Path, mark: Path) -> dict[str, Callable[[], object]]:
    """Writes the files; returns by name how to load each carelessly."""
    (folder / "pickle").write_bytes(pickle.dumps(Bomb(mark)))
    array = np.empty(1, object)
    array[0] = Bomb(mark)
    np.save(folder / "array.npy", array, allow_pickle=True)
    (folder / "settings.yaml").write_text(
        f"seed: !!python/object/apply:os.mkdir ['{mark}']\n"  # a folder is a mark too
    )

    # Keras stores the code of a lambda, and of no other function.
    touch = lambda x, name: (__import__("pathlib").Path(name).touch(), x)[1]  # noqa: E731
    layer = keras.layers.Lambda(touch, arguments={"name": str(mark)})
    model = keras.Sequential([keras.layers.Input((1,)), layer])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls .h5 a thing of the past
        model.save(folder / "model.keras")
        model.save(folder / "model.h5")
    module = tf.Module()

    @tf.function(input_signature=[])
    def write() -> tf.Tensor:
        tf.io.write_file(str(mark), "x")
        return tf.constant(0)

    module.write = write
    tf.saved_model.save(module, str(folder / "saved_model"))
    mark.unlink(missing_ok=True)  # making the models ran their code

    def load_keras(name: str) -> object:
        return keras.models.load_model(folder / name, safe_mode=False)(np.zeros((1, 1)))

    return {
        "pickle": lambda: pickle.loads((folder / "pickle").read_bytes()),
        "array.npy": lambda: np.load(folder / "array.npy", allow_pickle=True),
        "settings.yaml": lambda: yaml.unsafe_load((folder / "settings.yaml").read_text()),
        "model.keras": lambda: load_keras("model.keras"),
        "model.h5": lambda: load_keras("model.h5"),
        "saved_model": lambda: tf.saved_model.load(str(folder / "saved_model")).write(),
    }


def copy_to(source: Path, target: Path) -> Path:
    """A file or folder at another place, whose parents are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


def write_run(directory: Path) -> Segmenter:
    """Writes what a finished run holds; returns its model."""
    model = Segmenter(regions=3, method="encdec", width=8)
    model.build((None, 16, 16, 16, len(MODALITIES)))
    write_model(directory, model, MODALITIES, (16, 16, 16), (1, 1, 1))
    write_weights(directory, model)
    write_text(
        directory / "config.yaml",
        TrainConfig(method="encdec", width=8, crop=(16, 16, 16)).to_yaml(),
    )
    Splits(("a",), (), (), ()).write(directory / "splits")
    write_json(directory / "result.json", {})
    load_run(directory)  # it is sound
    return model


def doors(
    bomb: Path, folder: Path, images: Path, run: Path, model: Segmenter
) -> dict[str, Callable[[], object]]:
    """Wherever a file is taken, with `bomb` in its place."""
    image = copy_to(bomb, folder / "images" / "c.nii.gz")
    described = copy_to(bomb, folder / "described" / "dataset.json").parent

    def predict(model_dir: Path) -> None:
        predict_folder(model_dir, images, folder / "out")

    result: dict[str, Callable[[], object]] = {
        "image": lambda: read_image([image]),
        "dataset.json": lambda: read_data_folder(described),
        "list of cases": lambda: make_splits(["a"], [], labeled_list=read_case_list(bomb)),
        "settings": lambda: TrainConfig.from_mapping(read_settings(bomb), str(bomb)),
        "--init_checkpoint": lambda: initialize(model, bomb, MODALITIES),
        "--model_dir": lambda: predict(bomb),
    }
    for name in ("model.json", "config.yaml", "weights/final.index"):
        disguised = copy_to(run, folder / name.replace("/", " ") / "run")
        (disguised / name).unlink()
        copy_to(bomb, disguised / name)
        result[f"{name} of a run"] = lambda disguised=disguised: predict(disguised)
    return result


def read_forged_cache(bomb: Path, folder: Path, case: Case) -> Record:
    """A case from a cache that holds `bomb` with its right checksum."""
    record = build_cache([case], folder, num_modalities=len(MODALITIES), labels=range(4))[0]
    array, entry = record.path("image"), folder / f"{case.name}.image.json"
    before = zlib.crc32(array.read_bytes())
    shutil.copy(bomb, array)
    stored = json.loads(entry.read_text())
    assert stored["entry"]["files"]["image"] == {"name": array.name, "checksum": before}
    stored["entry"]["files"]["image"]["checksum"] = zlib.crc32(array.read_bytes())
    stored["checksum"] = zlib.crc32(json.dumps(stored["entry"], sort_keys=True).encode())
    entry.write_text(json.dumps(stored))
    inode = array.stat().st_ino
    record = build_cache([case], folder, num_modalities=len(MODALITIES), labels=range(4))[0]
    assert array.stat().st_ino == inode  # or the forgery was not good enough
    return record.image


def refuses(load: Callable[[], object], mark: Path, what: str) -> None:
    try:
        load()
    except ValueError:  # InputError is one
        pass
    else:
        raise AssertionError(f"{what}: was taken")
    if mark.exists():
        raise AssertionError(f"{what}: ran its code")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mark, data = folder / "mark", folder / "data"
        write_phantoms(data, 1, seed=1, shape=(16, 16, 16))
        model = write_run(folder / "run")
        (folder / "bombs").mkdir()
        careless = write_bombs(folder / "bombs", mark)
        count = 0
        for kind, load in careless.items():
            load()
            assert mark.exists(), f"{kind} is no bomb"
            mark.rmdir() if mark.is_dir() else mark.unlink()
            bomb = folder / "bombs" / kind
            places = doors(bomb, folder / kind, data / "imagesTr", folder / "run", model)
            for place, offer in places.items():
                refuses(offer, mark, f"{kind} as {place}")
                count += 1
        image = data / "imagesTr" / "PHANTOM_001.nii.gz"
        case = Case("case", (image,), data / "labelsTr" / image.name)
        forged = folder / "bombs" / "array.npy"
        refuses(lambda: read_forged_cache(forged, folder / "cache", case), mark, "a forged cache")
    print(f"{len(careless)} kinds of files in {count + 1} places: all refused, 0 ran code")


if __name__ == "__main__":
    main()
