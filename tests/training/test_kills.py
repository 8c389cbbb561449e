"""A run that is killed again and again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pykd

KILLS = 20


def test_killed_at_random_moments_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pykd.__file__).parents[1])}
    command = [sys.executable, Path(__file__).parent / "killed.py", tmp_path, str(KILLS), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    positions = json.loads(done.stdout)["positions"]
    assert len(positions) == KILLS
    stood = [position for position in positions if position]
    assert sum(step > 0 for _, _, step in stood) >= 3, "few kills fell in mid-epoch"
    assert len({stage for stage, *_ in stood}) >= 2, "all kills fell in one stage"
    for name in ("teacher", "teacher-2", "alone", "clean", "student"):
        whole, killed = (tmp_path / side / f"{name}.safetensors" for side in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), name
    whole, killed = (
        [json.loads(line) | {"seconds": None} for line in (tmp_path / side / "metrics.jsonl").read_text().splitlines()]
        for side in ("whole", "killed")
    )
    assert whole == killed
