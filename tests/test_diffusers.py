"""diffusers' models where they are used: in pipelines, saved, with adapters, other processors, offloading."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import opendit
from opendit.patch.core import Patched
from tests.comparing import Results, build, exactly, run, twin, worst
from tests.tiny_models import (
    TINY,
    Tiny,
    _cogvideox,
    _diffusers_dit,
    _diffusers_latte,
    _flux,
    _hunyuan_video,
    _pixart,
    _sd3,
    _wan,
    randomise,
)

diffusers = pytest.importorskip("diffusers")

F64 = torch.float64
FIRST = {t.family: t for t in reversed(TINY) if t.family.startswith("diffusers_")}
each_model = pytest.mark.parametrize(
    "tiny",  # Latte's blocks are PixArt's; HunyuanVideo's use the same parts as CogVideoX's
    [
        pytest.param(t, id=t.name, marks=[pytest.mark.slow] if t.name in ("diffusers-latte", "hunyuan-video") else [])
        for t in FIRST.values()
    ],
)
PIXART = FIRST["diffusers_pixart"]


def explained(model: nn.Module) -> str:
    text = io.StringIO()
    opendit.explain(model, file=text)
    return text.getvalue()


def close(actual: Results, expected: Results, tolerance: float = 1e-10) -> None:
    error, name = worst(actual, expected)
    assert error <= tolerance, name


def types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


# -- pipelines ---------------------------------------------------------------------------------------------------------


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=6, latent_channels=4).eval()


def _scheduler() -> Any:
    return diffusers.DDIMScheduler(num_train_timesteps=1000)


def _dit_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.DiTPipeline(transformer, _vae(), _scheduler())
    return pipe, {"class_labels": [1, 3]}


def _text() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "prompt_embeds": torch.randn(2, 5, 10, generator=generator),
        "negative_prompt_embeds": torch.randn(2, 5, 10, generator=generator),
    }


def _masks() -> dict[str, torch.Tensor]:
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return {"prompt_attention_mask": keep, "negative_prompt_attention_mask": keep.flip(0)}


def _alpha(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.PixArtAlphaPipeline(None, None, _vae(), transformer, _scheduler())
    more = {"prompt": None, "negative_prompt": None, "height": 8, "width": 16, "use_resolution_binning": False}
    return pipe, {**_text(), **_masks(), **more}


def _sigma(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.PixArtSigmaPipeline(None, None, _vae(), transformer, _scheduler())
    return pipe, _alpha(transformer)[1]


def _latte_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.LattePipeline(None, None, _vae(), transformer, _scheduler())
    more = {"negative_prompt": None, "height": 8, "width": 8, "video_length": 3, "clean_caption": False}
    return pipe, {**_text(), **more}


def _sd3_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.StableDiffusion3Pipeline(transformer, scheduler, _vae(), *(None,) * 6)
    generator = torch.Generator().manual_seed(2)
    pooled = [torch.randn(2, 12, generator=generator) for _ in range(2)]
    more = {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1], "height": 8, "width": 16}
    return pipe, {**_text(), **more}


def _flux_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), _vae(), *(None,) * 4, transformer)
    generator = torch.Generator().manual_seed(2)
    text = {"prompt_embeds": torch.randn(2, 5, 10, generator=generator)}
    return pipe, {**text, "pooled_prompt_embeds": torch.randn(2, 12, generator=generator), "height": 8, "width": 16}


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _wan_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.WanPipeline(None, None, None, _flow(), transformer=transformer)
    return pipe, {**_text(), "negative_prompt": None, "height": 32, "width": 48, "num_frames": 9}


def _cogvideox_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.CogVideoXPipeline(None, None, None, transformer, diffusers.CogVideoXDDIMScheduler())
    return pipe, {**_text(), "height": 16, "width": 48, "num_frames": 9}


def _hunyuan_video_pipeline(transformer: nn.Module) -> tuple[Any, dict[str, Any]]:
    pipe = diffusers.HunyuanVideoPipeline(None, None, transformer, None, _flow(), None, None)
    text = {"prompt_embeds": _text()["prompt_embeds"], "pooled_prompt_embeds": torch.ones(2, 7)}
    return pipe, {
        **text,
        "prompt_attention_mask": _masks()["prompt_attention_mask"],
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }


PIPELINES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], tuple[Any, dict[str, Any]]]]] = {
    "dit": (lambda: _diffusers_dit(num_embeds_ada_norm=1000), _dit_pipeline),  # whose pipeline takes 1000 for no class
    "pixart-alpha": (_pixart, _alpha),
    "pixart-sigma": (_pixart, _sigma),
    "latte": (_diffusers_latte, _latte_pipeline),
    "sd3": (lambda: _sd3(qk_norm="rms_norm", out_channels=4, pos_embed_max_size=16), _sd3_pipeline),
    "flux": (lambda: _flux(in_channels=16), _flux_pipeline),
    "wan": (_wan, _wan_pipeline),
    "cogvideox": (_cogvideox, _cogvideox_pipeline),
    "hunyuan-video": (_hunyuan_video, _hunyuan_video_pipeline),
}


def sample(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    out = pipe(
        num_inference_steps=3,
        output_type="latent" if "DiT" not in type(pipe).__name__ else "np",
        generator=generator,
        **arguments,
    )
    return torch.as_tensor(out[0] if isinstance(out, tuple) else next(iter(out.values())))


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_in_its_pipeline(name):
    build_one, make = PIPELINES[name]
    pipe, arguments = make(randomise(build_one()).eval())
    expected = sample(pipe, arguments)
    pipe.transformer = opendit.accelerate(pipe.transformer)
    found = sample(pipe, arguments)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert "upstream's own forward was used" not in explained(pipe.transformer)


@each_model
def test_save_pretrained_and_back(tiny: Tiny, tmp_path):
    model = build(tiny)
    fast = opendit.accelerate(twin(model))
    fast.save_pretrained(tmp_path / "fast")
    model.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "fast" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = type(model).from_pretrained(tmp_path / "fast")
    close(run(opendit.accelerate(loaded), tiny), run(model, tiny), 1e-5)


def test_a_pipeline_is_saved_as_it_was(tmp_path):
    pipe, _ = _dit_pipeline(build(FIRST["diffusers_dit"]))
    pipe.transformer = opendit.accelerate(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    assert type(again.transformer) is diffusers.DiTTransformer2DModel
    assert not any(isinstance(m, Patched) for m in again.transformer.modules())


@each_model
def test_gradient_checkpointing_on_and_off(tiny: Tiny):
    model = build(tiny, F64)
    expected = run(model, tiny)
    fast = opendit.accelerate(twin(model))
    fast.enable_gradient_checkpointing()
    close(run(fast, tiny), expected)
    fast.disable_gradient_checkpointing()
    close(run(fast, tiny), expected)
    before = opendit.accelerate((model.enable_gradient_checkpointing(), model)[1])
    close(run(before, tiny), expected)


# -- adapters ----------------------------------------------------------------------------------------------------------

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out", "net.0.proj", "net.2", "proj_mlp"]


def adapted(model: nn.Module, seed: int = 0) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)).double()


@each_model
@pytest.mark.parametrize("order", ["accelerated, then adapted", "adapted, then accelerated"])
def test_lora(tiny: Tiny, order: str, tmp_path):
    peft = pytest.importorskip("peft")
    model = build(tiny, F64)
    expected = run(adapted(twin(model)), tiny)
    assert any("lora_B" in name for name in expected)
    if order.startswith("accelerated"):
        fast = adapted(opendit.accelerate(twin(model)))
    else:
        fast = adapted(twin(model))
        opendit.accelerate(fast.get_base_model())
    close(run(fast, tiny), expected)
    assert "upstream's own forward was used" not in explained(fast.get_base_model())

    fast.save_pretrained(tmp_path)  # adapters trained on an accelerated model are adapters of the plain one
    loaded = peft.PeftModel.from_pretrained(twin(model), tmp_path, is_trainable=True)
    close(run(loaded, tiny), expected)

    merged = adapted(twin(model)).merge_and_unload()
    with torch.no_grad(), exactly(tiny):
        (x,), more = tiny.inputs(F64, torch.device("cpu"))
        wanted = merged.eval()(x, **more).sample
        fast = fast.merge_and_unload()
        torch.testing.assert_close(fast.eval()(x, **more).sample, wanted, rtol=1e-9, atol=1e-9)
    opendit.restore(fast)
    assert types(fast) == types(model)


def test_unloading_leaves_the_base_model():
    model = build(PIXART, F64)
    fast = adapted(opendit.accelerate(twin(model))).unload()
    for p in fast.parameters():
        p.requires_grad_()  # peft froze them
    close(run(fast, PIXART), run(model, PIXART))


# -- other attention ---------------------------------------------------------------------------------------------------


class Doubling:
    """An attention processor of one's own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        from diffusers.models.attention_processor import AttnProcessor2_0

        return 2 * AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


