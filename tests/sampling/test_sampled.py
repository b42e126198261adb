"""The recipe "sample": rounded weights and their way back, graphs of whole forwards, and where they stay away."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from torch import nn

import opendit
from opendit import BoosterConfig
from opendit.patch import forward_graph, lowered, sampled, steps
from tests.comparing import twin
from tests.sampling.drawing import euler, flow
from tests.sampling.replaying import use_replays
from tests.tiny_models import UserDiT, randomise

TIMES = [999.0, 500.0, 17.0]
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def inputs(seed: int = 0, rows: int = 3, device: str = "cpu"):
    x = torch.randn(rows, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    return x.to(device), torch.full((rows,), TIMES[0], device=device), torch.arange(rows, device=device)


def said(model: nn.Module) -> str:
    out = io.StringIO()
    opendit.explain(model, file=out)
    return out.getvalue()


def user_dit() -> nn.Module:
    return randomise(UserDiT(depth=3)).eval()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_weights_are_rounded_and_given_back_to_the_bit(device):
    model = user_dit().to(device)
    model.register_buffer("scale", torch.randn(3, device=device))
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opendit.accelerate(model, "sample")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.scale.dtype == torch.bfloat16
    opendit.restore(model)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].device == value.device
        assert torch.equal(after[name].view(torch.int32), value.view(torch.int32))


def test_a_weight_that_was_written_to_since_is_kept(caplog):
    model = opendit.accelerate(user_dit(), "sample")
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(3.0)
    opendit.restore(model)
    assert model.final_layer.linear.bias.dtype == torch.float32
    assert (model.final_layer.linear.bias == 3.0).all()
    assert "1 tensors were written to" in caplog.text


def _assigned(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(values, assign=True)


def _replaced(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data = values[name]


def _copied(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(values[name])


@pytest.mark.parametrize("write", [_assigned, _replaced, _copied])
def test_weights_that_were_written_to_where_no_version_tells_are_kept(write):
    model = opendit.accelerate(user_dit(), "sample")
    new = {name: (value.float() + 1).bfloat16() for name, value in model.state_dict().items()}
    write(model, {name: value.clone() for name, value in new.items()})
    opendit.restore(model)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, new[name].float()), name


def test_rounded_weights_in_another_dtype_are_given_back_to_the_bit():
    model = user_dit()
    with torch.no_grad():
        model.final_layer.linear.bias[0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    opendit.accelerate(model, "sample")
    model.float()
    opendit.restore(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name


def test_copies_compute_the_same_and_know_no_way_back():
    model = opendit.accelerate(user_dit(), "sample")
    other = copy.deepcopy(model)
    with torch.no_grad(), opendit.sampling(other, TIMES):
        assert torch.equal(other(*inputs()), model(*inputs()))
    with pytest.raises(ValueError, match="it is a copy of one whose weights were rounded"):
        opendit.restore(other)
    opendit.restore(model)


def test_a_failed_call_leaves_the_weights(monkeypatch):
    model = user_dit()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(opendit.api.training, "remember", _fail)
    monkeypatch.setattr(opendit.api, "Placed", _fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        opendit.accelerate(model, "sample")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_can_not_be_rounded_are_left(monkeypatch):
    model = user_dit()
    before, kind = copy.deepcopy(model.state_dict()), type(model)
    rounding, calls = lowered._set, [0]

    def failing(*args):
        calls[0] += 1
        rounding(*args) if calls[0] != 5 else _fail()

    monkeypatch.setattr(lowered, "_set", failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        opendit.accelerate(model, "sample")
    assert type(model) is kind
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def _fail(*_):
    raise RuntimeError("on purpose")


def test_it_computes_in_bf16_and_gives_what_it_was_given():
    plain = user_dit()
    model = opendit.accelerate(twin(plain), "sample")
    with torch.no_grad():
        out, wanted = model(*inputs()), plain(*inputs())
        # t = 999 is no bf16 number: were it rounded, the output would be that of t = 1000.
        rounded = plain(inputs()[0], torch.full((3,), 1000.0), inputs()[2])
    assert out.dtype == torch.float32
    assert (out - wanted).norm() / wanted.norm() < 0.02
    assert torch.equal(model.forward_with_cfg(*inputs(rows=4), 2.0), model.forward_with_cfg(*inputs(rows=4), 2.0))
    exact = opendit.accelerate(twin(plain).double(), {"sampling": True, "weights": "bf16"})
    with torch.no_grad():
        assert exact(inputs()[0].double(), *inputs()[1:]).dtype == torch.float64
    assert (rounded - wanted).norm() / wanted.norm() > 0


def test_training_is_refused():
    model = opendit.accelerate(user_dit(), "sample").train()
    with pytest.raises(ValueError, match="accelerated for sampling and is called in training mode"):
        model(*inputs())
    with pytest.raises(ValueError, match="optimizer: got function for a model that is to sample"):
        opendit.accelerate(user_dit(), "sample", optimizer=lambda p: torch.optim.AdamW(p))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "bf16"}, "weights: got 'bf16' without sampling"),
        ({"cfg_parallel": True}, "cfg_parallel: got True without sampling"),
        ({"sampling": True, "weights": "fp8"}, "weights: got 'fp8'; allowed: 'inherit', 'bf16', 'fp16'"),
        ({"sampling": True, "weights": "bf16", "precision": "bf16"}, "weights: got 'bf16' with precision='bf16'"),
        ({"sampling": True, "precision": "fp8"}, "precision: got 'fp8' with sampling=True"),
        ({"sampling": True, "ema": 0.9}, "ema: got"),
        ({"sampling": True, "plugin": "ddp"}, "plugin: got 'ddp' with sampling"),
        ({"sampling": True, "activation_checkpointing": "full"}, "activation_checkpointing: got 'full' with sampling"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ValueError, match=message):
        BoosterConfig(**settings)


def test_verify_is_for_what_trains():
    with pytest.raises(ValueError, match="booster_cfg: got sampling=True"):
        opendit.verify(user_dit(), inputs(), "sample")


def test_pairs_need_processes():
    with pytest.raises(ValueError, match="cfg_parallel: got True, but there is no process group"):
        opendit.accelerate(user_dit(), {"sampling": True, "cfg_parallel": True})


def test_a_graph_for_each_shape(monkeypatch):
    use_replays(monkeypatch)
    plain = user_dit()
    model = opendit.accelerate(twin(plain), {"sampling": True, "cuda_graphs": True})
    with torch.inference_mode():
        given = [inputs(seed, rows) for seed in range(4) for rows in (3, 2)]
        kept = [(model(*args), plain(*args)) for args in given]
    # What was handed out is the caller's: later replays leave it alone.
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in kept)
    graphs = sampled.kept_of(model).graphs
    assert (len(graphs.graphs), graphs.replays) == (2, 6)
    opendit.restore(model)
    assert sampled.kept_of(model).graphs.graphs == {}


def test_graphs_follow_the_parameters(monkeypatch):
    """Values that change in place are read where they are; where they move, there are new graphs."""
    use_replays(monkeypatch)
    plain = user_dit()
    model = opendit.accelerate(twin(plain), {"sampling": True, "cuda_graphs": True})

    def compared() -> None:
        for seed in range(3):
            torch.testing.assert_close(model(*inputs(seed)), plain(*inputs(seed)), atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        compared()
        for m in (model, plain):
            m.blocks[1].mlp.fc1.weight.mul_(2.0)
        compared()
        for m in (model, plain):
            m.blocks[1].mlp.fc1.weight.data = m.blocks[1].mlp.fc1.weight.data * 0.5
        compared()
    assert sampled.kept_of(model).graphs.replays == 2 + 3 + 2


def test_many_shapes_and_captures_that_fail_run_without(monkeypatch):
    use_replays(monkeypatch)
    monkeypatch.setattr(forward_graph, "SHAPES", 2)
    model = opendit.accelerate(user_dit(), {"sampling": True, "cuda_graphs": True})
    with torch.no_grad():
        for rows in (1, 1, 2, 2, 3, 3):
            model(*inputs(0, rows))
    assert "no CUDA graph of its forward: 2 shapes of inputs have graphs already" in said(model)

    def failing(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(forward_graph, "capture", failing)
    plain = user_dit()
    model = opendit.accelerate(twin(plain), {"sampling": True, "cuda_graphs": True})
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(*inputs()), plain(*inputs()), atol=1e-5, rtol=1e-5)
    assert "no CUDA graph of its forward: its capture failed: operation not permitted" in said(model)


def test_calls_of_shapes_that_keep_changing_are_forgotten(monkeypatch):
    use_replays(monkeypatch)
    monkeypatch.setattr(forward_graph, "_COUNTED", 3)
    model = opendit.accelerate(user_dit(), {"sampling": True, "cuda_graphs": True})
    graphs = sampled.kept_of(model).graphs
    with torch.no_grad():
        for rows in (*range(1, 7), 6):
            model(*inputs(0, rows))
    assert (len(graphs.calls), len(graphs.graphs)) == (2, 1)


@dataclasses.dataclass
class Out:
    sample: torch.Tensor


class Wrapping(UserDiT):
    """It gives an object that pytree doesn't know."""

    def forward(self, x, t, y):
        return Out(super().forward(x, t, y))


