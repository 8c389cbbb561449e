"""No function compiled for a newer processor can be picked by the linker for an older one."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "tests"
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
CMAKE, NINJA = shutil.which("cmake", path=PATH), shutil.which("ninja", path=PATH)


def shared_symbols(nm: str, level: str) -> list[str]:
    """What ``nm`` lists that the linker may merge with another object's, except for the level's own."""
    mine = re.compile(rf"_Z(?:TV|TI|TS|GV|Z)*NK?4pykd{len(level)}{level}")
    symbols = [line.split()[-2:] for line in nm.splitlines() if line]
    return [name for kind, name in symbols if kind in "WVu" and not mine.match(name)]


@pytest.fixture(scope="module")
def objects() -> list[tuple[str, Path]]:
    """Each kernel, compiled for each level as in a release."""
    if not (CMAKE and NINJA):
        pytest.skip("cmake and ninja are not installed")
    settings = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}", "-DPYKD_TESTS=ON"]
    subprocess.run([CMAKE, *settings, "-S", ROOT, "-B", BUILD], check=True, capture_output=True)
    subprocess.run([CMAKE, "--build", BUILD, "--target", "isa_levels"], check=True, capture_output=True)
    found = []
    for folder in (BUILD / "CMakeFiles").glob("kernels_plain_*.dir"):
        level = folder.stem.removeprefix("kernels_plain_")
        found += [(level, path) for path in folder.rglob("*.o")]
    assert len(found) >= len(list((ROOT / "csrc" / "kernels").iterdir()))
    return found


def test_objects_share_nothing_across_levels(objects):
    broken = {}
    for level, path in objects:
        nm = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        if shared := shared_symbols(nm, level):
            broken[f"{path.name} for {level}"] = shared
    assert broken == {}, "standard templates and inline functions outside the level's namespace"


def test_a_shared_function_is_seen():
    mine, other = "_ZN4pykd4avx29to_floatsEDv8_j", "_ZSt3maxIlERKT_S2_S2_"
    nm = f"0000000000000000 W {mine}\n0000000000000000 W {other}\n0000000000000040 T _ZN4pykd6kd_cpuEv\n"
    assert shared_symbols(nm, "avx2") == [other]
    assert shared_symbols(nm, "avx512") == [mine, other]
