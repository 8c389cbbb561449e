"""onnxruntime and OpenVINO: dense networks, out of ONNX.

Input and output lie in the caller's memory, so that a call copies nothing. All settings are the defaults but the
number of threads and, for OpenVINO, the hint for latency and the precision.
"""

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

from peers import package
from pykd.deploy import ModelFile


def graph(model: ModelFile) -> bytes:
    """ONNX of a network."""
    package("onnx")
    from pykd.deploy.onnx import to_bytes

    return to_bytes(model)


def onnxruntime(model: bytes, x: Tensor, out: Tensor, threads: int) -> Callable[[], Tensor]:
    """A call of onnxruntime's CPU provider."""
    ort = package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_input(session.get_inputs()[0].name, "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    return call


def openvino(model: bytes, x: Tensor, out: Tensor, threads: int, precision: str) -> Callable[[], Tensor]:
    """A call of OpenVINO's CPU plugin; ``precision`` is f32 or bf16."""
    ov = package("openvino")
    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16 arithmetic")
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    network = core.read_model(model)
    network.reshape(list(x.shape))
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(out.numpy(), shared_memory=True))

    def call() -> Tensor:
        request.infer(share_outputs=True)
        return out

    return call
