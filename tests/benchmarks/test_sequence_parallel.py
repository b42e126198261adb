"""The sequence-parallel benchmark runs on two processes, and times nothing that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import charts, part_tables, peers, sequence_parallel, spread_timeline
from benchmarks.common import write_results
from benchmarks.records import load
from tests.launch import of_every_rank

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="smoke runs are for machines without a GPU")


def found(case: str) -> list[dict]:
    return of_every_rank("tests.benchmarks.spread_layers", 2, case)[0]


def test_every_method_is_compared_and_timed(tmp_path):
    rows = found("right")
    assert [row["method"] for row in rows] == ["floor", *sequence_parallel.METHODS]
    for row in rows[1:]:
        assert row["error"] <= 1e-5  # in fp32
        for what in ("forward", "both"):
            assert row[f"exposed_{what}"] == pytest.approx(row[what]["median"] - rows[0][what]["median"])
        assert "exposed" in sequence_parallel.in_words(row)
    write_results("sequence_parallel", rows, folder=tmp_path, processes=2)
    (record,) = load(tmp_path)
    assert record.theme == "sequence_parallel"
    assert record.rows == rows


def test_a_wrong_method_gets_no_time():
    rows = {row["method"]: row for row in found("wrong")}
    for name in ("fastseq", "fastseq overlapped"):
        assert "one device's layer" in rows[name]["refused"]
        assert "forward" not in rows[name]
        assert "ms" not in sequence_parallel.in_words(rows[name])
    assert "forward" in rows["ulysses"]


def test_models_are_compared_and_timed():
    rows = found("models")
    again = "sp=2, input gathered again"
    train, train_video, sample = ["one", "sp=2", again, "dp=2"], ["one", "sp=2", "dp=2"], ["one", "sp=2", "dp=2"] * 2
    assert [row["variant"] for row in rows] == [*train, *train_video, *sample]
    for i, row in enumerate(rows):
        what = "train" if i < 7 else "sample"
        assert row[what]["samples_per_s"] > 0
        assert row[what]["states_gib"] > 0
        assert row[what]["times_one"] is not None
        assert ("error_ratio" in row) == row["variant"].startswith("sp")
        assert "/s" in sequence_parallel.in_words(row)
    assert rows[2]["train"]["method"] == "fastseq"


def test_what_has_no_room_on_one_is_checkpointed_in_full():
    one, spread, _, dp, full, spread_full = found("cramped")
    assert one["train"] == {"failed": "out of memory"}
    assert spread["train"]["times_one"] is None
    assert "no room" in dp["train"]["failed"]
    assert full["variant"] == "one, checkpointed in full"
    assert full["train"]["times_one"] == 1
    assert spread_full["train"]["times_one"] > 0
    assert "no room" in sequence_parallel.in_words(spread)


def test_the_curve_is_one_devices():
    one, again, spread = found("curve")
    assert again["losses"] == one["losses"]
    assert len(set(one["losses"])) == len(one["losses"]) == 4
    assert 0 <= spread["apart"] < 1e-3  # bf16
    assert "4 steps" in sequence_parallel.in_words(spread)


def test_the_timeline_shows_what_is_on_the_wire(tmp_path):
    rows = found("timeline")
    assert [(row["method"], row["pass"]) for row in rows] == [
        (method, direction) for method in spread_timeline.METHODS for direction in ("forward", "backward")
    ]
    for row in rows:
        assert {"wire", "product"} <= {k["kind"] for k in row["kernels"]}
        assert 0 < row["wire_us"] <= row["whole_us"]
        assert 0 <= row["hidden_us"] <= row["wire_us"]
        assert "on the wire" in sequence_parallel.in_words(row)
    write_results("timeline", rows, folder=tmp_path)
    assert "| fastseq overlapped | backward |" in part_tables.timeline(load(tmp_path), lambda record: "")
    pytest.importorskip("matplotlib")
    assert [path.name for path in charts.draw_all(tmp_path)] == ["timeline.png"]


def test_hidden_is_what_is_computed_while_something_travels():
    spans = [("wire", 0, 10), ("wire", 1, 2), ("wire", 8, 14), ("product", 4, 6), ("copy", 5, 9), ("attention", 13, 20)]
    kernels = [{"kind": kind, "start_us": start, "end_us": end} for kind, start, end in spans]
    assert spread_timeline.hidden(kernels) == {"wire_us": 14, "hidden_us": 6, "whole_us": 20}


def test_peers_stand_beside_ours_or_say_why_not(tmp_path):
    pytest.importorskip("diffusers")
    rows = found("peers")
    layers, models = ({row[what]: row for row in rows if what in row} for what in ("method", "variant"))
    assert layers["ulysses"]["both"]["median"] > 0
    assert "both" in layers["yunchang ulysses"] or "yunchang" in layers["yunchang ulysses"]["refused"]
    assert list(models) == list(peers.MODELS)
    for name in ("one", "opendit", "opendit sp=2"):
        assert models[name]["ms"]["median"] > 0
        assert models[name]["error_ratio"] <= 1.2
    for row in rows:
        assert ("refused" in row) != bool({"ms", "both"} & set(row))
        assert str(row["tokens"]) in peers.words(row)
    write_results("peers", rows, folder=tmp_path, peers={"diffusers": "0.1"})
    (record,) = load(tmp_path)
    assert "| forward | ulysses |" in part_tables.peers_layers([record], lambda record: "")
    assert "WanTransformer3DModel, diffusers 0.1" in part_tables.peers_models([record], lambda record: "")


@pytest.mark.slow
def test_script():
    script = Path(sequence_parallel.__file__)
    done = subprocess.run([sys.executable, script, "--smoke"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exposed") == 2 * 2 * len(sequence_parallel.METHODS)
