from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from opendit import BoosterConfig


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BoosterConfig().kernels = "triton"


def test_a_mapping_is_as_good():
    assert BoosterConfig.of({"kernels": "reference"}) == BoosterConfig(kernels="reference")
    assert BoosterConfig.of(None) == BoosterConfig()
    cfg = BoosterConfig(attention="sdpa")
    assert BoosterConfig.of(cfg) is cfg


def test_keeps_its_own_copy_of_a_mapping():
    kernels = {"layernorm": "reference"}
    cfg = BoosterConfig(kernels=kernels)
    kernels["layernorm"] = "nonsense"
    assert cfg.kernels == {"layernorm": "reference"}


@pytest.mark.parametrize("recipe", ["train", "sample"])
def test_recipes(recipe):
    assert isinstance(BoosterConfig.of(recipe), BoosterConfig)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fusion", ["auto", "block", "adaln"]),
        ("precision", ["inherit", "bf16", "fp16", "fp32"]),
        ("residual", ["inherit", "fp32", "bf16"]),
        ("activation_checkpointing", [False, True, "selective", "full"]),
    ],
)
def test_every_choice_of_a_field_is_taken(name, values):
    assert [getattr(BoosterConfig.of({name: value}), name) for value in values] == values
    assert getattr(BoosterConfig(), name) is values[0]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, None),
        ({"precision": "bf16"}, 50),
        ({"ema": 0.9}, 50),
        ({"ema": 0.9, "skip_nonfinite": False}, None),
        ({"skip_nonfinite": True}, 50),
        ({"skip_nonfinite": 1}, 1),
    ],
)
def test_after_how_many_skipped_steps_to_stop(settings, limit):
    assert BoosterConfig(**settings).skips_in_a_row() == limit


def test_optimizer_may_be_instance_or_factory():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    assert BoosterConfig(optimizer=optimizer).optimizer is optimizer
    BoosterConfig(optimizer=partial(torch.optim.AdamW, lr=1e-4))


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ({"kernel": "auto"}, ValueError, r"unknown key 'kernel'; allowed: kernels.*mean 'kernels'"),
        ({"kernels": "cuda"}, ValueError, r"kernels: got 'cuda'; allowed: auto, triton, reference"),
        ({"kernels": 3}, TypeError, r"kernels: got 3"),
        ({"attention": None}, TypeError, r"attention: got None"),
        ({"compile": "yes"}, TypeError, r"compile: got 'yes'; allowed: True or False"),
        ({"precision": "bf61"}, ValueError, r"precision: got 'bf61'; allowed: 'inherit', 'bf16'"),
        (
            {"precision": "fp8", "engine": "colossalai", "plugin": "ddp"},
            ValueError,
            r"precision: got 'fp8' with engine='colossalai'; allowed: with engine='torch'",
        ),
        *[
            ({"skip_nonfinite": bad}, ValueError, rf"skip_nonfinite: got {bad!r}; allowed: True, False, None, or")
            for bad in (0, -3, "yes", 2.5)
        ],
        *[
            ({"sampling": True, "skip_nonfinite": some}, ValueError, rf"skip_nonfinite: got {some} with sampling")
            for some in (True, 3)
        ],
        ({"plugin": "deepspeed"}, ValueError, r"plugin: got 'deepspeed'"),
        ({"engine": "deepspeed"}, ValueError, r"engine: got 'deepspeed'; allowed: 'torch', 'colossalai'"),
        ({"engine": "colossalai"}, ValueError, r"engine: got 'colossalai' without a plugin"),
        ({"reduction": "bf16"}, ValueError, r"reduction: got 'bf16' without a plugin"),
        ({"timeout": 5.0}, ValueError, r"timeout: got 5.0 without a plugin"),
        ({"plugin": "ddp", "timeout": "5"}, TypeError, r"timeout: got '5'; allowed: seconds"),
        ({"plugin": "ddp", "timeout": 0}, ValueError, r"timeout: got 0; allowed: seconds above 0"),
        ({"regather_input": "yes"}, TypeError, "regather_input: got 'yes'; allowed: True or False"),
        (
            {"regather_input": True, "sequence_parallel": "ring"},
            ValueError,
            "regather_input: got True with sequence_parallel='ring'.*allowed: with 'auto' or 'fastseq'",
        ),
        ({"sequence_parallel": "ulises"}, ValueError, r"sequence_parallel: got 'ulises'; allowed: 'auto', 'fastseq'"),
        *[
            (
                {"activation_checkpointing": bad},
                ValueError,
                rf"activation_checkpointing: got {bad!r}; allowed: False, True, 'selective', 'full'$",
            )
            for bad in (0, 1, None, "all", "Full")
        ],
        *[
            ({"fusion": bad}, ValueError, rf"fusion: got {bad!r}; allowed: 'auto', 'block', 'adaln'$")
            for bad in ("whole", None, True)
        ],
        *[
            ({"residual": bad}, ValueError, rf"residual: got {bad!r}; allowed: 'inherit', 'fp32', 'bf16'$")
            for bad in ("fp16", None, torch.bfloat16)
        ],
        ({"ema": 1.5}, ValueError, r"ema: decays: got 1.5; allowed: numbers between 0 and 1"),
        ({"ema": "0.999"}, TypeError, r"ema: got '0.999'; allowed: a decay such as 0.9999, several, an opendit.EMA"),
        ({"optimizer": "adam"}, TypeError, r"optimizer: got str; allowed: a torch.optim.Optimizer, or a factory"),
        ("trian", ValueError, r"booster_cfg: got 'trian'; allowed recipes: train, sample.*'train'"),
        (7, TypeError, r"booster_cfg: got int"),
        (["train"], TypeError, r"booster_cfg: got list"),
    ],
)
def test_bad_settings_say_what_is_allowed(source, error, says):
    with pytest.raises(error, match=says):
        BoosterConfig.of(source)


def test_averages_of_bf16_copies_are_refused():
    with pytest.raises(ValueError, match=r"ema: got averages with ColossalAI's 'gemini'"):
        BoosterConfig(plugin="gemini", engine="colossalai", ema=0.9)
    BoosterConfig(plugin="gemini", ema=0.9)
    BoosterConfig(plugin="zero2", engine="colossalai", ema=0.9)