def test_outputs_that_can_not_be_seen_into_have_no_graph(monkeypatch):
    use_replays(monkeypatch)
    plain = randomise(Wrapping()).eval()
    model = opendit.accelerate(twin(plain), {"sampling": True, "cuda_graphs": True})
    with torch.no_grad():
        given = [inputs(seed) for seed in range(4)]
        kept = [(model(*args).sample, plain(*args).sample) for args in given]
    for ours, theirs in kept:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert "no CUDA graph of its forward: it gives Out, a container that pytree doesn't know" in said(model)


def test_outputs_that_can_not_be_cast_are_refused():
    model = opendit.accelerate(randomise(Wrapping()).eval(), "sample")
    with torch.no_grad(), pytest.raises(ValueError, match="output: got Out; allowed: a tensor, or containers"):
        model(*inputs())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: None, "its inputs are on cpu"),
        (lambda model: model.train(), "training mode"),
        (lambda model: model.blocks[1].register_forward_hook(lambda *_: None), "hooks"),
    ],
)
def test_where_there_are_none(change, reason, monkeypatch):
    model = opendit.accelerate(user_dit(), {"sampling": True, "cuda_graphs": True})
    change(model)
    if reason != "its inputs are on cpu":  # the other reasons, as for inputs on a GPU
        monkeypatch.setattr(torch.Tensor, "device", property(lambda t: torch.device("cuda")))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.no_grad():
        assert reason in forward_graph.unfit(model, [torch.randn(2)])


