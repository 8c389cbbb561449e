"""ONNX files as torch modules: to compare them with the network that they were made of."""

import torch
from torch import Tensor, nn

from pykd.deploy.graph import Op
from pykd.deploy.model_file import ModelFile
from pykd.deploy.network import FileNetwork

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


class Float16Network(FileNetwork):
    """A network as its float16 graph is typed: weights and every value between the layers rounded to float16.

    onnxruntime's processor has no kernels of float16 for most layers, computes in float32 and does not round between
    them, so that it does not see what outgrows float16.

    Args:
        model: what the model file says.

    Example:
        >>> Float16Network(ModelFile((2,), [Op("relu", (0,))]))(torch.tensor([[65519.0, 65520.0]]))
        tensor([[65504.,    inf]])
    """

    def __init__(self, model: ModelFile) -> None:
        super().__init__(model)
        for parameter in self.parameters():
            parameter.data = parameter.half().float()

    def forward(self, input: Tensor) -> Tensor:
        """The answers to rows ``[B, *input_shape]`` in float32."""
        return super().forward(input.half())

    def _result(self, op: Op, number: int, inputs: list[Tensor]) -> Tensor:
        return super()._result(op, number, inputs).half().float()
