"""Which files the engine is built from: for a bundle, and for setup.py, which puts them into a wheel."""

import re
from importlib import metadata
from pathlib import Path

THIRD_PARTY = "third_party/nlohmann"


def engine_sources(root: Path) -> dict[str, Path]:
    """The files by their path in a folder from which CMake builds the engine.

    Args:
        root: a checkout of pykd, or such a folder.

    Raises:
        FileNotFoundError: ``root`` is neither, or the package nlohmann_json is not installed.
    """
    listed = (root / "CMakeLists.txt").read_text()
    rooms = re.findall(r"^set\(PYKD_ENGINE_ROOMS (.+)\)$", listed, re.MULTILINE)[0].split()
    folders = ["cmake", "csrc/core", "csrc/runtime", *(f"csrc/kernels/{room}" for room in rooms)]
    files = [root / "CMakeLists.txt", root / "LICENSE"]
    for folder in folders:
        files += [file for file in (root / folder).iterdir() if file.suffix in {".cmake", ".h", ".cpp", ".cu"}]
    left_out = re.compile(r"_test\.(h|cpp)$|^(module|tests)\.(cpp|cmake)$")
    found = {str(file.relative_to(root)): file for file in sorted(files) if not left_out.search(file.name)}
    if (carried := root / THIRD_PARTY).is_dir():
        return found | {str(file.relative_to(root)): file for file in sorted(carried.rglob("*")) if file.is_file()}
    try:
        package = metadata.files("nlohmann_json") or []
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError("the package nlohmann_json is not installed") from error
    for file in package:
        _, is_header, inside = str(file).partition("include/nlohmann/")
        if is_header and file.suffix == ".hpp":
            found[f"{THIRD_PARTY}/{inside}"] = Path(str(file.locate()))
        elif file.name == "LICENSE":
            found[f"{THIRD_PARTY}/LICENSE"] = Path(str(file.locate()))
    return found
