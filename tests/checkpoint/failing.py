"""Cases for `test_together`: two processes, of which one has a problem."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import opendit
from opendit.checkpoint import disk, division, shards, together
from tests.checkpoint.running import Trainer, differences


def cases(world: int) -> dict[str, Any]:
    return {
        "resume": _resume,
        "not finite": _not_finite,
        "full disk": _full_disk,
        "different": _different,
        "damaged": _damaged,
        "damaged before": _damaged_before,
        "refused late": _refused_late,
        "weights": _weights,
        "weights meanwhile": _weights_meanwhile,
    }


def _folder() -> Path:
    folders: list[Any] = [tempfile.mkdtemp(prefix="together") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    return Path(folders[0])


def _trainer(seed: int) -> Trainer:
    return Trainer(seed, rank=dist.get_rank(), ranks=dist.get_world_size())


def _fails(match: str, call: Any) -> None:
    with pytest.raises(opendit.CheckpointError, match=match):
        call()


def _resume():
    """Replicated state is written once, divided; every process's own random states continue."""
    folder = _folder()
    division._WORTH_DIVIDING = 8  # tensors are tiny here
    for background in (False, True):
        whole = _trainer(0)
        whole.train(3)
        saving = whole.save(folder / str(background), background=background)
        whole.train(6)
        path = saving.wait()
        resumed = _trainer(1)
        resumed.load(folder / str(background))
        resumed.train(6)
        assert differences(resumed.facts(), whole.facts()) == []
    files = [p.stat().st_size for p in sorted(path.glob("*.safetensors"))]
    copies = [*whole.model.parameters(), *whole.ema.parameters(), *whole.rule.sums.values()]
    moments = [v for s in whole.optimizer.state.values() for v in s.values()]
    once = sum(v.numel() * 4 for v in (*copies, *moments))
    draws = together.everyones(torch.rand(1).item())
    return {"files": len(files), "over": sum(files) - once, "draws": draws, "names": disk.names(folder / "True")}


def _not_finite():
    folder, trainer = _folder(), _trainer(0)
    trainer.train(1)
    trainer.save(folder)
    trainer.train(2)
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))
            trainer.ema.final_layer.linear.weight.fill_(float("inf"))
    for background in (False, True):
        _fails("rank 1: .* not finite", lambda b=background: trainer.save(folder, background=b))
    return sorted(p.name for p in folder.iterdir())


def _full_disk():
    folder, trainer = _folder(), _trainer(0)
    trainer.train(1)
    trainer.save(folder)
    trainer.train(2)

    def full(*args):
        raise OSError(28, "No space left on device")

    for owner, name, rank in ((shards, "write", 1), (disk, "write", 0), (disk, "begin", 0), (disk, "commit", 0)):
        for background in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() == rank:
                    patch.setattr(owner, name, full)
                save = lambda b=background: trainer.save(folder, background=b).wait()  # noqa: E731
                _fails(f"rank {rank}: OSError: .*No space left", save)
                with contextlib.suppress(opendit.CheckpointError):
                    opendit.wait()
            dist.barrier()
    trainer.save(folder)
    return sorted(p.name for p in folder.iterdir())


def _different():
    folder, trainer, rank = _folder(), _trainer(0), dist.get_rank()
    model = trainer.model
    _fails("step: rank 0 and rank 1 have different", lambda: opendit.save(folder, model, step=rank))
    _fails("extra: rank 0 and rank 1", lambda: opendit.save(folder, model, step=1, extra=[rank]))
    odd = object() if rank == 1 else None
    _fails(r"rank 1: extra: got builtins\.object", lambda: opendit.save(folder, model, step=1, extra=odd))
    torch.manual_seed(rank)
    apart = torch.nn.Linear(2, 2)  # two models, not two copies of one
    _fails("rank 0 and rank 1 hold different values of what should be one", lambda: opendit.save(folder, apart, step=1))
    with torch.no_grad():
        for p in apart.parameters():
            p.fill_(1.0)
    apart.register_buffer("statistics", torch.full((3,), 5.0 + rank))
    opendit.save(folder / "buffers", apart, step=1)
    opendit.load(folder / "buffers", apart)
    assert apart.statistics.tolist() == [5.0] * 3
    other = torch.nn.Linear(2, 2 + rank)
    _fails("processes hold different tensors", lambda: opendit.save(folder, other, step=1))
    return disk.names(folder) if folder.exists() else []


