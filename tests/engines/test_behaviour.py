"""Engines with checkpointing, compilation, inference, nodes; what they say and what they refuse."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.engines import behaving
from tests.engines.on_engines import of
from tests.engines.training import MICROS, PLUGINS, STEPS, check

DIVIDING = behaving.DIVIDING


@pytest.mark.parametrize(("plugin", "kind"), behaving.CHECKPOINTED)
def test_activation_checkpointing(plugin, kind):
    for errors in of(f"checkpointing/{plugin}/{kind}"):
        check(errors)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="whole blocks are triton's")
@pytest.mark.parametrize(("plugin", "kind"), behaving.WHOLE)
def test_blocks_that_are_one_function(plugin, kind):
    for ran, errors in of(f"whole blocks/{plugin}/{kind}"):
        assert ran == STEPS * MICROS * 2
        check(errors, 1e-6)  # sums over tokens are fp32 in them, whatever the engine


@pytest.mark.parametrize("plugin", ["ddp", "zero3"])
def test_compiled_blocks(plugin):
    for error, name in of(f"compiled blocks/{plugin}"):
        assert error <= 1e-10, name


@pytest.mark.parametrize("name", ["lists of lists", "diffusers"])
def test_a_model_that_nobody_describes_is_one_unit(name):
    for error, said in of(f"generic/{name}"):
        assert error <= 1e-10
        assert "its parameters are one unit of 'zero3'" in said


@pytest.mark.parametrize("plugin", ["zero1", "gemini"])
def test_bf16_reduction_rounds_gradients_to_bf16_and_no_more(plugin):
    for error in of(f"bf16 reduction/{plugin}"):
        assert 1e-5 < error < 8e-3


@pytest.mark.parametrize("plugin", ["ddp", "zero2", "gemini"])
def test_state_of_an_optimizer_that_has_stepped_moves_along(plugin):
    for moments, parameters in of(f"state/{plugin}"):
        assert moments == 0
        assert parameters <= 1e-8


@pytest.mark.parametrize("plugin", PLUGINS)
def test_explain(plugin):
    said = of(f"explain/{plugin}")[0]
    for when in ("before", "after"):
        assert "engine: torch's " + ("Distributed" if plugin == "ddp" else f"FSDP2 ({plugin})") in said[when]
        assert "bytes per parameter" in said[when]
        assert ("no CUDA graphs of blocks: FSDP2 gathers" in said[when]) == (plugin != "ddp")
        assert ("CUDA graphs: on GPUs" in said[when]) == (plugin == "ddp")
    assert "over 2 processes" in said["after"]
    assert "over 2 processes" not in said["before"]


@pytest.mark.parametrize("plugin", DIVIDING)
def test_inference_between_backward_and_step_leaves_nothing_gathered(plugin):
    for found in of(f"inference/{plugin}"):
        assert found["outputs"] <= 1e-12
        assert found["gathered"] == 0
        if plugin in ("zero2", "gemini"):
            check(found["trained"])


@pytest.mark.parametrize("plugin", DIVIDING)
def test_parameters_written_between_forwards_are_seen(plugin):
    assert max(of(f"written between/{plugin}")) <= 1e-12


@pytest.mark.parametrize("plugin", DIVIDING)
def test_bf16_gathers_are_what_autocast_computes_with(plugin):
    for difference, lower in of(f"bf16 gathers/{plugin}"):
        assert difference == 0
        assert lower


@pytest.mark.parametrize("plugin", DIVIDING)
def test_restore_of_a_divided_model_says_what_to_do(plugin):
    for said in of(f"no restore/{plugin}"):
        assert re.search(rf"plugin='{plugin}' divided its parameters.*full_state_dict=True.*plain model", said)


def test_restore_takes_ddp_off():
    assert all(of("restore"))


def test_every_process_starts_from_the_first_ones_values():
    for errors in of("different seeds"):
        assert max(error for error, _ in errors) <= 1e-10


@pytest.mark.parametrize("plugin", ["zero3"])
def test_two_nodes_of_two_processes(plugin):
    for placements, errors in of(f"nodes/{plugin}", 4):
        assert placements == "(Replicate(), Shard(dim=0))"
        check(errors)


def test_uneven_nodes_are_not_told_apart():
    for text in of("uneven nodes", 4):
        assert "divided over 4 processes (cpu); nodes have different numbers of processes" in text


def test_no_sync_spares_what_it_says():
    for found in of("no_sync"):
        assert found["ddp"]["inside"] >= 10
        assert found["ddp"]["outside"] == 0
        assert found["zero1"]["inside"] == 0 < found["zero1"]["outside"]
        assert found["zero1"]["gathers"] == found["zero2"]["gathers"] == 0
        for plugin in ("zero2", "zero3", "gemini"):
            assert found[plugin]["inside"] == found[plugin]["outside"] > 0
        assert found["zero3"]["gathers"] == found["gemini"]["gathers"] > 0


def test_keys_and_frozen_parameters_stay_and_the_rest_is_halved():
    for found in of("names"):
        for plugin in DIVIDING:
            *rest, part = found[plugin]
            assert rest == [True, ["pos_embed"], True], plugin
            assert 0.49 < part < 0.51


SAID = {
    "wrapped": r"plugin: got 'zero3' for a model inside DistributedDataParallel; allowed: the model itself",
    "compiled": r"plugin: got 'zero3' for a model inside OptimizedModule",
    "tied": r"'blocks.1.attn.proj.weight' and 'blocks.0.attn.proj.weight' are one parameter.*plugin='ddp'",
    "bf16": r"reduction: got 'bf16' with plugin='ddp' for a model on cpu; allowed: on GPUs",
    "frozen": r"plugin: got 'zero3' for a model without trainable parameters",
    "frozen ddp": r"plugin: got 'ddp' for a model without trainable parameters",
    "others": r"optimizer: its group 0 holds a parameter of shape \(3,\) that is not the model's",
    "state": r"optimizer: the state of 'x_embedder.proj.weight' \(.*row_var.*\) can't be divided",
    "kept elsewhere": r"optimizer: SGD.by_name holds parameters of the model besides its groups",
    "again": r"already accelerated",
    "by hand": r"model: got one that was sharded by hand",
    "dropped": r"the wrapper that accelerate returned is gone",
}


def test_what_is_refused():
    for said in of("refusals"):
        for what, pattern in SAID.items():
            assert re.search(pattern, said[what]), f"{what}: {said[what]}"
