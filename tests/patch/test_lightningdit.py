"""What is particular to models in the shape of hustvl/LightningDiT."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendit
from opendit.config import BoosterConfig
from opendit.kernels import qk_norm_rope as kernel
from opendit.patch import registry, rms_norm
from opendit.patch.core import notes
from opendit.patch.planner import Planner
from opendit.patch.registry import resolve
from opendit.patch.spreading import plan_spread
from opendit.plan import plan_for
from tests.comparing import build, relative_errors, run, twin, worst
from tests.tiny_models import (
    TINY,
    LightningAttention,
    LightningBlock,
    LightningRMSNorm,
    LightningRope,
    UserDiT,
    UserLightningDiT,
    randomise,
)

BY_NAME = {t.name: t for t in TINY if t.family == "lightningdit"}
PUBLISHED, QK = BY_NAME["lightningdit"], BY_NAME["lightningdit-qk-norm"]
F64 = torch.float64
each_variant = pytest.mark.parametrize("tiny", BY_NAME.values(), ids=BY_NAME.keys())


class Single(LightningRMSNorm):
    """Upstream's: in fp32 whatever comes."""

    def forward(self, x):
        return super().forward(x.float()).type_as(x) if x.dtype == F64 else super().forward(x)


def single(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is LightningRMSNorm:
            module.__class__ = Single
    return model


def explained(model: nn.Module, **options) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text, **options)
    return text.getvalue()


def said_while_running(model: nn.Module) -> list[str]:
    return [what for _, what in notes(model)]


# -- which model is whose ----------------------------------------------------------------------------------------------


def test_lightningdit_and_dit_are_told_apart():
    assert resolve(UserLightningDiT()).name == resolve(UserLightningDiT(use_rope=True)).name == "lightningdit"
    assert resolve(UserDiT()).name == "dit"
    model = UserLightningDiT()
    del model.feat_rope  # then it is a DiT with blocks of its own
    assert resolve(model).name == "dit"


def test_what_it_lacks_is_said():
    model = UserLightningDiT()
    del model.final_layer
    with pytest.raises(ValueError, match="Nearest: lightningdit, but it does not hold that it has x_embedder"):
        opendit.accelerate(model)


# -- the fused forwards are the ones that run --------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_nothing_falls_through(tiny, dtype):
    model = opendit.accelerate(build(tiny, dtype))
    run(model, tiny)
    assert not said_while_running(model)


@each_variant
def test_guided_sampling(tiny):
    model = build(tiny, F64).eval()
    (x, t, y), _ = tiny.inputs(F64, torch.device("cpu"))
    args = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y.new_full(y.shape, 5)]), 3.0
    with torch.no_grad():
        expected = model.forward_with_cfg(*args)
        found = opendit.accelerate(model).forward_with_cfg(*args)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_plain_blocks_can_be_one_function():
    assert "blocks are one function each where" in explained(UserLightningDiT())
    assert "in parts, not one function: it has no shifts" in explained(UserLightningDiT(wo_shift=True))
    for options, reason in [({"use_rope": True}, "turned"), ({"use_swiglu": True}, "gated")]:
        with pytest.raises(ValueError, match=f"fusion: got 'block'.*{reason}"):
            opendit.accelerate(UserLightningDiT(**options), {"fusion": "block"})


# -- norms -------------------------------------------------------------------------------------------------------------


def test_norms_that_compute_in_fp32_whatever_comes():
    """In fp64 they round where upstream's do; norms of q and k see other layouts there, which fp32's sums feel."""
    for tiny, allowed in ((PUBLISHED, 1e-10), (QK, 1e-6)):
        model = single(build(tiny, F64))
        fast = opendit.accelerate(twin(model))
        assert type(fast.blocks[0].norm1)._opendit_mixin is rms_norm.SinglePrecisionRMSNorm
        error, name = worst(run(fast, tiny), run(model, tiny))
        assert error <= allowed, name
        assert not said_while_running(fast)
        model, fast = model.float(), opendit.accelerate(twin(model).float())
        assert worst(run(fast, tiny), run(model, tiny))[0] <= 1e-5


def test_in_fp64_their_rounding_is_kept():
    """The fused formula in full fp64 would be off by fp32's rounding: it must not have run."""
    model = single(build(PUBLISHED, F64))
    exact = build(PUBLISHED, F64)
    difference = worst(run(exact, PUBLISHED), run(model, PUBLISHED))[0]
    assert difference > 1e-9


