"""docs/jetson.md: all its commands, in order, as they stand there; the device is a folder and an emulator."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import TINY

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "jetson.md").read_text()
EMULATOR = "qemu-aarch64-static -L /usr/aarch64-linux-gnu"
# A device's log, so that run.sh --trtexec has what to read.
TRTEXEC = """#!/bin/sh
case $1 in --help) echo --stronglyTyped ;; *)
  echo '&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec'
  echo '[10/03/2024-10:47:59] [I] Throughput: 130.298 qps'
  echo '[10/03/2024-10:47:59] [I] Latency: min = 5.4 ms, max = 13.4 ms, mean = 7.6 ms, median = 7.2 ms, percentile(90%) = 10.3 ms, percentile(95%) = 10.9 ms, percentile(99%) = 13.0 ms'
  echo '&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec' ;;
esac
"""  # noqa: E501
# The commands that another machine would answer, and the shortest work of those that take long.
PROGRAMS = {
    "pykd": f"""#!/bin/sh
case $1 in distill) set -- "$@" {" ".join(TINY)} ;; esac
exec {sys.executable} -m pykd "$@"
""",
    "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    "make": f'#!/bin/sh\nexec {shutil.which("make")} -n -C {ROOT} "$@" >/dev/null\n',
    "scp": """#!/bin/sh
case $1 in
  -r) cp -r "$2" "$DEVICE" ;;
  *) cp "$DEVICE"/${1#jetson:} "$2" ;;
esac
""",
    "ssh": """#!/bin/sh
cd "$DEVICE" && shift
case $* in
  */pykd-run*) sh -c "$PYKD_EMULATOR $*" ;;
  *) sh -c "$*" ;;
esac
""",
}


@pytest.fixture
def place(tmp_path):
    """A folder to work in, with a device beside it and programs of its own."""
    if not shutil.which("qemu-aarch64-static"):
        pytest.skip("qemu-aarch64-static is not installed: run apt-get install qemu-user-static")
    if not (ROOT / "build" / "cross" / "pykd-run").exists():
        pytest.skip("there is no cross-built engine: run make cross")
    for name, text in {**PROGRAMS, "trtexec": TRTEXEC}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    for folder in ("device", "host/build"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "host" / "build" / "cross").symlink_to(ROOT / "build" / "cross")
    return tmp_path


def test_every_command_runs(place):
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
    quick = re.sub(r"(bundle/run\.sh)", r"\1 --seconds 0.02", script)
    assert quick.count("--seconds") == 2
    path = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "DEVICE": str(place / "device"), "PYKD_EMULATOR": EMULATOR}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "PYKD_CACHE": "off"}
    result = subprocess.run(
        ["sh", "-eux"], input=quick, cwd=place / "host", env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = (place / "device" / "bundle" / "results").glob("*.json")
    assert (place / "host" / record.name).read_bytes() == record.read_bytes()
    table = (place / "host" / "table.md").read_text()
    assert "emulated: no times" in table and "| equal |" in table and "TensorRT" in table
    assert (place / "host" / "table.svg").read_bytes().startswith(b"<?xml")
    assert table.splitlines()[0] in result.stdout  # of the last command


def test_it_says_first_that_there_was_no_device():
    screen = PAGE[: PAGE.index("\n## ")]
    assert "No Jetson was at hand" in screen and len(screen.splitlines()) < 15
