"""What is particular to models in the shape of facebookresearch/DiT."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from torch import nn

import opendit
from tests.comparing import build, relative_errors, run, twin, worst
from tests.patch.test_families import total
from tests.tiny_models import TINY, Block, Tiny, UserDiT, modulate, randomise

DIT = TINY[0]


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def test_forward_with_cfg():
    model = randomise(UserDiT()).eval()
    (x, t, y), _ = DIT.inputs(torch.float32, torch.device("cpu"))
    x, t, y = x[:2], t[:2], y[:2]
    expected = model.forward_with_cfg(x, t, y, 3.0)
    opendit.accelerate(model)
    torch.testing.assert_close(model.forward_with_cfg(x, t, y, 3.0), expected)


def test_bfloat16_weights_run_where_upstreams_break():
    model = randomise(UserDiT()).bfloat16()
    (x, t, y), _ = DIT.inputs(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="dtype"):
        model(x, t, y)
    assert opendit.accelerate(model)(x, t, y).dtype == torch.bfloat16


def test_active_attention_dropout_is_left_to_upstream():
    model = opendit.accelerate(randomise(UserDiT(attn_drop=0.1)))
    assert "dropout active in attention (p=0.1)" in explained(model)
    reference = opendit.restore(twin(model))
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_a_scale_changed_later_is_honoured():
    tiny = Tiny("old timm", "dit", lambda: UserDiT(timm="old"), DIT.inputs)
    model = build(tiny)
    reference = twin(model)
    opendit.accelerate(model)
    for block in (*model.blocks, *reference.blocks):
        block.attn.scale = 0.9
    assert worst(run(model, tiny), run(reference, tiny))[0] <= 1e-5
    assert "its scale is not 1/√K" in explained(model)


def test_attention_compiles_with_dynamic_shapes():
    attn = opendit.accelerate(randomise(UserDiT(timm="old"))).blocks[0].attn
    compiled = torch.compile(attn, fullgraph=True, dynamic=True, backend="eager")
    for length in (5, 9):
        x = torch.randn(2, length, attn.proj.in_features)
        torch.testing.assert_close(compiled(x), attn(x))


def test_blocks_compiled_one_by_one_before_are_fused_and_stay_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build(DIT)
    expected = run(model, DIT)
    for part in (*model.blocks, *(block.mlp for block in model.blocks)):
        part.compile(fullgraph=True, backend=backend)
    compiled = [block._compiled_call_impl for block in model.blocks]
    plan = opendit.explain(opendit.accelerate(model), file=io.StringIO())
    assert {"blocks.0", "blocks.1", "blocks.0.mlp"} <= {edit.fqn for edit in plan.edits}
    assert worst(run(model, DIT), expected)[0] <= 1e-5
    assert graphs
    opendit.restore(model)
    assert [block._compiled_call_impl for block in model.blocks] == compiled
    assert worst(run(model, DIT), expected)[0] <= 1e-6


def test_dropout_switched_on_later_is_honoured(caplog):
    model = build(DIT)
    reference = twin(model)
    opendit.accelerate(model)
    for block in (*model.blocks, *reference.blocks):
        block.attn.attn_drop.p = 0.5
    with caplog.at_level(logging.WARNING, "opendit"):
        assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5
        run(model, DIT)
    assert len(caplog.records) == len(model.blocks)
    assert "dropout active in attention" in explained(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"gated": True}, "gates its output"), ({"scale_norm": True}, "normalises its output")],
)
def test_extensions_of_attention_that_are_left_alone(options, reason):
    model = randomise(UserDiT(**options))
    reference = twin(model)
    opendit.accelerate(model)
    assert reason in explained(model)
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_mask_is_honoured():
    model = build(DIT)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    x = torch.randn(2, 9, 48)
    expected = model.blocks[0].attn(x, attn_mask=mask)
    causal = model.blocks[0].attn(x, None, True)
    plain = model.blocks[0].attn(x)
    opendit.accelerate(model)
    torch.testing.assert_close(model.blocks[0].attn(x, attn_mask=mask), expected, rtol=0, atol=0)
    torch.testing.assert_close(model.blocks[0].attn(x, None, True), causal, rtol=0, atol=0)
    torch.testing.assert_close(model.blocks[0].attn(x, attn_mask=None, is_causal=False), plain)
    assert "a mask or another argument was given" in explained(model)


def test_hook_on_a_norm_registered_before_is_kept():
    model = build(DIT)
    model.blocks[1].norm1.register_forward_hook(lambda m, a, out: out * 2)
    reference = twin(model)
    opendit.accelerate(model)
    assert "hooks or another forward are registered" in explained(model)
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_hook_on_a_norm_registered_after_is_called():
    model = build(DIT)
    reference = twin(model)
    opendit.accelerate(model)
    for m in (model, reference):
        m.blocks[1].norm2.register_forward_hook(lambda m, a, out: out * 2)
        m.final_layer.norm_final.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5
    assert "something was put on or in place of its norms" in explained(model)


class Causal(Block):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a), is_causal=True)
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class Scaled(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.residual_scale = 1.0

    def forward(self, x, c):
        return x + self.residual_scale * (super().forward(x, c) - x)


class Buffered(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("alpha", torch.tensor(0.5))

    def forward(self, x, c):
        return x + self.alpha * (super().forward(x, c) - x)


class SwappedChunks(Block):
    def forward(self, x, c):
        scale_a, shift_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class StoppedGradient(Block):
    def forward(self, x, c):
        return super().forward(x, c.detach())


class ExtraArgument(Block):
    def forward(self, x, c, mask=None):
        return super().forward(x, c)


class NoisyInTraining(Block):
    def forward(self, x, c):
        return super().forward(x + torch.randn_like(x) if self.training else x, c)


class ExtraNorm(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.norm3 = nn.LayerNorm(48)


class NoPlusOne(Block):
    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(self.norm1(x) * scale_a.unsqueeze(1) + shift_a.unsqueeze(1))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


@pytest.mark.parametrize(
    "kind",
    [SwappedChunks, StoppedGradient, ExtraArgument, NoisyInTraining, ExtraNorm, NoPlusOne, Causal, Scaled, Buffered],
)
def test_blocks_that_only_resemble_are_left_alone(kind):
    model = UserDiT()
    odd = kind(48, model.blocks[1].attn)
    model.blocks[1] = odd
    randomise(model)
    reference = twin(model)
    opendit.accelerate(model)
    assert type(model.blocks[1]) is kind
    assert type(model.blocks[0]) is not Block
    assert "blocks.1:" in explained(model)
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_buffers_are_part_of_what_makes_blocks_alike():
    model = UserDiT()
    for i in range(2):
        model.blocks[i] = Buffered(48, model.blocks[i].attn)
    model.blocks[0].alpha.fill_(1.0)
    randomise(model)
    reference = twin(model)
    opendit.accelerate(model)
    assert type(model.blocks[1]) is Buffered
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_attention_that_changes_with_length_is_left_alone():
    model = UserDiT()

    class Windowed(type(model.blocks[0].attn)):
        def forward(self, x, attn_mask=None, is_causal=False):
            if x.shape[1] <= 8:
                return super().forward(x)
            return torch.cat([super(Windowed, self).forward(part) for part in x.split(8, dim=1)], dim=1)

    model.blocks[0].attn.__class__ = Windowed
    reference = twin(randomise(model))
    opendit.accelerate(model)
    assert type(model.blocks[0].attn) is Windowed
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


class DoublingNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["class", "forward", "module"])
def test_norm_changed_later_is_honoured(change):
    model = build(DIT)
    reference = twin(model)
    opendit.accelerate(model)
    for m in (model, reference):
        norm = m.blocks[0].norm1
        if change == "class":
            norm.__class__ = DoublingNorm
        elif change == "forward":
            norm.forward = lambda x, inner=norm.forward: 2 * inner(x)
        else:
            m.blocks[0].norm1 = nn.Identity()
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_hook_on_the_attention_weights_registered_after_is_called():
    tiny = next(t for t in TINY if t.name == "dit-old-timm")
    model = opendit.accelerate(build(tiny))
    seen = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    run(model, tiny)
    assert seen == [(3, 4, 9, 9)]


def test_arguments_by_upstreams_names():
    class Named(Block):
        def forward(self, tokens, cond):
            return super().forward(tokens, cond)

    model = UserDiT()
    model.blocks[0] = Named(48, model.blocks[0].attn)
    randomise(model)
    x, c = torch.randn(2, 9, 48), torch.randn(2, 48)
    expected = model.blocks[0](x, cond=c)
    opendit.accelerate(model)
    assert type(model.blocks[0]) is not Named
    torch.testing.assert_close(model.blocks[0](x, cond=c), expected)
    torch.testing.assert_close(model.blocks[0](cond=c, tokens=x), expected)
    with pytest.raises(TypeError, match="colour"):
        model.blocks[0](x, colour=c)


def test_one_condition_for_many_samples():
    model = build(DIT).eval()
    x, t, y = torch.randn(3, 4, 6, 6), torch.tensor([5]), torch.tensor([1])
    expected = model(x, t, y)
    opendit.accelerate(model)
    torch.testing.assert_close(model(x, t, y), expected)


class FullPrecisionMlp(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.inner(x)


def test_sublayers_that_switch_autocast_off_get_what_upstream_gives_them():
    model = UserDiT()
    model.blocks[0].mlp = FullPrecisionMlp(model.blocks[0].mlp)
    model.final_layer.linear = FullPrecisionMlp(model.final_layer.linear)
    randomise(model)
    reference = twin(model)
    opendit.accelerate(model)
    assert type(model.blocks[0]) is not Block
    truth = run(twin(reference), DIT)
    theirs = run(reference, DIT, autocast=torch.bfloat16)
    ours = run(model, DIT, autocast=torch.bfloat16)
    assert total(relative_errors(ours, truth)) <= 1.2 * total(relative_errors(theirs, truth))


def test_attention_that_switches_autocast_off_is_left_alone():
    model = UserDiT()

    class FullPrecision(type(model.blocks[0].attn)):
        def forward(self, x, attn_mask=None, is_causal=False):
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.float(), attn_mask, is_causal)

    model.blocks[0].attn.__class__ = FullPrecision
    opendit.accelerate(randomise(model))
    assert type(model.blocks[0].attn) is FullPrecision


def test_hooks_that_hold_anything_are_not_copied():
    import threading

    class Recorder:
        def __init__(self, model):
            self.model, self.lock, self.calls = model, threading.Lock(), 0

        def __call__(self, module, args, output):
            self.calls += 1

        def __deepcopy__(self, memo):
            raise AssertionError("a hook was copied")

    model = build(DIT)
    recorder = Recorder(model)
    model.blocks[0].register_forward_hook(recorder)
    model.blocks[0].mlp.register_forward_hook(recorder)
    opendit.accelerate(model)
    assert type(model.blocks[0]) is not Block
    assert recorder.calls == 0
    run(model, DIT)
    assert recorder.calls == 2


def test_attention_that_only_resembles_is_left_alone():
    model = UserDiT()
    attention = model.blocks[0].attn

    class Cosine(type(attention)):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(torch.nn.functional.normalize(x, dim=-1))

    attention.__class__ = Cosine
    randomise(model)
    reference = twin(model)
    opendit.accelerate(model)
    assert type(model.blocks[0].attn) is Cosine
    assert worst(run(model, DIT), run(reference, DIT))[0] <= 1e-5


def test_replaced_instance_forward_is_left_alone():
    model = build(DIT)
    inner = model.blocks[0].forward
    model.blocks[0].forward = lambda x, c: inner(x, c) * 2
    expected = run(model, DIT)
    opendit.accelerate(model)
    assert "replaced on the instance" in explained(model)
    assert worst(run(model, DIT), expected)[0] <= 1e-5


def test_planning_changes_neither_parameters_nor_the_random_state():
    model = build(DIT).eval()
    model.blocks[0].train()
    modes = [m.training for m in model.modules()]
    values = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    opendit.accelerate(model)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, values[name]) and p.grad is None for name, p in model.named_parameters())


def test_plain_layernorms_are_replaced_only_when_asked(interpreter):
    tiny = next(t for t in TINY if t.name == "dit-qk-norm")
    model = build(tiny)
    expected = run(model, tiny)
    kept = opendit.accelerate(twin(model))
    assert "a LayerNorm on its own stays torch's" in explained(kept)
    replaced = opendit.accelerate(twin(model), {"kernels": {"layernorm": "triton"}})
    assert type(replaced.blocks[0].attn.q_norm) is not nn.LayerNorm
    assert worst(run(replaced, tiny), expected)[0] <= 1e-5


def test_apex_is_refused_where_it_is_not_nvidias():
    with pytest.raises(ValueError, match=r"layernorm='apex' can't run here.*(apex|CUDA)"):
        opendit.accelerate(build(DIT), {"kernels": {"layernorm": "apex"}})
