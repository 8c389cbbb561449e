from typing import Any

torch_version: str
cuda: bool
cuda_reason: str

def isa() -> str: ...
def bfloat16() -> bool: ...
def __getattr__(name: str) -> Any: ...  # the operators' entries for eager calls
