"""The client of tools/ against a server that has TensorFlow alone.

The server is ours; its messages are made by the protocol's own package. It stands in for
TensorFlow Serving, with which none of this was run.
"""

from __future__ import annotations

import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tensorflow as tf

from tfmtseg.data.nifti import read_image
from tfmtseg.data.preprocess import normalize
from tfmtseg.errors import InputError
from tfmtseg.inference.predict import predict_folder, predict_volume

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("tensorflow_alone.py")
TOOL = ROOT / "tools" / "serving_client.py"
LPS = np.array([[-2.0, 0, 0, 30], [0, -1, 0, 40], [0, 0, 3, -5], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def ports(exported):
    site = Path(importlib.util.find_spec("tensorflow").origin).parents[1]
    command = [sys.executable, "-I", "-S", SCRIPT, site, "serve", exported["exclusive"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield dict(
                zip(("grpc", "rest"), map(int, server.stdout.readline().split()), strict=True)
            )
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("serving_client", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """One image of two modalities, stored from left to right and front to back."""
    folder = tmp_path_factory.mktemp("images")
    volume = np.exp(np.random.default_rng(0).normal(size=(18, 12, 9, 2))).astype(np.float32)
    nib.save(nib.Nifti1Image(volume, LPS), folder / "case.nii.gz")
    return folder


def test_the_tool_writes_what_predict_writes(ports, runs, images, tmp_path):
    predict_folder(runs["exclusive"].directory, images, tmp_path / "expected")
    output = tmp_path / "served.nii.gz"
    done = subprocess.run(
        [
            sys.executable, TOOL, f"--server=127.0.0.1:{ports['grpc']}", "--model=exclusive",
            f"--image={images / 'case.nii.gz'}", f"--output={output}",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    served, expected = nib.load(output), nib.load(tmp_path / "expected" / "case.nii.gz")
    np.testing.assert_array_equal(served.affine, expected.affine)
    labels, expected_labels = (np.asarray(image.dataobj) for image in (served, expected))
    assert len(np.unique(expected_labels)) == 3
    # Voxels in which two classes are alike to the last digits may differ.
    assert (labels == expected_labels).mean() > 0.999


def test_rest_gives_the_labels_of_predict(ports, runs, images, client):
    voxels = read_image([images / "case.nii.gz"]).voxels
    labels = client.predict_rest(f"127.0.0.1:{ports['rest']}", "exclusive", voxels, 60)
    assert labels.dtype == np.uint8
    assert (labels == predict_volume([runs["exclusive"]], normalize(voxels))).mean() > 0.999


def test_messages_beyond_the_limit_of_grpc(ports, client):
    """20 MiB there and 5 MiB back, where a client takes 4 MiB by default."""
    voxels = np.random.default_rng(0).integers(0, 255, (200, 200, 130, 1)).astype(np.float32)
    labels = client.predict_grpc(f"127.0.0.1:{ports['grpc']}", "echo", voxels, 60)
    np.testing.assert_array_equal(labels, voxels[..., 0])


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_refusals_are_told(ports, client, protocol):
    predict = getattr(client, f"predict_{protocol}")
    server = f"127.0.0.1:{ports[protocol]}"
    voxels = np.ones((9, 9, 9, 2), np.float32)
    with pytest.raises(InputError, match="unknown_model"):
        predict(server, "unknown_model", voxels, 60)
    voxels[3, 3, 3, 1] = np.inf
    with pytest.raises(InputError, match="values must be finite"):
        predict(server, "exclusive", voxels, 60)
    with pytest.raises(InputError, match="must be a label map"):
        predict("127.0.0.1:9", "exclusive", voxels, 60)  # nobody listens there


def ask_server_that_says(client, answer: bytes) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        client.predict_rest(f"127.0.0.1:{server.server_port}", "m", np.ones((2, 2, 2, 1)), 60)


@pytest.mark.parametrize("answer", [b"<html>", b'{"outputs": {}}', b"[]", b'{"outputs": 3}'])
def test_answers_of_another_server(client, answer):
    with pytest.raises(InputError, match="answer is something else"):
        ask_server_that_says(client, b"HTTP/1.0 200 OK\r\n\r\n" + answer)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "none .BadStatusLine: SSH"),  # another protocol
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "none .IncompleteRead"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\n{", "500 .No, and IncompleteRead"),
        (b"HTTP/1.1 404 No\r\n\r\n\xff", "404 .\ufffd"),  # no UTF-8
    ],
)
def test_answers_that_break_off(client, answer, told):
    with pytest.raises(InputError, match=f"answer is {told}.*, must be a label map"):
        ask_server_that_says(client, answer)


def test_a_port_that_is_no_number(client):
    with pytest.raises(InputError, match=r"answer is none \(InvalidURL: nonnumeric port"):
        client.predict_rest("localhost:rest", "m", np.ones((2, 2, 2, 1)), 60)


@pytest.mark.parametrize(("protocol", "server"), [("grpc", ":8500"), ("rest", ":8501")])
def test_the_port_is_that_of_the_protocol(client, images, tmp_path, monkeypatch, protocol, server):
    asked = []

    def predict(server, model, voxels, timeout_s):
        asked.append(server)
        return np.zeros(voxels.shape[:3], np.uint8)

    monkeypatch.setattr(client, f"predict_{protocol}", predict)
    values = {"_SERVER": None, "_PROTOCOL": protocol, "_MODEL": "m", "_TIMEOUT_S": 1.0}
    values |= {"_IMAGE": [images / "case.nii.gz"], "_OUTPUT": tmp_path / "labels.nii.gz"}
    for name, value in values.items():
        monkeypatch.setattr(client, name, SimpleNamespace(value=value))
    client._predict()
    assert asked == [f"localhost{server}"]


def test_grpc_without_its_packages(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    advice = f"pip install 'tensorflow-serving-api<={tf.__version__}'"
    with pytest.raises(InputError, match=f"grpc without its packages .* {re.escape(advice)}"):
        client.predict_grpc("127.0.0.1:9", "m", np.ones((2, 2, 2, 1), np.float32), 60)