def test_a_norm_replaced_since():
    for part in ("norm2", "attn.k_norm"):
        model = build(QK, F64)
        reference = twin(model)
        opendit.accelerate(model)
        for m in (model, reference):
            owner = m.blocks[1].get_submodule(part.rpartition(".")[0]) if "." in part else m.blocks[1]
            width = len(m.blocks[1].get_submodule(part).weight)
            torch.manual_seed(5)
            setattr(owner, part.rpartition(".")[2], randomise(nn.LayerNorm(width)).to(F64))
        assert worst(run(model, QK), run(reference, QK))[0] <= 1e-10, part


@pytest.mark.parametrize("part", ["blocks.1.norm1", "blocks.1.attn.q_norm", "final_layer.norm_final", "feat_rope"])
def test_hooks_put_on_since_are_called(part):
    model = build(QK, F64)
    reference = twin(model)
    opendit.accelerate(model)
    before = run(model, QK)["output"]
    for m in (model, reference):
        m.get_submodule(part).register_forward_hook(lambda module, args, out: out * 1.5)
    found, expected = run(model, QK), run(reference, QK)
    assert not torch.allclose(found["output"], before)
    assert worst(found, expected)[0] <= 1e-10


@pytest.mark.parametrize("part", ["blocks.1.norm1", "feat_rope"])
def test_hooks_put_on_before_keep_it_as_it_was(part):
    model = build(QK, F64)
    model.get_submodule(part).register_forward_hook(lambda module, args, out: out * 1.5)
    expected = run(model, QK)
    opendit.accelerate(model)
    assert "hooks or another forward are registered on it" in explained(model)
    assert worst(run(model, QK), expected)[0] <= 1e-10


def test_eps_and_switches_are_read_when_it_runs():
    model = build(PUBLISHED, F64)
    reference = twin(model)
    opendit.accelerate(model)
    for m in (model, reference):
        m.blocks[0].norm1.eps = 0.3
        m.blocks[1].wo_shift = True
        m.blocks[1].adaLN_modulation[1] = randomise(nn.Linear(48, 192)).to(F64)
    assert worst(run(model, PUBLISHED), run(reference, PUBLISHED))[0] <= 1e-10
    assert not said_while_running(model)


def test_copies_and_pickles_still_know_their_norms_and_rotation():
    model = opendit.accelerate(build(QK))
    for module in model.modules():
        module._forward_pre_hooks.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(other, QK)
        assert not said_while_running(other)
        opendit.restore(other)
        assert type(other.feat_rope) is LightningRope
        assert type(other.blocks[0].attn.q_norm) is LightningRMSNorm


# -- rotation ----------------------------------------------------------------------------------------------------------


def test_another_rotation_given_later_is_upstreams():
    model = build(PUBLISHED, F64)
    reference = twin(model)
    opendit.accelerate(model)
    for m in (model, reference):
        m.feat_rope = LightningRope(6, 3).to(F64)
        m.feat_rope.freqs_sin.mul_(0.5)
    assert worst(run(model, PUBLISHED), run(reference, PUBLISHED))[0] <= 1e-10
    assert any("a rotation that was not looked at" in what for what in said_while_running(model))


def test_tables_changed_in_place_are_read():
    model = build(PUBLISHED, F64)
    reference = twin(model)
    opendit.accelerate(model)
    for m in (model, reference):
        m.feat_rope.freqs_sin.mul_(0.5)
    assert worst(run(model, PUBLISHED), run(reference, PUBLISHED))[0] <= 1e-10
    assert not said_while_running(model)


def test_a_table_for_other_tokens_is_upstreams_error():
    model = opendit.accelerate(UserLightningDiT(use_rope=True))
    x, c = torch.randn(2, 4, 48), torch.randn(2, 48)
    with pytest.raises(RuntimeError, match="must match the size"):
        model.blocks[0](x, c, model.feat_rope)


def test_called_without_its_rotation():
    model = build(PUBLISHED, F64)
    x, c = torch.randn(2, 4, 48, dtype=F64), torch.randn(2, 48, dtype=F64)
    expected = model.blocks[0](x, c)
    opendit.accelerate(model)
    torch.testing.assert_close(model.blocks[0](x, c), expected, rtol=1e-10, atol=1e-10)


def test_an_odd_head_is_left():
    normalised = UserLightningDiT(dim=45, heads=3, use_qknorm=True)
    assert "its heads are 15 wide, an odd number" in explained(normalised)
    assert "an odd number" not in explained(UserLightningDiT(dim=45, heads=3))


def test_positions_of_a_part():
    """Rows from any token on; what is past the end is padding."""
    rope = LightningRope(6, 3)
    planner = Planner()
    model = UserLightningDiT(use_rope=True)
    registry.named("lightningdit", model).plan(model, planner)
    model = opendit.accelerate(model)
    cos, sin = model.feat_rope.rows(5, 6)
    assert torch.equal(cos, torch.cat([rope.freqs_cos[5:], torch.zeros(2, 12)]))
    assert torch.equal(sin, torch.cat([rope.freqs_sin[5:], torch.zeros(2, 12)]))
    assert not model.feat_rope.rows(12, 3)[0].any()


