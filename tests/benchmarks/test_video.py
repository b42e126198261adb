"""The benchmark of videos runs, and prints no speed of what computes something else."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import video
from tests.benchmarks.test_training import broken_once_accelerated

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="smoke runs are for machines without a GPU")


def smoke(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["video.py", "--smoke", *options])
    return video.main()


def test_latte_is_trained(monkeypatch, capsys):
    assert smoke(monkeypatch, "--only", "latte") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all("clips/s" in line for line in lines)
    assert "x eager" in lines[1]


@pytest.mark.slow  # the training benchmark's own tests show it of the same functions
def test_a_wrong_kernel_gets_no_speed(monkeypatch, capsys):
    broken_once_accelerated(monkeypatch)
    assert smoke(monkeypatch, "--only", "latte") == 1
    _, ours = capsys.readouterr().out.splitlines()
    assert "no speed is reported" in ours
    assert "clips/s" not in ours


def test_wan_and_cogvideox_are_sampled(monkeypatch, capsys):
    assert smoke(monkeypatch, "--only", "wan", "cogvideox") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["wan", "wan", "cogvideox", "cogvideox"]
    assert all(" ms " in line for line in lines)


def test_another_output_gets_no_speed(monkeypatch, capsys):
    monkeypatch.setattr(video, "distances", lambda *_: {"eager": 1e-3, "opendit": 1.3e-3})
    assert smoke(monkeypatch, "--only", "wan") == 1
    _, ours = capsys.readouterr().out.splitlines()
    assert "output off by 1.30e-03, eager bf16's by 1.00e-03: no speed is reported" in ours
    assert " ms " not in ours
