"""The order of measurement and one measurement, for benchmarks with torch and for those without."""

from collections.abc import Callable

Call = Callable[[], object]


def in_turns(names: list[str], blocks: int) -> list[tuple[int, str]]:
    """Each name once a block, and each block beginning with another."""
    return [(block, names[(block + i) % len(names)]) for block in range(blocks) for i in range(len(names))]


def measure_case(
    benchmark,
    call: Call,
    op: str,
    case: str,
    threads: int,
    name: str,
    block: int,
    rounds: int,
    iterations: int,
    setup: Call | None = None,
    warmup: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """One block of one implementation, of a row of the table by its name.

    ``setup`` runs before each round of one iteration, unmeasured; ``warmup`` is how many rounds go before, unmeasured.
    """
    benchmark.group = f"{op} {case}, {device}, {dtype}, {threads} threads"
    benchmark.extra_info.update(
        op=op, case=case, implementation=name, device=device, dtype=dtype, threads=threads, block=block
    )
    benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=iterations, warmup_rounds=warmup)
