"""What users put on top of an accelerated model keeps working: DDP, FSDP2, Accelerate, Lightning, PEFT."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import opendit
from tests.comparing import build, relative_errors, run, twin, worst
from tests.launch import of_every_rank
from tests.tiny_models import TINY, UserDiT, randomise

DIT = TINY[0]


@pytest.fixture(scope="module")
def one_process_group():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def strip_prefix(results):
    return {name.removeprefix("module."): value for name, value in results.items()}


@pytest.mark.parametrize("order", ["accelerate first", "DDP first"])
def test_ddp(one_process_group, order):
    model = build(DIT)
    expected = run(twin(model), DIT)
    if order == "accelerate first":
        wrapped = DistributedDataParallel(opendit.accelerate(model))
    else:
        wrapped = DistributedDataParallel(model)
        assert opendit.accelerate(wrapped) is wrapped
    error, name = worst(strip_prefix(run(wrapped, DIT)), expected)
    assert error <= 1e-5, name
    assert opendit.explain(wrapped).family == "dit"
    opendit.restore(wrapped)
    actual = strip_prefix(run(wrapped, DIT))
    assert relative_errors(actual, expected) == dict.fromkeys(expected, 0.0)


def cases(world: int):
    return {"ddp": _gradients_of_this_rank_in_ddp}


def _gradients_of_this_rank_in_ddp():
    model = DistributedDataParallel(opendit.accelerate(build(DIT, torch.float64)).eval())
    x, t, y = _four_samples()
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    model(x[half], t[half], y[half]).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


def _four_samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])


def test_ddp_over_two_processes_is_one_process_on_the_whole_batch():
    model = build(DIT, torch.float64).eval()
    model(*_four_samples()).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for actual in of_every_rank(__name__, 2, "ddp"):
        error, name = worst(actual, expected)
        assert error <= 1e-10, name


def test_fully_shard_on_top(one_process_group):
    from torch.distributed.fsdp import fully_shard

    model = build(DIT)
    expected = run(twin(model), DIT)
    opendit.accelerate(model)
    keys = list(model.state_dict())
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    assert list(model.state_dict()) == keys
    actual = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in run_sharded(model).items()}
    error, name = worst(actual, expected)
    assert error <= 1e-5, name
    with pytest.raises(ValueError, match=r"blocks.0 was given another class after accelerate"):
        opendit.restore(model)
    with pytest.raises(ValueError, match="already accelerated"):
        opendit.accelerate(model)


def run_sharded(model):
    args, _ = DIT.inputs(torch.float32, torch.device("cpu"))
    args[0].requires_grad_()
    torch.manual_seed(7)
    out = model.train()(*args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    grads = {n: p.grad.full_tensor().double() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach().double(), "input": args[0].grad.double(), **grads}


def test_a_sharded_model_is_refused(one_process_group):
    from torch.distributed.fsdp import fully_shard

    model = build(DIT)
    fully_shard(model)
    with pytest.raises(ValueError, match="already sharded; call accelerate first"):
        opendit.accelerate(model)


@pytest.mark.parametrize("cfg", [None, {"precision": "bf16"}])
def test_hugging_face_accelerate(cfg):
    accelerate = pytest.importorskip("accelerate")
    model = build(DIT)
    expected = run(twin(model), DIT)
    model, optimizer = opendit.accelerate(model, cfg, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimizer = accelerator.prepare(model, optimizer)
    (x, t, y), _ = DIT.inputs(torch.float32, torch.device("cpu"))
    before = [p.clone() for p in prepared.parameters()]
    loss = prepared(x, t, y).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    assert any(not torch.equal(p, b) for p, b in zip(prepared.parameters(), before, strict=True))
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    error, name = worst(run(opendit.restore(unwrapped), DIT), expected)
    assert error <= 1e-6, name


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network
            self.losses: list[float] = []

        def training_step(self, batch, index):
            loss = self.network(*batch).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def fit(network: nn.Module) -> list[float]:
        (x, t, y), _ = DIT.inputs(torch.float32, torch.device("cpu"))
        lightning.seed_everything(0, verbose=False)
        task = Task(network)
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(task, torch.utils.data.DataLoader([(x[i], t[i], y[i]) for i in range(3)], batch_size=3))
        return task.losses

    model = randomise(UserDiT())
    plain, fast = fit(twin(model)), fit(opendit.accelerate(model))
    assert len(plain) == 3
    assert plain[-1] < plain[0]
    assert fast == pytest.approx(plain, rel=1e-4)


def test_lora_adapters_are_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model = build(DIT)
    reference = twin(model)
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.inject_adapter_in_model(config, opendit.accelerate(model))
    torch.manual_seed(0)
    expected = peft.inject_adapter_in_model(config, reference)
    actual, wanted = run(adapted, DIT), run(expected, DIT)
    assert any("lora_A" in name for name in wanted)
    error, name = worst(actual, wanted)
    assert error <= 1e-5, name


def test_environment_is_left_alone():
    before = dict(os.environ)
    opendit.restore(opendit.accelerate(build(DIT)))
    assert dict(os.environ) == before
