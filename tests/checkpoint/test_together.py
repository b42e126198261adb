"""Several processes save and load together, and fail together."""

from __future__ import annotations

from tests.launch import of_every_rank

_MODULE = "tests.checkpoint.failing"


def test_two_processes_resume_to_the_bit():
    for found in of_every_rank(_MODULE, 2, "resume"):
        assert found["names"] == ["step-00000003"]
        assert found["files"] == 2
        assert found["over"] < 60_000, "what both hold was written twice"
        assert found["draws"][0] != found["draws"][1]


def test_what_is_not_finite_on_one_is_refused_by_all():
    assert of_every_rank(_MODULE, 2, "not finite") == [["latest", "step-00000001"]] * 2


def test_a_disk_that_is_full_for_one_fails_all_and_leaves_what_was():
    assert of_every_rank(_MODULE, 2, "full disk") == [["latest", "step-00000001", "step-00000002"]] * 2


def test_what_differs_is_named():
    assert of_every_rank(_MODULE, 2, "different") == [[], []]


def test_damage_is_told_to_all():
    assert of_every_rank(_MODULE, 2, "damaged") == ["step-00000001"] * 2


def test_what_is_wrong_with_earlier_ones_leaves_nobody_waiting():
    assert of_every_rank(_MODULE, 2, "damaged before") == ["step-00000001"] * 2


def test_what_one_refuses_late_changes_nothing_in_any():
    assert of_every_rank(_MODULE, 2, "refused late") == [[], []]


def test_weights_of_a_sharded_model():
    assert of_every_rank(_MODULE, 2, "weights") == [["a.pt", "a.safetensors"]] * 2


def test_weights_wait_for_a_save_in_the_background():
    files = ["a.safetensors", "latest", "step-00000001", "step-00000002"]
    assert of_every_rank(_MODULE, 2, "weights meanwhile") == [files] * 2
