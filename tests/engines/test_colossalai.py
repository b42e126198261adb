"""ColossalAI's Booster under the plain loop; where it is not installed, what is said then."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import opendit
from opendit.engines import colossalai as adapter
from opendit.engines import colossalai_gemini as gemini_adapter
from opendit.engines import colossalai_shared as shared
from tests.engines import on_colossalai
from tests.engines.training import check
from tests.launch import of_every_rank
from tests.tiny_models import UserDiT

ROOT = Path(__file__).parent.parent.parent
installed = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is None,
    reason="ColossalAI is not installed: pip install --no-deps -r requirements-colossalai.txt",
)
PLUGINS = ("ddp", "zero1", "zero2")


def outcome(case: str, world: int = 2) -> list:
    return of_every_rank("tests.engines.on_colossalai", world, case, limit=600)


@installed
@pytest.mark.parametrize("case", [c for c in on_colossalai.cases(2) if c.startswith("parity/")])
def test_as_one_device(case: str):
    for errors in outcome(case):
        check(errors)
        assert errors["given"]
        assert errors["kind"] == "AdamW"


@installed
@pytest.mark.slow
@pytest.mark.parametrize("case", list(on_colossalai.cases(4)))
def test_as_one_device_over_four(case: str):
    for errors in outcome(case, 4):
        check(errors)


@installed
@pytest.mark.parametrize("plugin", on_colossalai.ZERO)
def test_whatever_a_loop_does_to_gradients(plugin: str):
    for loops in outcome(f"loops/{plugin}"):
        assert len(loops) == len(on_colossalai.LOOPS)
        for loop, (error, name) in loops.items():
            assert error <= 1e-9, f"{loop}: {name} is off by {error}"


@installed
@pytest.mark.parametrize("plugin", PLUGINS)
def test_steps_taken_before_are_carried_on(plugin: str):
    for error, name in outcome(f"started/{plugin}"):
        assert error <= 1e-9, name


@installed
@pytest.mark.parametrize("plugin", on_colossalai.ZERO)
def test_optimizer_states_come_and_go_whole_and_in_pieces(plugin: str):
    for found in outcome(f"state/{plugin}"):
        assert found["moments"][0] <= 1e-12, found["moments"]
        assert found["len"]
        assert found["same"] == [True, True, True]
        assert found["kept"] == {"betas": (0.8, 0.9)}
    assert outcome(f"pieces/{plugin}") == [True, True]


@installed
@pytest.mark.parametrize("plugin", on_colossalai.ZERO)
def test_everyone_begins_as_the_first_process(plugin: str):
    assert outcome(f"seeds/{plugin}") == [0.0, 0.0]


@installed
@pytest.mark.parametrize("plugin", on_colossalai.ZERO)
def test_bf16_reduction_rounds_gradients(plugin: str):
    for error, _ in outcome(f"bf16 reduction/{plugin}"):
        assert 1e-4 < error < 4e-3


@installed
@pytest.mark.parametrize("plugin", PLUGINS)
def test_explain_says_what_it_is_on(plugin: str):
    for text in outcome(f"explain/{plugin}"):
        assert text.count("bytes per parameter of n bytes") == 2  # planned, and done
        assert "over 2 processes, gloo" in text
        assert ("TorchDDPPlugin" if plugin == "ddp" else f"LowLevelZeroPlugin, stage {plugin[-1]}") in text


@installed
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("none", "ValueError: optimizer: got none with plugin='zero1'"),
        ("some", "optimizer: got one without"),
        ("shaped", "optimizer: got Adafactor with plugin='zero2'"),
        ("bf16", "got trainable parameters in bfloat16 with plugin='zero1'; allowed: all in one of float32, float64"),
        ("zero3", "plugin: got 'zero3' with engine='colossalai'; allowed with it: 'ddp', 'gemini', 'zero1', 'zero2'"),
        ("gemini fp32", "precision: got 'inherit' with ColossalAI's 'gemini'"),
        ("gemini reduction", "reduction: got 'fp32' with ColossalAI's 'gemini'"),
        ("gemini optimizer", "optimizer: got SGD with ColossalAI's 'gemini'; allowed: CPUAdam, FusedAdam, HybridAdam"),
        ("frozen", "optimizer: its group 0 holds no parameter that needs gradients"),
        ("step inside", "RuntimeError: optimizer: step was called while gradients are not averaged yet"),
        ("step after", "RuntimeError: optimizer: step was called while gradients are not averaged yet"),
        ("copied", "can't be copied or pickled"),
        ("group", "optimizer: groups can't be added"),
        ("params", "optimizer: parameters of a group can't be changed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(case: str, says: str):
    for messages in outcome("refusals"):
        assert says in messages[case]


@installed
def test_restore_takes_ddp_off_and_refuses_what_is_divided():
    for found in outcome("restore"):
        assert found["ddp"] == "UserDiT"
        assert "placed by ColossalAI's 'zero2', which can't be undone" in found["zero2"]


@installed
@pytest.mark.parametrize("plugin", on_colossalai.ZERO)
def test_models_are_let_go_of(plugin: str):
    assert outcome(f"let go/{plugin}") == [True, True]


@installed
@pytest.mark.parametrize("plugin", on_colossalai.ZERO)
def test_a_nan_in_one_process_skips_the_step_on_all(plugin: str):
    assert outcome(f"nan/{plugin}") == [[], []]


@installed
def test_no_class_is_changed():
    assert outcome("classes") == [True, True]


@installed
@pytest.mark.parametrize("case", ["gemini", "gemini sp"])
def test_gemini_is_as_far_from_fp32_as_bf16_is(case: str):
    for found in outcome(case):
        assert max(found["losses"]) < 0.05
        assert max(found["norms"]) < 0.05
        assert max(found["gradients"]) < 0.06
        assert found["parameters"] < 0.005
        assert found["moments"] < 0.04
        assert found["rate"]
        assert "step was called before a backward" in found["without backward"]


@installed
@pytest.mark.parametrize("case", [c for c in on_colossalai.cases(2) if c.startswith("mutant/")])
def test_errors_are_seen(case: str):
    assert max(outcome(case)) > (0.1 if "gemini" in case else 1e-4)


@pytest.fixture
def not_imported(monkeypatch: pytest.MonkeyPatch):
    """As if nothing had imported ColossalAI yet."""
    for name in [n for n in sys.modules if n.split(".")[0] == "colossalai"]:
        monkeypatch.delitem(sys.modules, name)
    shared.colossalai.cache_clear()
    yield monkeypatch
    shared.colossalai.cache_clear()


def _accelerate(plugin: str) -> None:
    model = UserDiT()
    factory = functools.partial(torch.optim.AdamW, lr=1e-3)
    before = type(model.blocks[0])
    try:
        opendit.accelerate(model, {"plugin": plugin, "engine": "colossalai"}, optimizer=factory)
    finally:
        assert type(model.blocks[0]) is before
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("plugin", [*PLUGINS, "gemini"])
def test_where_it_is_missing_the_error_has_the_line_that_installs_it(plugin: str, not_imported):
    not_imported.setitem(sys.modules, "colossalai", None)
    with pytest.raises(ImportError, match=r"engine: got 'colossalai'.*Install it with: ") as raised:
        _accelerate(plugin)
    assert shared.INSTALL in str(raised.value)


def test_a_missing_package_that_it_needs_is_named(not_imported):
    not_imported.setitem(sys.modules, "colossalai", _package("0.5.0"))
    not_imported.setitem(sys.modules, "colossalai.accelerator", None)
    with pytest.raises(ImportError, match=r"colossalai\.accelerator\S* is missing") as raised:
        shared.colossalai()
    assert shared.INSTALL in str(raised.value)


def test_another_version_is_refused(not_imported):
    package = _package("0.3.8")
    for name in ("accelerator", "accelerator.cpu_accelerator", "booster", "booster.plugin", "zero", "zero.low_level"):
        not_imported.setitem(sys.modules, f"colossalai.{name}", types.ModuleType(name))
    not_imported.setitem(sys.modules, "colossalai", package)
    with pytest.raises(ImportError, match=r"found ColossalAI 0\.3\.8; allowed: 0\.5\.0") as raised:
        shared.colossalai()
    assert shared.INSTALL in str(raised.value)


def test_an_incompatible_one_is_an_error_of_the_same_kind(not_imported, tmp_path):
    (tmp_path / "colossalai").mkdir()
    (tmp_path / "colossalai" / "__init__.py").write_text("import torch\ntorch.no_such_thing\n")
    not_imported.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"AttributeError.*no_such_thing") as raised:
        shared.colossalai()
    assert shared.INSTALL in str(raised.value)


def _package(version: str) -> types.ModuleType:
    package = types.ModuleType("colossalai")
    package.__version__ = version  # type: ignore[attr-defined]
    package.__path__ = []  # type: ignore[attr-defined]
    return package


def test_the_install_line_and_the_requirements_agree():
    lines = [line for line in (ROOT / "requirements-colossalai.txt").read_text().splitlines() if line[:1] not in "#"]
    assert lines == [f"colossalai=={shared.VERSION}"]
    assert lines[0] in shared.INSTALL
    assert shared.INSTALL in (ROOT / "docs" / "engines.md").read_text()


def test_its_loading_is_never_called():
    """Its checkpoints are pickles."""
    for module in (adapter, gemini_adapter):
        tree = ast.parse(Path(module.__file__).read_text())
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not {n for n in names if n.startswith(("load", "save")) or "checkpoint" in n}
