"""What ptxas says of every CUDA kernel, for every architecture: registers, stack, spilled bytes, shared memory.

    python benchmarks/registers.py build/cuda.log build/cuda/cuda

reads the output of `make cuda` and what nvcc left beside the objects, and rewrites the record in
benchmarks/results/gpu and the table in docs/gpu.md. It fails where a kernel spills more than SPILLS allows, or where
one of the sources' is missing.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from table import replaced

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "gpu" / "registers.json"
PAGE = ROOT / "docs" / "gpu.md"
MARKS = "<!-- registers: made by `make cuda` -->", "<!-- end of registers -->"
COLUMNS = ["registers", "stack", "spill stores", "spill loads", "shared"]  # bytes, but for the first
# Bytes that kernels whose names begin so are known to spill at most, for any architecture; more is a fault. Rows share
# a block of 1,024 threads, which leaves each 64 registers; panels ask for the blocks that hide their loads.
SPILLS = {
    "distillation_loss: rows<double": 88,
    "distillation_loss: rows<float": 156,
    "factor_loss: rows<float": 56,
    "logit_regression: rows<float": 172,
    "sparse_conv2d: panels": 76,
    "sparse_linear: panels": 76,
    "variational_kl: chunks<double": 32,
}
SHOWN = ("80", "90", "100", "120")  # architectures
REGISTERS, OF_WARP, WARPS = 65_536, 256, 64  # of a multiprocessor from compute capability 8.0 on; their unit; at most

REPORT = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'\n"
    r"ptxas info *: Function properties for \1\n"
    r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info *: Used (\d+) registers(.*)"
)
ENTRY = re.compile(r"\.entry (\w+)\(.*?\)(.*?)\{", re.DOTALL)


def with_headers(source: Path) -> str:
    """A source with the CUDA headers of core that it includes."""
    text = source.read_text()
    headers = re.findall(r'#include "(core/cuda_\w+\.h)"', text)
    return "\n".join([text, *(with_headers(ROOT / "csrc" / header) for header in headers)])


def kernels_of_sources() -> set[str]:
    """`op: kernel` of every __global__ in the sources; those of a header belong to the ops that include it."""
    return {
        f"{source.stem.removesuffix('_cuda')}: {name}"
        for source in (ROOT / "csrc" / "kernels").glob("*/*_cuda.cu")
        for name in re.findall(r"__global__\s+void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", with_headers(source))
    }


def nvcc() -> str:
    """The version of the compiler on the PATH."""
    said = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"V([\d.]+)", said)[0]


def record_of(log: str, folder: Path) -> dict[str, Any]:
    """The record of one build: its output, and the folder with nvcc's PTX, which has the launch bounds."""
    resources: dict[str, dict[str, list[int]]] = {}
    for name, arch, stack, stores, loads, registers, rest in REPORT.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        row = [int(registers), int(stack), int(stores), int(loads), int(shared[1]) if shared else 0]
        resources.setdefault(name, {})[arch] = row
    names = subprocess.run(["c++filt", "-p", *resources], check=True, capture_output=True, text=True).stdout.split("\n")
    readable = {
        each: re.sub(r"pykd::(cuda::)?|\(anonymous namespace\)::", "", name)
        for each, name in zip(resources, names, strict=False)
    }
    kernels: dict[str, dict[str, Any]] = {}
    for ptx in sorted(folder.glob("*.ptx")):
        op = ptx.name.partition("_cuda.")[0]
        for name, bounds in ENTRY.findall(ptx.read_text()):
            limits = dict(re.findall(r"\.(maxntid|minnctapersm) (\d+)", bounds))
            kernels[f"{op}: {readable[name]}"] = {
                "threads": int(limits["maxntid"]),
                "blocks": int(limits.get("minnctapersm", 0)),
                **dict(sorted(resources[name].items(), key=lambda each: int(each[0]))),
            }
    return {"columns": COLUMNS, "kernels": dict(sorted(kernels.items()))}


def architectures(kernel: dict[str, Any]) -> dict[str, list[int]]:
    """The rows of one kernel by architecture."""
    return {arch: row for arch, row in kernel.items() if arch.isdigit()}


def faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record: kernels that spill, that miss an architecture, that are missing."""
    kernels = record["kernels"]
    known = {arch for kernel in kernels.values() for arch in architectures(kernel)}
    worst: dict[str, tuple[int, str, str]] = {}
    for name, kernel in kernels.items():
        for arch, row in architectures(kernel).items():
            if row[2] > max((most for start, most in SPILLS.items() if name.startswith(start)), default=0):
                worst[op_and_kernel(name)] = max(worst.get(op_and_kernel(name), (0, "", "")), (row[2], name, arch))
    said = [f"{name} spills {spilled} bytes for sm_{arch}" for spilled, name, arch in worst.values()]
    said += [
        f"{name} is not built for sm_{arch}" for name, kernel in kernels.items() for arch in sorted(known - set(kernel))
    ]
    have = {op_and_kernel(name) for name in kernels}
    return said + [f"{name} is not in the record" for name in sorted(kernels_of_sources() - have)]


def op_and_kernel(name: str) -> str:
    """The name without what its template was made with."""
    return name.partition("<")[0]


def warps(registers: int, threads: int) -> int:
    """The warps of a multiprocessor that a kernel's registers leave room for."""
    of_block = -(-threads // 32)
    of_warp = -(-registers * 32 // OF_WARP) * OF_WARP
    return min(REGISTERS // (of_warp * of_block), WARPS // of_block) * of_block


def table(record: dict[str, Any]) -> str:
    """A row for each kernel, over all that its template makes of it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, kernel in record["kernels"].items():
        groups.setdefault(op_and_kernel(name), []).append(kernel)
    lines = [
        f"| kernel | instances | threads | {' | '.join(f'sm_{arch}' for arch in SHOWN)} | warps | spilled | shared |",
        "| --- |" + " ---: |" * (5 + len(SHOWN)),
    ]
    for name, kernels in groups.items():
        threads = "/".join(map(str, sorted({kernel["threads"] for kernel in kernels})))
        rows = [row for kernel in kernels for row in architectures(kernel).values()]
        fewest = [min(warps(kernel[arch][0], kernel["threads"]) for kernel in kernels) for arch in SHOWN]
        cells = [len(kernels), threads, *(max(kernel[arch][0] for kernel in kernels) for arch in SHOWN)]
        cells += ["/".join(map(str, dict.fromkeys(fewest))), max(row[2] for row in rows), max(row[4] for row in rows)]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    log, folder = map(Path, sys.argv[1:])
    record = record_of(log.read_text(), folder)
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True)
    record = {"nvcc": nvcc(), "revision": revision.stdout.strip() or "unknown", **record}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    PAGE.write_text(replaced(PAGE.read_text(), table(record), MARKS))
    if said := faults(record):
        raise SystemExit("\n".join(said))


if __name__ == "__main__":
    main()