@pytest.mark.parametrize("order", ["before", "after"])
def test_set_attn_processor(order):
    model = build(PIXART, F64)
    healthy = run(model, PIXART)["output"]
    fast = twin(model)
    model.set_attn_processor(Doubling())
    expected = run(model, PIXART)
    assert not torch.allclose(expected["output"], healthy)
    if order == "before":
        fast.set_attn_processor(Doubling())
        opendit.accelerate(fast)
        assert "its processor is Doubling" in explained(fast)
    else:
        opendit.accelerate(fast).set_attn_processor(Doubling())
    close(run(fast, PIXART), expected)
    if order == "after":
        assert "its processor is now Doubling" in explained(fast)
        fast.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
        torch.testing.assert_close(run(fast, PIXART)["output"], healthy, rtol=1e-10, atol=1e-10)
    assert fast.attn_processors.keys() == model.attn_processors.keys()


@pytest.mark.parametrize("order", ["before", "after"])
def test_fuse_qkv_projections(order):
    """Fused projections are copies that diffusers makes for sampling; its own processor reads them."""
    model = build(PIXART, F64)
    (x,), more = PIXART.inputs(F64, torch.device("cpu"))
    expected = model(x, **more).sample.detach()
    fast = twin(model)
    if order == "before":
        fast.fuse_qkv_projections()
    opendit.accelerate(fast)
    if order == "after":
        fast.fuse_qkv_projections()
    with torch.no_grad():  # what is computed is the fused weights' affair
        fast.transformer_blocks[0].attn1.to_qkv.weight.mul_(1.5)
    torch.testing.assert_close(
        fast(x, **more).sample, model_with_fused_scaled(model)(x, **more).sample, rtol=1e-9, atol=1e-9
    )
    assert "its processor is" in explained(fast)
    assert "FusedAttnProcessor2_0" in explained(fast)
    fast.unfuse_qkv_projections()
    torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-9, atol=1e-9)