def test_explain_says_what_sampling_does():
    model = opendit.accelerate(user_dit(), "sample")
    with torch.no_grad():
        model(*inputs())
    text = said(model)
    assert "weights are bf16, without autocast; restore gives back what came in, to the bit" in text
    assert "modulations of all timesteps are computed at once" in text
    assert "no CUDA graph of its forward: its inputs are on cpu" in text


def test_tables_in_several_parts(monkeypatch):
    """Where memory for all steps is too much, as many as fit are looked up at a time."""
    plain = flow()
    times = [1000.0, 800.0, 600.0, 400.0, 200.0]
    model = opendit.accelerate(twin(plain), {"sampling": True})
    wanted = euler(plain, times)
    made = []
    make = steps.Steps._make
    monkeypatch.setattr(steps.Steps, "_make", lambda self, call, s: (made.append(s), make(self, call, s)))
    rows = 6 * (4 * 6 * 48 + 2 * 48 + 48) * 8
    monkeypatch.setattr(steps, "TABLE_BYTES", 2 * rows + 1)
    with opendit.sampling(model, times):
        found = euler(model, times)
    assert made == [0, 2, 4]
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-12


def test_tables_of_large_inputs_are_made_of_fewer_rows_at_once(monkeypatch):
    plain = flow()
    times = [1000.0, 800.0, 600.0, 400.0, 200.0]
    model = opendit.accelerate(twin(plain), {"sampling": True})
    made = []
    record = steps.Steps._record

    def recorded(self, call, times, blank=False):
        made.append(len(times))
        return record(self, call, times, blank)

    monkeypatch.setattr(steps.Steps, "_record", recorded)
    monkeypatch.setattr(sampled, "_NUMBERS_AT_ONCE", 2 * 6 * 4 * 6 * 6 + 1)
    with opendit.sampling(model, times):
        found = euler(model, times)
    assert made[-3:] == [2, 2, 1]
    assert ((found - euler(plain, times)).norm() / found.norm()).item() <= 1e-12


def test_wide_batches_are_computed_step_by_step(monkeypatch):
    monkeypatch.setattr(steps, "TABLE_ROWS", 4)
    plain = flow()
    model = opendit.accelerate(twin(plain), {"sampling": True})
    times = [1000.0, 800.0, 500.0, 250.0]
    with opendit.sampling(model, times) as run:
        found = euler(model, times, within=(300, 900))  # 3, 6, 6 and 3 rows
    wanted = euler(plain, times, within=(300, 900))
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-12
    assert run.wide in said(model)
    assert "adaLN is computed step by step: with 6 rows" in said(model)


def test_another_stream_has_no_graphs(monkeypatch):
    use_replays(monkeypatch)
    plain = user_dit()
    model = opendit.accelerate(twin(plain), {"sampling": True, "cuda_graphs": True})
    with torch.no_grad():
        for stream in (0, 0, 1):
            monkeypatch.setattr(forward_graph, "stream_of", lambda _, stream=stream: stream)
            torch.testing.assert_close(model(*inputs()), plain(*inputs()), atol=1e-5, rtol=1e-5)
    assert sampled.kept_of(model).graphs.replays == 1
    assert "it is called on another stream than before" in said(model)


