"""Segments one image by a model that TensorFlow Serving serves: an example to build upon.

    python tools/serving_client.py --server=localhost:8500 --model=brain \
        --image=FLAIR.nii.gz,T1.nii.gz --output=labels.nii.gz

The model is one of `tfmtseg-export`. gRPC sends the voxels as they lie in memory, and is
meant for volumes. `--protocol=rest` sends numbers as text, two to five times as many bytes,
and needs nothing but Python's own library. TensorFlow Serving's port for gRPC is 8500, that for
REST 8501: `--server` is the one on this machine unless given.

gRPC needs the package tensorflow-serving-api (`pip install '.[serving]'` in a checkout).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from absl import app, flags

from tfmtseg import compat
from tfmtseg.console import flags_only, report_problems
from tfmtseg.data.nifti import read_image, write_label_map
from tfmtseg.errors import InputError

PORTS = {"grpc": 8500, "rest": 8501}  # of TensorFlow Serving

_SERVER = flags.DEFINE_string(
    "server", None, f"HOST:PORT of the server; by default localhost and the port of {PORTS}."
)
_PROTOCOL = flags.DEFINE_enum("protocol", "grpc", list(PORTS), "What the port speaks.")
_MODEL = flags.DEFINE_string("model", None, "The model's name on the server.", required=True)
_IMAGE = flags.DEFINE_list("image", None, "One file, or one per modality.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The label map to write.", required=True)
_TIMEOUT_S = flags.DEFINE_float("timeout_s", 600, "Seconds to wait for an answer.")

# A client of gRPC takes no answer above 4 MiB unless told to; a volume's is larger.
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def predict_grpc(server: str, model: str, voxels: np.ndarray, timeout_s: float) -> np.ndarray:
    """The label map of a volume.

    Args:
        server: `HOST:PORT`.
        model: Its name on the server.
        voxels: Float32, `(x, y, z, modalities)`, RAS+.
        timeout_s: Seconds to wait.

    Returns:
        `uint8`, `(x, y, z)`.

    Raises:
        InputError: If there is no such answer.
    """
    try:
        import grpc
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise InputError(
            "--protocol", "value", f"grpc without its packages ({error})", "one that works here",
            f"pip install 'tensorflow-serving-api<={compat.versions()['tensorflow']}', as this "
            "TensorFlow, or use --protocol=rest with the REST port",
        ) from None  # fmt: skip
    import tensorflow as tf

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = "volume"
    request.inputs["images"].CopyFrom(tf.make_tensor_proto(voxels))
    request.output_filter.append("labels")  # the probabilities are many times larger
    with grpc.insecure_channel(server, options=UNLIMITED) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            response = stub.Predict(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _no_answer(server, f"{error.code().name} ({error.details()})") from None
    return tf.make_ndarray(response.outputs["labels"])


def predict_rest(server: str, model: str, voxels: np.ndarray, timeout_s: float) -> np.ndarray:
    """As `predict_grpc`."""
    content = {"signature_name": "volume", "inputs": {"images": voxels.tolist()}}
    request = urllib.request.Request(
        f"http://{server}/v1/models/{model}:predict", json.dumps(content).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return np.array(json.load(response)["outputs"]["labels"], np.uint8)
    except urllib.error.HTTPError as error:
        with error:
            raise _no_answer(server, f"{error.code} ({_reason(error)})") from None
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())  # may be what the server said
        raise _no_answer(server, f"none ({type(error).__name__}: {reason})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _no_answer(server, f"something else ({type(error).__name__}: {error})") from None


def _reason(error: urllib.error.HTTPError) -> str:
    """What came with a refusal."""
    try:
        return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as broken:
        return f"{error.reason}, and {type(broken).__name__}"


def _no_answer(server: str, found: str) -> InputError:
    return InputError(
        server, "answer", found, "a label map",
        "look whether the server runs, and correct --server, --protocol, --model or --image",
    )  # fmt: skip


def _predict() -> None:
    volume = read_image([Path(path) for path in _IMAGE.value])
    predict = predict_grpc if _PROTOCOL.value == "grpc" else predict_rest
    server = _SERVER.value or f"localhost:{PORTS[_PROTOCOL.value]}"
    labels = predict(server, _MODEL.value, volume.voxels, _TIMEOUT_S.value)
    if labels.shape != volume.geometry.ras_shape:
        raise _no_answer(server, f"of the shape {labels.shape}")
    write_label_map(Path(_OUTPUT.value), labels, volume.geometry)
    print(f"Wrote {_OUTPUT.value}")


def main(argv: list[str]) -> int:
    flags_only(argv)
    return report_problems(_predict)


def run() -> None:
    app.run(main)


if __name__ == "__main__":
    run()
