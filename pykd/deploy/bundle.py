"""A folder to copy to a device: a model file, rows with their answers, the engine, and what tries it all there.

``pykd/deploy/device`` holds its ``run.sh`` and ``README.txt``. Needs numpy, and the package onnx for ``dense.onnx``.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pykd._files import writing
from pykd.deploy.engine import Model
from pykd.deploy.model_file import read
from pykd.deploy.sources import engine_sources
from pykd.errors import PykdError

MODEL = "model.pykd.safetensors"
DEVICE = Path(__file__).with_name("device")
CARRIED = Path(__file__).with_name("source")  # where a wheel has the engine's sources; a checkout is their place itself
MACHINES = {62: "x86_64", 183: "aarch64"}  # ELF's e_machine, and what `uname -m` says


def bundle(
    file: str | Path,
    folder: str | Path,
    rows: ArrayLike,
    *,
    onnx: str | None = None,
    binaries: str | Path | None = None,
    force: bool = False,
) -> dict[str, int]:
    """Writes a folder that answers, checks and measures a network on another machine: see its ``run.sh``.

    Args:
        file: a model file.
        folder: to be made; whenever the machine stops, it is there as a whole or not at all.
        rows: floats ``[rows, *input_shape]``, which are answered here and again on the device.
        onnx: float32 or float16: add the dense network as ONNX, which other engines read.
        binaries: a folder with ``pykd-run``, such as ``build/cross`` after ``make cross``; else the device builds it.
        force: replace a bundle that is there; its results stay.

    Returns:
        The bytes of each file or folder in it.

    Raises:
        PykdError: a file cannot be read or written, the rows do not fit, or something is at ``folder`` already.
        ImportError: the engine is not compiled here, or ``onnx`` needs a package that is missing.

    Example:
        >>> import tempfile
        >>> from pykd.deploy.model_file import ModelFile, write
        >>> with tempfile.TemporaryDirectory() as place:
        ...     _ = write(ModelFile((3,), []), f"{place}/a.pykd.safetensors")
        ...     sizes = bundle(f"{place}/a.pykd.safetensors", f"{place}/device", np.ones((2, 3), np.float32))
        >>> sorted(sizes)
        ['LICENSE', 'README.txt', 'answers.npy', 'inputs.npy', 'model.pykd.safetensors', 'run.sh', 'source']
    """
    file, folder = Path(file), Path(folder).resolve()
    _check_place(folder, force)
    read(file)  # says what is wrong with it
    inputs = np.ascontiguousarray(rows)
    if inputs.dtype.kind != "f" or not np.isfinite(inputs).all() or not len(inputs):
        raise PykdError(f"a bundle's rows are finite floats, at least one, got {list(inputs.shape)} of {inputs.dtype}")
    inputs = inputs.astype(np.float32)
    with _new_folder(folder) as new, writing(folder, "bundle again"):
        shutil.copyfile(file, new / MODEL)
        answers = Model(new / MODEL, threads=1, measure=False)(inputs)
        if not np.isfinite(answers).all():
            raise PykdError(f"some answers of {file} to these rows are not finite: give other rows")
        np.save(new / "inputs.npy", inputs)
        np.save(new / "answers.npy", answers)
        if onnx:
            from pykd.deploy import onnx as writer

            (new / "dense.onnx").write_bytes(writer.to_bytes(read(new / MODEL), dtype=onnx))
        for name, source in _sources().items():
            _copy(source, new / "source" / name)
        shutil.copyfile(new / "source" / "LICENSE", new / "LICENSE")
        if binaries:
            program = Path(binaries) / "pykd-run"
            _copy(program, new / "bin" / _machine(program) / "pykd-run").chmod(0o755)
        shutil.copyfile(DEVICE / "README.txt", new / "README.txt")
        _copy(DEVICE / "run.sh", new / "run.sh").chmod(0o755)
    return {each.name: _bytes(each) for each in folder.iterdir() if each.name != "results"}


def _check_place(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        if not all((folder / name).is_file() for name in ("run.sh", MODEL)):
            raise PykdError(f"{folder} is there and no bundle: give another -o")
        if not force:
            raise PykdError(
                f"{folder} is a bundle already: add --force to replace it (its results stay), or give another -o"
            )
    if Path.cwd().is_relative_to(folder):
        raise PykdError(f"{folder} is replaced, and you are in it: go out of it first, or give another -o")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place in the end."""
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}{ending}") for ending in ("", ".old"))
    try:
        with writing(folder, "bundle again"):
            new.mkdir()
        yield new
        with writing(folder, "bundle again"):
            if (folder / "results").is_dir():
                shutil.copytree(folder / "results", new / "results", symlinks=True)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _sources() -> dict[str, Path]:
    root = CARRIED if CARRIED.is_dir() else Path(__file__).parents[2]
    try:
        return engine_sources(root)
    except FileNotFoundError as error:
        raise PykdError(
            f"a bundle carries the sources of the engine and of nlohmann/json ({error}): "
            "run pip install nlohmann_json, and install pykd anew"
        ) from None


def _machine(program: Path) -> str:
    """What ``uname -m`` says where the program runs."""
    try:
        with program.open("rb") as stream:
            head = stream.read(20)
    except OSError as error:
        raise PykdError(f"cannot read {program}: {error.strerror}; run make cross first") from None
    machine = MACHINES.get(int.from_bytes(head[18:20], "little")) if head.startswith(b"\x7fELF\x02\x01") else None
    if machine is None:
        raise PykdError(f"{program} is no program for {' or '.join(MACHINES.values())}: run make cross")
    return machine


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def _bytes(path: Path) -> int:
    return sum(each.stat().st_size for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file())