def _damaged():
    """One process sees the damage in its share of the files; all raise it, with what is intact."""
    folder, trainer = _folder(), _trainer(0)
    for until in (1, 2):
        trainer.train(until)
        trainer.save(folder)
    path = folder / "step-00000002" / "shard-00001-00000.safetensors"
    if dist.get_rank() == 0:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    dist.barrier()
    with pytest.raises(opendit.DamagedCheckpointError) as caught:
        trainer.load(folder)
    assert "shard-00001" in str(caught.value)
    _fails("holds no checkpoint", lambda: opendit.load(folder / "none", trainer.model))
    return caught.value.intact


def _damaged_before():
    """The one process that looks for an intact checkpoint meets others that are worse; nobody is left waiting."""
    folder, model = _folder(), torch.nn.Linear(2, 2)
    for p in model.parameters():
        dist.broadcast(p.data, 0)
    for step in (1, 2, 3, 4):
        opendit.save(folder, model, step=step)
    if dist.get_rank() == 0:
        two, three, four = (folder / name for name in disk.names(folder)[1:])
        manifest = (two / "manifest.json").read_text()
        (two / "manifest.json").write_text(re.sub(r'"size": \d+', '"size": 1e999', manifest, count=1))
        (three / "manifest.json").write_bytes(b"[" * 100_000)
        (four / "index.json").write_bytes(bytes((four / "index.json").stat().st_size))
    dist.barrier()
    with pytest.raises(opendit.DamagedCheckpointError, match=r"index\.json: is damaged") as caught:
        opendit.load(folder, model)
    return caught.value.intact


def _refused_late():
    """One process's rule does not fit; the other, whose parts have taken their values, puts them back as well."""
    folder, trainer = _folder(), _trainer(0)
    trainer.train(2)
    trainer.save(folder)
    trainer.train(3)
    if dist.get_rank() == 1:
        trainer.rule.sums.pop("final_layer.linear.bias")
    before = trainer.facts()
    _fails("rank 1: .* the rule has nothing of that name", lambda: trainer.load(folder))
    return differences(trainer.facts(), before)


def _weights():
    """A sharded model's weights, gathered, in one file; and read back into shards."""
    from torch.distributed.fsdp import fully_shard

    folder = _folder()
    whole = _trainer(0).model
    dist.broadcast(whole.final_layer.linear.weight.data, 0)
    for p in whole.parameters():
        dist.broadcast(p.data, 0)
    import copy

    sharded = fully_shard(copy.deepcopy(whole))
    for name in ("a.safetensors", "a.pt"):
        opendit.save_weights(folder / name, sharded)
        empty = fully_shard(copy.deepcopy(whole))
        for p in empty.parameters():
            p.to_local().detach().zero_()
        opendit.load_weights(folder / name, empty)
        for (n, p), q in zip(empty.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q), n
    with torch.no_grad():
        next(sharded.parameters()).to_local().fill_(float("nan"))
    _fails("not finite", lambda: opendit.save_weights(folder / "b.safetensors", sharded))
    return sorted(p.name for p in folder.iterdir())


def _weights_meanwhile():
    """Weights saved and loaded while a save in the background talks over the same group."""
    folder, trainer, rank = _folder(), _trainer(0), dist.get_rank()
    for p in trainer.model.parameters():
        dist.broadcast(p.data, 0)
    write = shards.write

    def slowly(*args):
        time.sleep(0.3 if rank == 0 else 0.0)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "write", slowly)
        for step in (1, 2):
            saving = opendit.save(folder, trainer.model, step=step, background=True)
            if step == 1:
                opendit.save_weights(folder / "a.safetensors", trainer.model)
            else:
                opendit.load_weights(folder / "a.safetensors", trainer.model)
            assert not saving._thread.is_alive()
            saving.wait()
    return sorted(p.name for p in folder.iterdir())
