"""SIGKILL at random moments: what is left loads, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _killed(trials: int, ranks: int, limit: float) -> dict:
    command = [sys.executable, "-m", "tests.checkpoint.killing", str(trials), str(ranks), "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=limit, cwd=Path(__file__).parent.parent.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("trials", "ranks"),
    [
        (4, 1),
        pytest.param(200, 1, marks=pytest.mark.slow),
        pytest.param(20, 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_bit(trials, ranks):
    found = _killed(trials, ranks, 60 + 30.0 * trials)
    print(found)
    assert found["wrong"] == []
    assert found["loadable"] == found["bit-exact"] == found["trials"] == trials
    assert found["hung"] == 0
    assert found["inside a save"] >= 0.3 * trials, "too few kills fell into a save to say anything"