def model_with_fused_scaled(model: nn.Module) -> nn.Module:
    plain = twin(model)
    plain.fuse_qkv_projections()
    with torch.no_grad():
        plain.transformer_blocks[0].attn1.to_qkv.weight.mul_(1.5)
    return plain


# -- caches ------------------------------------------------------------------------------------------------------------


def denoised(model: nn.Module, tiny: Tiny) -> torch.Tensor:
    """What a few steps give, of which a cache that is on leaves something out."""
    (x,), more = tiny.inputs(F64, torch.device("cpu"))
    with torch.no_grad(), model.cache_context("cond_uncond"):
        return torch.stack([model(x * (1 + i / 8), **more).sample for i in range(6)])


def _time() -> int:
    return 500


WHOLE_BLOCKS = {
    "FirstBlockCache": lambda m: m.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5)),
    "MagCache": lambda m: m.enable_cache(diffusers.MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6)),
    "layer skip": lambda m: diffusers.hooks.apply_layer_skip(
        m, diffusers.hooks.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    ),
}
ATTENTION = {
    "TaylorSeer": lambda m: m.enable_cache(
        diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"transformer_blocks\.\d+\.attn1"]
        )
    ),
    "PyramidAttentionBroadcast": lambda m: m.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=_time,
        )
    ),
    "FasterCache": lambda m: m.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 681),
            unconditional_batch_timestep_skip_range=(-1, 781),
            tensor_format="BFCHW",
            current_timestep_callback=_time,
            attention_weight_callback=lambda _: 0.3,
        )
    ),
}
CACHED = FIRST["diffusers_cogvideox"]