def test_sequences_are_not_spread_where_the_rotation_is_unknown():
    class Odd(LightningRope):
        def forward(self, t):
            return 2 * super().forward(t)

    model = UserLightningDiT(use_rope=True)
    model.feat_rope.__class__ = Odd
    family, planner = resolve(model), Planner()
    family.plan(model, planner)
    with pytest.raises(ValueError, match=r"sp_size: the tokens of blocks.0.attn can't be spread.*rotation.*not known"):
        plan_spread(planner, model, family)


# -- what else a model may do ------------------------------------------------------------------------------------------


def test_reentrant_checkpointing():
    """As upstream's `use_checkpoint` has it: the rotation is an argument of the checkpointed block."""

    class Checkpointed(UserLightningDiT):
        def forward(self, x, t, y):
            x = self.x_embedder(x) + self.pos_embed
            c = self.t_embedder(t) + self.y_embedder(y, self.training)
            for block in self.blocks:
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=True)
            return self.unpatchify(self.final_layer(x, c))

    model = build(PUBLISHED, F64)
    expected = run(model, PUBLISHED)
    opendit.accelerate(model)
    model.__class__ = Checkpointed
    assert relative_errors(run(model, PUBLISHED), expected).keys() == expected.keys()
    assert worst(run(model, PUBLISHED), expected)[0] <= 1e-10


def test_forwards_under_compile_are_looked_at_as_they_are_written():
    """Upstream puts torch.compile on its forwards. To plan compiles nothing; what is fused stands in their place."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Compiled(LightningBlock):
        forward = torch.compile(LightningBlock.forward, backend=backend)

    model = build(PUBLISHED, F64)
    expected = run(model, PUBLISHED)
    for block in model.blocks:
        block.__class__ = Compiled
    opendit.accelerate(model)
    assert not compiled
    assert worst(run(model, PUBLISHED), expected)[0] <= 1e-10
    assert not compiled
    opendit.restore(model)
    torch.compiler.reset()
    assert worst(run(model, PUBLISHED), expected)[0] <= 1e-10
    assert compiled


def test_dropout_in_attention_is_left():
    model = build(PUBLISHED)
    model.blocks[0].attn.attn_drop.p = 0.1
    assert "dropout active in attention (p=0.1)" in explained(model)
    model = opendit.accelerate(build(PUBLISHED))
    model.blocks[0].attn.attn_drop.p = 0.1
    run(model, PUBLISHED)
    assert any("dropout active in attention" in what for what in said_while_running(model))


def test_attention_of_another_shape_is_left():
    class WithMask(LightningAttention):
        def forward(self, x, rope=None, mask=None):
            return super().forward(x, rope)

    model = build(PUBLISHED)
    model.blocks[0].attn.__class__ = WithMask
    assert "it is not built like LightningDiT's" in explained(model)


def test_kernels_by_name():
    plan = plan_for(UserLightningDiT(), BoosterConfig())
    assert all("qk_norm_rope" not in edit.mixin.uses for edit in plan.edits)
    with pytest.raises(ValueError, match="nothing in this model would use swiglu"):
        opendit.accelerate(UserLightningDiT(), {"kernels": {"swiglu": "reference"}})
    opendit.accelerate(PUBLISHED.build(), {"kernels": {"swiglu": "reference", "qk_norm_rope": "reference"}})


def test_q_and_k_go_through_the_kernel_once(monkeypatch):
    """One pass a block for norms and rotation together, in the dtype that attention reads."""
    calls = []
    original = kernel.qk_norm_rope_reference

    def counted(*args, **options):
        out = original(*args, **options)
        calls.append((options["norm"], options["cos"] is not None, out[0].dtype))
        return out

    monkeypatch.setattr(kernel, "qk_norm_rope_reference", counted)
    for tiny, norm in ((PUBLISHED, None), (QK, "rms"), (BY_NAME["lightningdit-layernorm"], "layer")):
        model = opendit.accelerate(build(tiny))
        calls.clear()
        run(model, tiny, autocast=torch.bfloat16)
        assert calls == [(norm, True, torch.bfloat16)] * 2


def test_as_any_model():
    """Its gated MLPs are recognised anywhere; attention that is given a rotation runs its own forward then."""
    model = build(PUBLISHED, F64)
    expected = run(model, PUBLISHED)
    opendit.accelerate(model, family="generic")
    assert "blocks.{0-1}.mlp (2): SiLU(a) · b: one pass" in explained(model)
    assert worst(run(model, PUBLISHED), expected)[0] <= 1e-10