def test_other_timesteps_than_announced():
    model = opendit.accelerate(flow(), {"sampling": True})
    with pytest.raises(ValueError, match="timesteps: got 3"), opendit.sampling(model, [1000.0, 500.0, 100.0]):
        euler(model, [1000.0, 600.0, 100.0])
    with torch.no_grad():  # nothing is left of it
        assert steps.steps_of(model.blocks[0]) is None


def test_conditions_that_change_within_a_run():
    model = opendit.accelerate(flow(), {"sampling": True})
    x, t, y = inputs()
    x = x.double()
    with torch.no_grad(), opendit.sampling(model, TIMES):
        model(x, t, y)
        with pytest.raises(ValueError, match="conditions that changed"):
            model(x, torch.full_like(t, TIMES[1]), y + 1)


class Pooling(UserDiT):
    """Its condition depends on x."""

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        x = self.x_embedder(x) + self.pos_embed
        c = c + x.mean(1)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def test_conditions_that_depend_on_x_are_computed_step_by_step():
    plain = randomise(Pooling()).eval()
    model = opendit.accelerate(twin(plain), {"sampling": True})
    with torch.no_grad(), opendit.sampling(model, TIMES):
        for seed, time in enumerate(TIMES):
            x, _, y = inputs(seed)
            t = torch.full((3,), time)
            torch.testing.assert_close(model(x, t, y), plain(x, t, y), atol=1e-5, rtol=1e-5)
    assert "adaLN is computed step by step: what its blocks are conditioned on depends on its first input" in said(
        model
    )


def test_hooks_on_a_modulation_run_in_every_step():
    model = opendit.accelerate(flow(), {"sampling": True})
    calls = [0]
    model.blocks[1].adaLN_modulation.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    times = [1000.0, 500.0, 250.0]
    with opendit.sampling(model, times):
        euler(model, times)
    assert calls[0] == len(times) + 3  # and while the values of the others were made


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: opendit.sampling(m, TIMES), ValueError, "it is not accelerated for sampling"),
        (lambda m: opendit.sampling(3, TIMES), TypeError, "model: got int"),
        (lambda m: opendit.sampling(opendit.accelerate(m, "sample"), []), ValueError, "at least one number"),
        (lambda m: opendit.sampling(opendit.accelerate(m, "sample"), "ab"), TypeError, "a sequence of numbers"),
        (lambda m: opendit.sampling(opendit.accelerate(m, "sample").train(), TIMES), ValueError, "training mode"),
        (
            lambda m: opendit.sampling(opendit.accelerate(m, {"sampling": True, "compile": True}), TIMES),
            ValueError,
            "its blocks are compiled",
        ),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call(user_dit())


@pytest.mark.gpu
@pytest.mark.parametrize("table", [False, True])
def test_on_a_gpu(table):
    """Real graphs: as near to fp32 as a plain bf16 model, from the first call to the replays."""
    torch.manual_seed(0)
    plain = randomise(UserDiT(size=32, dim=256, depth=4, heads=4)).eval().cuda()
    rounded = copy.deepcopy(plain).bfloat16()
    rounded.t_embedder.mlp.register_forward_pre_hook(lambda mlp, args: (args[0].bfloat16(),))
    model = opendit.accelerate(copy.deepcopy(plain), "sample")
    y = torch.tensor([0, 1, 2, 5, 5, 5], device="cuda")
    with torch.inference_mode(), opendit.sampling(model, TIMES) if table else torch.no_grad():
        for time in TIMES * 3:
            x, t = torch.randn(6, 4, 32, 32, device="cuda"), torch.full((6,), time, device="cuda")
            exact, ours = plain(x, t, y), model(x, t, y)
            theirs = rounded(x.bfloat16(), t, y).float()
            assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
    assert sampled.kept_of(model).graphs.replays == len(TIMES) * 3 - 1
    assert "no CUDA graph" not in said(model)


@pytest.mark.gpu
def test_the_cache_on_a_gpu():
    """With graphs as without."""
    times = [1000.0 - 100 * i for i in range(10)]
    plain = flow(dtype=torch.float32).cuda()
    drawn = []
    for graphs in (False, True):
        model = opendit.accelerate(copy.deepcopy(plain), {"sampling": True, "cuda_graphs": graphs})
        cache = opendit.StepCache(tuple(times), (True, False, True, False, False) * 2, 1, 2, 4, order=1)
        with opendit.sampling(model, times, cache):
            drawn += [euler(model, times) for _ in range(3)][2:]
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)


def test_in_inference_mode_throughout():
    with torch.inference_mode():
        plain = user_dit()
        before = copy.deepcopy(plain.state_dict())
        model = opendit.accelerate(plain, "sample")
        with opendit.sampling(model, TIMES):
            assert model(*inputs()).isfinite().all()
        opendit.restore(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