@pytest.mark.parametrize("cache", WHOLE_BLOCKS)
def test_what_leaves_blocks_out_is_put_on_before(cache: str):
    """diffusers looks blocks up by their exact class."""
    model = build(CACHED, F64).eval()
    fast, healthy = twin(model), denoised(model, CACHED)
    with pytest.raises(ValueError, match="CogVideoXBlock'> not registered"):
        WHOLE_BLOCKS[cache](opendit.accelerate(twin(model)))
    for m in (model, fast):
        WHOLE_BLOCKS[cache](m)
    plan = opendit.explain(opendit.accelerate(fast), file=io.StringIO())
    expected = denoised(model, CACHED)
    assert not torch.allclose(expected, healthy, rtol=1e-4), "nothing was left out"
    torch.testing.assert_close(denoised(fast, CACHED), expected, rtol=1e-9, atol=1e-10)
    changed = {edit.fqn for edit in plan.edits}
    assert "transformer_blocks.0.attn1" in changed
    assert "transformer_blocks.0" not in changed


@pytest.mark.parametrize("cache", ATTENTION)
def test_what_leaves_attention_out_is_put_on_after(cache: str):
    model = build(CACHED, F64).eval()
    fast, healthy = opendit.accelerate(twin(model)), denoised(model, CACHED)
    for m in (model, fast):
        ATTENTION[cache](m)
    expected = denoised(model, CACHED)
    assert not torch.allclose(expected, healthy, rtol=1e-4), "nothing was left out"
    torch.testing.assert_close(denoised(fast, CACHED), expected, rtol=1e-9, atol=1e-10)
    assert "upstream's own forward was used" not in explained(fast)


# -- offloading --------------------------------------------------------------------------------------------------------


# Of diffusers' own, its DiT refuses to be offloaded in groups; in one PixArt norms have weights to be loaded.
OFFLOADED_NAMES = ("pixart", "pixart-sizes", "diffusers-latte", "sd3.5", "flux", "wan", "cogvideox", "hunyuan-video")
OFFLOADED = [t for t in TINY if t.name in OFFLOADED_NAMES]


@pytest.mark.parametrize("tiny", OFFLOADED, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("kind", "order"), [("block_level", "before"), ("block_level", "after"), ("leaf_level", "after")]
)
def test_group_offload(tiny: Tiny, kind: str, order: str, tmp_path):
    """To disk: until a group is loaded, its parameters hold nothing, so a part that is read without it would show."""
    model = build(tiny).eval()
    (x,), more = tiny.inputs(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = model(x, **more).sample
        fast = twin(model)
        offload = {"onload_device": torch.device("cpu"), "offload_type": kind, "offload_to_disk_path": str(tmp_path)}
        if kind == "block_level":
            offload["num_blocks_per_group"] = 1
        if order == "after":
            opendit.accelerate(fast).enable_group_offload(**offload)
        else:
            fast.enable_group_offload(**offload)
            opendit.accelerate(fast)
        for _ in range(2):
            torch.testing.assert_close(fast(x, **more).sample, expected, rtol=1e-4, atol=1e-4)
        hooked = any(isinstance(m, Patched) and "forward" in m.__dict__ for m in fast.modules())
    if order == "after" and hooked:
        with pytest.raises(ValueError, match="was replaced after accelerate"):
            opendit.restore(fast)
        return
    if order == "after":  # leaf by leaf, where nothing that was changed is a leaf
        assert tiny.name in ("sd3.5", "flux", "cogvideox", "hunyuan-video")
    with torch.no_grad():
        torch.testing.assert_close(opendit.restore(fast)(x, **more).sample, expected, rtol=1e-4, atol=1e-4)


def test_accelerating_what_is_offloaded_leaf_by_leaf_is_refused(tmp_path):
    model = build(PIXART).eval()
    before = types(model)
    offload = {
        "onload_device": torch.device("cpu"),
        "offload_type": "leaf_level",
        "offload_to_disk_path": str(tmp_path),
    }
    model.enable_group_offload(**offload)
    with pytest.raises(ValueError, match=r"nothing in it can be accelerated.*call accelerate before"):
        opendit.accelerate(model)
    assert types(model) == before


def test_an_activation_replaced_later_is_honoured():
    from diffusers.models.attention import FeedForward

    model = build(PIXART, F64)
    fast = opendit.accelerate(twin(model))
    gated = FeedForward(48, activation_fn="geglu").double()
    for m in (model, fast):
        m.transformer_blocks[0].ff.net[0] = gated.net[0]
        inner = m.transformer_blocks[1].ff.net[0]
        inner.forward = lambda h, inner=inner: inner.proj(h).relu()
    close(run(fast, PIXART), run(model, PIXART))
