from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

most_threads: int

def isa() -> str: ...
def machine(root: str = "/") -> str: ...
def measure(
    file: str | bytes,
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    devices: Sequence[str] = ("cpu",),
    precisions: Sequence[str] = ("float32",),
    dense: bool = False,
    power: bool = False,
    seconds: float = 2.0,
    input: str | bytes = "",
    check: str | bytes = "",
    trtexec: Sequence[str] = (),
    root: str | bytes = "/",
    cache: str | bytes = "",
    samples: str | bytes = "",
    say: Callable[[str], None] | None = None,
) -> str: ...

class Network:
    def __init__(self, path: str | bytes) -> None: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def output_shape(self) -> tuple[int, ...]: ...
    @property
    def takes_pixels(self) -> bool: ...
    @property
    def ends_in_softmax(self) -> bool: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def licence(self) -> str: ...
    @property
    def provenance(self) -> dict[str, str]: ...
    @property
    def file_bytes(self) -> int: ...

class Plan:
    def __init__(
        self,
        network: Network,
        batch: int = 1,
        threads: int = 1,
        measure: bool = True,
        cache: str | bytes = "",
        device: str = "cpu",
        precision: str = "float32",
    ) -> None: ...
    def run(self, input: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.float32]: ...
    def latencies(self, seconds: float) -> list[float]: ...
    def choices(self) -> list[tuple[int, str, str, float]]: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
