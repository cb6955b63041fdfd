"""Uses exported models where there is TensorFlow, and nothing of this repository.

    python -I -S tensorflow_alone.py SITE_PACKAGES answer FOLDER MODEL...
    python -I -S tensorflow_alone.py SITE_PACKAGES serve MODEL

`answer` gives each array of `FOLDER/inputs.npz`, named SIGNATURE-NUMBER, to each model and
writes `FOLDER/MODEL_NAME.npz`. `serve` answers gRPC and REST as TensorFlow Serving does, on
two ports of its choice, which it prints; the model `echo` gives back its first channel.

Without `site` (-S) no .pth file is read, by which an editable install is found.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(sys.argv[1])
assert importlib.util.find_spec("tfmtseg") is None

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from tensorflow.core.protobuf import saved_model_pb2  # noqa: E402

UNLIMITED = [("grpc.max_receive_message_length", -1)]  # as TensorFlow Serving has it


def op_names(model: Path) -> set[str]:
    """Of all nodes of all functions."""
    content = saved_model_pb2.SavedModel.FromString((model / "saved_model.pb").read_bytes())
    graphs = [meta_graph.graph_def for meta_graph in content.meta_graphs]
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for graph in graphs for f in graph.library.function for node in f.node_def]
    return {node.op for node in nodes}


def answer(folder: Path, models: list[Path]) -> None:
    inputs = np.load(folder / "inputs.npz", allow_pickle=False)
    for path in models:
        names = op_names(path)
        assert "Conv3D" in names
        assert not [name for name in names if "tfmtseg" in name.lower()]
        signatures = tf.saved_model.load(str(path)).signatures
        outputs = {}
        for name in inputs.files:
            for output, value in signatures[name.split("-")[0]](images=inputs[name]).items():
                outputs[f"{name}-{output}"] = value.numpy()
        spoilt = np.full_like(inputs["volume-0"], 1)
        spoilt[2, 3, 1, 0] = np.nan
        try:
            signatures["volume"](images=spoilt)
        except tf.errors.InvalidArgumentError as error:
            outputs["refusal"] = np.array(error.message)
        np.savez(folder / f"{path.parent.name}.npz", **outputs)


class Model:
    """What both protocols ask."""

    def __init__(self, path: Path):
        self.signatures = tf.saved_model.load(str(path)).signatures

    def predict(self, name: str, signature: str, images: np.ndarray) -> dict[str, np.ndarray]:
        if name == "echo":
            return {"labels": images[..., 0].astype(np.uint8)}
        outputs = self.signatures[signature or "serving_default"](images=tf.constant(images))
        return {key: value.numpy() for key, value in outputs.items()}


def serve(path: Path) -> None:
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    model = Model(path)

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802
            spec = request.model_spec
            if spec.name not in ("echo", path.parent.name):
                context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found: {spec.name}")
            images = tf.make_ndarray(request.inputs["images"])
            try:
                outputs = model.predict(spec.name, spec.signature_name, images)
            except tf.errors.InvalidArgumentError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            response = predict_pb2.PredictResponse()
            for name in request.output_filter or outputs:
                value = outputs[name]
                if value.dtype == np.uint8:  # TensorFlow Serving answers with fields, not bytes
                    proto = response.outputs[name]
                    proto.CopyFrom(tf.make_tensor_proto(value[:0]))
                    proto.ClearField("tensor_content")
                    proto.tensor_shape.dim[0].size = value.shape[0]
                    proto.int_val.extend(value.ravel().tolist())
                else:
                    response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prefix, name = f"/v1/models/{path.parent.name}", path.parent.name
            try:
                assert self.path == f"{prefix}:predict", self.path
                images = np.array(request["inputs"]["images"], np.float32)
                outputs = model.predict(name, request["signature_name"], images)
                status = 200
                content = {"outputs": {key: value.tolist() for key, value in outputs.items()}}
            except (AssertionError, tf.errors.InvalidArgumentError) as error:
                status, content = 400, {"error": str(error)}
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = grpc.server(ThreadPoolExecutor(2), options=UNLIMITED)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as rest:
        print(grpc_port, rest.server_port, flush=True)
        rest.serve_forever()


if __name__ == "__main__":
    if sys.argv[2] == "answer":
        answer(Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
    else:
        serve(Path(sys.argv[3]))
