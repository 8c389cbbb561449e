"""An ONNX file as a torch module that onnxruntime runs: to compare it with the network it was made of."""

import torch
from torch import Tensor, nn

try:
    from onnxruntime import InferenceSession
except ImportError as error:
    raise ImportError("running ONNX files needs onnxruntime: run pip install 'pykd[onnx]'") from error


class OnnxNetwork(nn.Module):
    """An ONNX file of :mod:`pykd.deploy.onnx`, run by onnxruntime on the CPU; it has no gradient.

    Args:
        content: of the file.

    Example:
        >>> from pykd.deploy.graph import Op
        >>> from pykd.deploy.model_file import ModelFile
        >>> from pykd.deploy.onnx import to_bytes
        >>> OnnxNetwork(to_bytes(ModelFile((2,), [Op("relu", (0,))])))(torch.tensor([[-1.0, 1.0]]))
        tensor([[0., 1.]])
    """

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._session = InferenceSession(content, providers=["CPUExecutionProvider"])

    def forward(self, input: Tensor) -> Tensor:
        """The answers to rows ``[B, *input_shape]`` in float32."""
        return torch.from_numpy(self._session.run(None, {"input": input.numpy()})[0])
