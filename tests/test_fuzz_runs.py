"""A part of what tests/support/fuzz_runs.py does, which docs/security.md describes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parent / "support"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no fork there")


def fuzz(kind: str, count: int, seed: int) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SUPPORT / "fuzz_runs.py", kind, str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "count"), [("names", 80), ("kills", 8), ("races", 4)])
def test_nothing_is_lost_doubled_or_made_up(kind: str, count: int):
    assert next(iter(fuzz(kind, count, 1).values())) >= 0.9 * count


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("names", 1000), ("kills", 200), ("races", 50)])
def test_nothing_is_lost_at_length(kind: str, count: int):
    assert next(iter(fuzz(kind, count, 2).values())) >= 0.9 * count
