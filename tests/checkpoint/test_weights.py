"""Weights in the formats of others: theirs load here, ours load there, with no opendit installed."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import opendit
from tests.tiny_models import TINY, UserDiT, UserLatte, randomise

ROOT = Path(__file__).parent.parent.parent


def _dit(seed: int = 0):
    return randomise(UserDiT(), seed)


def _alike(model, other) -> bool:
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("build", [UserDiT, lambda: UserLatte(depth=2)], ids=["dit", "latte"])
def test_upstreams_training_file(tmp_path, build):
    """{"model", "ema", "opt", "args"}, the last an argparse.Namespace, as train.py writes it."""
    trained, ema = randomise(build(), 1), randomise(build(), 2)
    optimizer = torch.optim.AdamW(trained.parameters())
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4, image_size=256, ckpt=None, betas=(0.9, 0.999))
    content = {
        "model": trained.state_dict(),
        "ema": ema.state_dict(),
        "opt": optimizer.state_dict(),
        "args": args,
    }
    torch.save(content, tmp_path / "0050000.pt")
    model = opendit.accelerate(build())
    opendit.load_weights(tmp_path / "0050000.pt", model)
    assert _alike(model, ema), "upstream's sampling takes the averaged weights"
    opendit.load_weights(tmp_path / "0050000.pt", model, which="model")
    assert _alike(model, trained)
    torch.save(trained.state_dict(), tmp_path / "published.pth")
    opendit.load_weights(tmp_path / "0050000.pt", model, which="ema")
    opendit.load_weights(tmp_path / "published.pth", model)
    assert _alike(model, trained)
    with pytest.raises(opendit.CheckpointError, match="which: got 'ema'"):
        opendit.load_weights(tmp_path / "published.pth", model, which="ema")
    with pytest.raises(ValueError, match="which: got 'opt'"):
        opendit.load_weights(tmp_path / "published.pth", model, which="opt")


def test_prefixes_of_wrappers(tmp_path):
    trained, model = _dit(1), _dit(2)
    torch.save({"ema": {f"module.{n}": v for n, v in trained.state_dict().items()}}, tmp_path / "a.pt")
    opendit.load_weights(tmp_path / "a.pt", model)
    assert _alike(model, trained)


def test_our_pt_is_what_upstream_reads(tmp_path):
    trained, ema = opendit.accelerate(_dit(1)), _dit(2)
    opendit.save_weights(tmp_path / "a.pt", trained, ema=ema)
    content = torch.load(tmp_path / "a.pt", weights_only=True)  # upstream's find_model reads it with less care
    assert set(content) == {"model", "ema"}
    for name, module in (("model", trained), ("ema", ema)):
        fresh = _dit(3)
        fresh.load_state_dict(content[name], strict=True)
        assert _alike(fresh, module)
    opendit.save_weights(tmp_path / "flat.pt", trained)
    fresh.load_state_dict(torch.load(tmp_path / "flat.pt", weights_only=True), strict=True)
    assert _alike(fresh, trained)
    opendit.save_weights(tmp_path / "b.pt", trained, ema=dict(ema.state_dict()), state=_dit(5).state_dict())
    opendit.load_weights(tmp_path / "b.pt", fresh, which="model")
    assert _alike(fresh, _dit(5))


def test_plain_export_loads_without_opendit(tmp_path):
    """In the unaccelerated model, with `import opendit` forbidden, to the bit; also from a wrapped one."""
    model = opendit.accelerate(_dit(1))
    opendit.save_weights(tmp_path / "model.safetensors", torch.compile(model))
    torch.save(_dit(1).state_dict(), tmp_path / "expected")
    code = (
        "import sys; sys.modules['opendit'] = None\n"
        "import torch; from safetensors.torch import load_file; from tests.tiny_models import UserDiT\n"
        f"state = load_file({str(tmp_path / 'model.safetensors')!r}); model = UserDiT()\n"
        "model.load_state_dict(state, strict=True)\n"
        f"expected = torch.load({str(tmp_path / 'expected')!r}, weights_only=True)\n"
        "assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())\n"
        "assert not any(m.startswith('opendit.') for m in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_cast_to_the_models_dtype(tmp_path):
    model = _dit(1)
    opendit.save_weights(tmp_path / "a.safetensors", copy.deepcopy(model).half())
    opendit.load_weights(tmp_path / "a.safetensors", model)
    assert next(model.parameters()).dtype == torch.float32
    assert _alike(model, copy.deepcopy(_dit(1)).half().float())


@pytest.fixture(scope="module")
def diffusers_model():
    pytest.importorskip("diffusers")
    return next(t for t in TINY if t.name == "diffusers")


def test_diffusers_folders(tmp_path, diffusers_model):
    from diffusers import DiTTransformer2DModel

    theirs = randomise(diffusers_model.build(), 1)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "several", max_shard_size="60KB")
    assert (tmp_path / "several" / "diffusion_pytorch_model.safetensors.index.json").exists()
    for name in ("one", "several"):
        model = opendit.accelerate(randomise(diffusers_model.build(), 2))
        opendit.load_weights(tmp_path / name, model)
        assert _alike(model, theirs)
    opendit.save_weights(tmp_path / "ours", model)
    back = DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert _alike(back, theirs)
    own = [{k: v for k, v in m.config.items() if not k.startswith("_")} for m in (back, theirs)]
    assert own[0] == own[1]
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "ours").rename(tmp_path / "pipeline" / "transformer")
    with pytest.raises(opendit.CheckpointError, match=r"pass .*pipeline/transformer"):
        opendit.load_weights(tmp_path / "pipeline", model)


def test_a_folder_that_held_several_files_is_replaced(tmp_path, diffusers_model):
    from diffusers import DiTTransformer2DModel

    folder = tmp_path / "a"
    randomise(diffusers_model.build(), 1).save_pretrained(folder, max_shard_size="60KB")
    (folder / "notes-00001-of-00002.safetensors").touch()
    new = randomise(diffusers_model.build(), 2)
    opendit.save_weights(folder, new)
    kept = ["config.json", "diffusion_pytorch_model.safetensors", "notes-00001-of-00002.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == kept
    model = randomise(diffusers_model.build(), 3)
    opendit.load_weights(folder, model)
    assert _alike(model, new)
    assert _alike(DiTTransformer2DModel.from_pretrained(folder), new)


def test_a_folder_with_a_dot_in_its_name(tmp_path, diffusers_model):
    model, other = randomise(diffusers_model.build(), 1), randomise(diffusers_model.build(), 2)
    opendit.save_weights(tmp_path / "dit-v1.5", opendit.accelerate(model))
    opendit.load_weights(tmp_path / "dit-v1.5", other)
    assert _alike(model, other)
    with pytest.raises(opendit.CheckpointError, match=r"allowed: a \.safetensors file"):
        opendit.save_weights(tmp_path / "a.bin", model)
    assert [p.name for p in tmp_path.iterdir()] == ["dit-v1.5"]


def test_another_class_of_diffusers(tmp_path, diffusers_model):
    model = randomise(diffusers_model.build(), 1)
    opendit.save_weights(tmp_path / "a", model)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(opendit.CheckpointError, match="is of a 'PixArtTransformer2DModel'"):
        opendit.load_weights(tmp_path / "a", model)


def test_what_does_not_fit_is_told_in_full_and_changes_nothing(tmp_path):
    model, state = _dit(1), _dit(2).state_dict()
    state.pop("final_layer.linear.bias")
    state["extra.weight"] = torch.zeros(3)
    state["pos_embed"] = torch.zeros(1, 4, 48)
    save_file(state, tmp_path / "a.safetensors")
    told = r"misses final_layer\.linear\.bias; it has besides extra\.weight; it has of another shape pos_embed \(1, 4"
    with pytest.raises(opendit.CheckpointError, match=told):
        opendit.load_weights(tmp_path / "a.safetensors", model)
    assert _alike(model, _dit(1))


def test_refusals_of_saving(tmp_path):
    model = _dit(1)
    for name, match in (("a.bin", "allowed: a .safetensors file"), ("folder", "is no model of diffusers")):
        with pytest.raises(opendit.CheckpointError, match=match):
            opendit.save_weights(tmp_path / name, model)
    with pytest.raises(opendit.CheckpointError, match=r"ema: a \.safetensors holds one set"):
        opendit.save_weights(tmp_path / "a.safetensors", model, ema=model)
    with torch.no_grad():
        model.pos_embed[0, 0, 0] = float("nan")
    for name in ("a.safetensors", "a.pt"):
        with pytest.raises(opendit.CheckpointError, match="pos_embed: holds numbers that are not finite"):
            opendit.save_weights(tmp_path / name, model)
    assert list(tmp_path.iterdir()) == []


def test_buffers_need_not_be_finite(tmp_path):
    model = _dit(1)
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        opendit.save_weights(path, model, ema=model if path.suffix == ".pt" else None)
        opendit.load_weights(path, model)


def test_a_state_dict_of_tied_and_transposed_weights(tmp_path):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(4, 4)
            self.b = self.a
            self.c = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.d = torch.nn.Parameter(torch.randn(4, 3).t())

    model, other = Odd(), Odd()
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        more = {"ema": model.state_dict()} if path.suffix == ".pt" else {}
        opendit.save_weights(path, model, state=model.state_dict(), **more)
        content = load_file(path) if not more else torch.load(path, weights_only=True)["ema"]
        other.load_state_dict(content)
        assert _alike(model, other)
        other = Odd()
    with pytest.raises(opendit.CheckpointError, match="state: got int for 'a'; allowed: tensors"):
        opendit.save_weights(tmp_path / "a.safetensors", model, state={"a": 1})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_dtypes_are_those_that_save_allows(tmp_path, dtype, name):
    model = _dit(1)
    model.register_buffer("odd", torch.zeros(3).to(dtype))
    for call in (partial(opendit.save_weights, tmp_path / name), partial(opendit.save, tmp_path / "run", step=0)):
        with pytest.raises(opendit.CheckpointError, match=f"model/odd is {dtype}; allowed in a checkpoint: float64, "):
            call(model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_an_older_safetensors_has_no_name_for(tmp_path, monkeypatch):
    from opendit.checkpoint import weights

    monkeypatch.setattr(weights, "check_dtypes", lambda values: None)
    model = _dit(1)
    model.register_buffer("odd", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(opendit.CheckpointError, match=r"odd: safetensors .* can't write torch\.complex128"):
        opendit.save_weights(tmp_path / "a.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_one_before(tmp_path, monkeypatch):
    from opendit.checkpoint import disk

    path = tmp_path / "a.safetensors"
    opendit.save_weights(path, _dit(1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "flush", full)
    with pytest.raises(opendit.CheckpointError, match="No space"):
        opendit.save_weights(path, _dit(2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_file(path)["pos_embed"], _dit(1).pos_embed)
