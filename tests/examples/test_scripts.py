"""image/train.py and sample.py as a user runs them: small jobs end to end, and mistakes that cost one line."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from examples.models.checkpoint import infer_arguments, load_checkpoint
from examples.models.dit import DIT_MODELS, DiT

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--depth", "1", "--hidden-size", "32", "--num-heads", "2", "--batch-size", "8", "--device", "cpu"]
QUICK = [*TINY, "--steps", "3", "--compare-steps", "0", "--sample-steps", "2"]


def run(script: str, *arguments, launcher=(sys.executable,), **options) -> subprocess.CompletedProcess:
    """In a process of its own, as from the shell."""
    command = [*launcher, str(ROOT / "examples/image" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def call(monkeypatch):
    """The same without the seconds that a new process spends on imports."""

    def call_main(script: str, *arguments, kind: str = "image") -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(f"examples.{kind}.{script.removesuffix('.py')}").main()

    return call_main


def test_samples_as_files_are_data_again_whatever_the_batch(trained, tmp_path, call):
    from examples.data import open_data

    options = ["--checkpoint", trained, "--classes", 3, 5, "--per_class", 2, "--steps", 2, "--device", "cpu"]
    call("sample.py", *options, "--out_dir", tmp_path / "a")
    call("sample.py", *options, "--out_dir", tmp_path / "b", "--batch_size", 3)
    data, other = (open_data(tmp_path / name, image_size=8) for name in "ab")
    assert [data[i]["label"] for i in range(4)] == [3, 3, 5, 5]  # as in training, whatever classes were drawn
    first = json.loads((tmp_path / "a" / "captions.jsonl").read_text().splitlines()[0])
    assert first == {"file": "000000.png", "class": 3, "class_name": "three"}
    for i in range(4):
        assert (data[i]["pixels"] - other[i]["pixels"]).abs().max() <= 2 / 255


def make_folder(root: Path, per_class: int = 6) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    done = run("train.py", *QUICK, "--outputs", outputs, cwd=outputs)  # not from the repository: that must work too
    assert done.returncode == 0, done.stderr
    return outputs / "digits-flow"


def test_train_leaves_what_it_says(trained):
    assert {path.name for path in trained.iterdir()} == {
        "samples.png",
        "loss.png",
        "model.safetensors",
        "config.json",
        "metrics.json",
        "log.jsonl",
    }
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["loss_last_20"] > 0
    assert 0 <= metrics["requested_class_share"] <= 1
    assert metrics["classifier_held_out_accuracy"] > 0.95
    assert metrics["unreadable_files"] == []
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "grad_norm", "samples_per_s"} <= lines[0].keys()
    assert lines[-1] == {"step": 3, "averaged_loss": metrics["averaged_loss"]}
    assert Image.open(trained / "samples.png").size[0] > 400


def test_checkpoint_rebuilds_the_model(trained):
    model, config = load_checkpoint(trained)
    saved = load_file(trained / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert config["objective"] == "flow"
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_sample_draws_the_asked_classes_the_same_for_a_seed(trained, tmp_path, call):
    images = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / "new" / f"{name}.png"
        options = ["--classes", 4, 2, "--per-class", 3, "--steps", 2, "--seed", seed, "--device", "cpu", "--out", out]
        call("sample.py", "--checkpoint", trained, "--sampler", "euler", *options)
        images.append(np.asarray(Image.open(out)))
    assert images[0].shape == (100, 150, 3)
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_gaussian_on_a_folder_with_a_broken_file(tmp_path, call, capfd):
    folder = make_folder(tmp_path / "pets")
    (folder / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xffno image")
    Image.new("RGB", (20, 20)).save(folder / "dog" / "cut.png")
    whole = (folder / "dog" / "0.png").read_bytes()
    (folder / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    options = ["--data", folder, "--image-size", 8, "--objective", "gaussian", "--num-classes", 3, "--workers", 1]
    call("train.py", *QUICK, "--no-accelerate", *options, "--outputs", tmp_path)
    metrics = json.loads((tmp_path / "pets-gaussian/metrics.json").read_text())
    assert [Path(name).name for name in metrics["unreadable_files"]] == ["broken.jpg", "cut.png"]
    written = capfd.readouterr()  # the loader's worker writes to the same stream
    assert written.err.count("skipping") == 2
    assert "2 files could not be read" in written.out
    model, _ = load_checkpoint(tmp_path / "pets-gaussian")
    assert (model.learn_sigma, model.num_classes, model.in_channels) == (True, 3, 3)
    call("sample.py", "--checkpoint", tmp_path / "pets-gaussian", "--sampler", "ddpm", "--steps", 2,
         "--device", "cpu", "--out", tmp_path / "s.png")  # fmt: skip
    assert Image.open(tmp_path / "s.png").size == (10 * 50, 3 * 50)


def test_speed_table_compares_three_variants(tmp_path):
    from examples.common import Process
    from examples.image.speed import compare, format_table

    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def build_other():
        model, optimizer = build()
        torch.nn.init.zeros_(model.weight)
        return model, optimizer

    def build_broken():
        raise RuntimeError("no compiler\nsecond line")

    def step(model, optimizer, batch):
        loss = (model(batch[0] + torch.randn(8, 4)) - batch[1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    rows = compare(
        {"plain": build, "same": build, "other": build_other, "broken": build_broken},
        step,
        [(torch.randn(8, 4), torch.randn(8, 1))],
        loss_steps=4,
        process=Process(0, 1, torch.device("cpu")),
        images_per_step=8,
    )
    plain, same, other, broken = rows
    assert "max_loss_difference" not in plain
    assert same["max_loss_difference"] == 0
    assert other["max_loss_difference"] > 0
    assert broken["error"] == "RuntimeError: no compiler"
    assert all(row["ms_per_step"] > 0 and row["images_per_s"] > 0 for row in (plain, same, other))
    table = format_table(rows, 4)
    assert "did not run: RuntimeError: no compiler" in table
    assert table.endswith("share one process, whose peak never falls")
    for row in rows[:3]:
        row["peak_memory_mib"] = 1.0
    assert "share one process" not in format_table(rows, 4)


def test_opendit_trains_to_the_same_weights(tmp_path, call):
    enough = ["--steps", 12, "--warmup", 1, "--lr", 1e-2]  # for the blocks to have left their zero start
    for name, flags in (("plain", ["--no-accelerate"]), ("opendit", [])):
        call("train.py", *QUICK, *enough, *flags, "--outputs", tmp_path, "--name", name)
    plain, fast = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "opendit"))
    assert plain["blocks.0.adaLN_modulation.1.weight"].abs().max() > 1e-3
    for state in (plain, fast):
        # Softmax does not see a key bias: its gradient is rounding noise, which Adam blows up to full steps.
        state["blocks.0.attn.qkv.bias"][32:64] = 0
    for key, tensor in plain.items():
        torch.testing.assert_close(fast[key], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("lr", "steps", "words"),
    [
        ("1e30", 1, "the averaged weights are useless"),  # before any loss has shown it
        ("1e30", 3, "at step 2"),
        ("1e30", 10**6, "at step 2"),  # and not a million steps later
    ],
)
def test_diverged_training_stops_in_one_line_and_saves_nothing(tmp_path, call, capsys, lr, steps, words):
    with pytest.raises(SystemExit) as stop:
        call("train.py", *QUICK, "--lr", lr, "--steps", steps, "--outputs", tmp_path, "--name", "x")
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]  # below the progress bar
    assert last.startswith("training diverged: ")
    assert words in last
    assert last.endswith("no weights were exported, try a lower --lr")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"log.jsonl"}


def test_images_that_are_not_finite_are_not_judged(tmp_path, call, capsys):
    with pytest.raises(SystemExit, match="1"):
        call("train.py", *QUICK, "--cfg-scale", "1e38", "--outputs", tmp_path)
    assert "generated images are not finite" in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_of_a_rank_above_0_is_said(monkeypatch, capsys):
    from examples.common import OneLineParser

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    parser = OneLineParser(prog="train.py")
    with pytest.raises(SystemExit), parser.explain_mistakes():
        raise ValueError("no GPU is left\nfor it")
    assert capsys.readouterr().err == "train.py: error: rank 3: no GPU is left for it\n"


@pytest.mark.parametrize(("flags", "words"), [([], "family dit, accelerated"), (["--no-accelerate"], "would")])
def test_explain_prints_the_plan(trained, tmp_path, call, capsys, flags, words):
    options = ["--checkpoint", trained, "--device", "cpu", "--steps", 1, "--out", tmp_path / "x.png", *flags]
    call("sample.py", *options, "--explain")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "expected"), [([], None), (["--compile"], True), (["--no-compile"], False)])
def test_compile_is_on_off_or_left_to_the_device(monkeypatch, flags, expected):
    from examples.common import OneLineParser
    from examples.options import parse_train_options

    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    assert parse_train_options(OneLineParser()).compile is expected


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [[], ["--no_accelerate"], ["--plugin", "zero2"], ["--sequence_parallel_size", 2], ["--sequence_parallel_size", 2,
     "--plugin", "zero2"]],
    ids=["ddp", "plain", "zero2", "sp2", "sp2-zero2"],
)  # fmt: skip
def test_two_processes_train_resume_and_sample_as_one(tmp_path, flags, call):
    """The same global batch: the weights are one process's; drawn by two processes, the images are too."""
    sp = "--sequence_parallel_size" in flags
    size = ["--batch_size", 8 if sp else 4]
    common = [*QUICK, "--lr", 1e-2, "--warmup", 1, "--ckpt_every", 2, "--label_drop", 0,
              "--cfg_scale", 1, "--outputs", tmp_path]  # fmt: skip
    for more in ([], ["--load", "latest", "--steps", 6]):
        done = run(
            "train.py", *common, *size, *flags, "--steps", 4, *more, "--name", "two", launcher=TORCHRUN, env=ALONE
        )
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two/metrics.json").read_text())["processes"] == 2
    call("train.py", *common, "--steps", 6, "--name", "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for state in (one, two):
        state["blocks.0.attn.qkv.bias"][32:64] = 0  # as in test_opendit_trains_to_the_same_weights
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-4, rtol=1e-3)

    draw = ["--checkpoint", tmp_path / "one", "--per_class", 3, "--classes", 1, 2, 3, "--device", "cpu", "--steps", 3,
            "--cfg_scale", 1]  # fmt: skip
    flags = ["--sequence_parallel_size", 2] if sp else []
    done = run("sample.py", *draw, *flags, "--out", tmp_path / "2.png", launcher=TORCHRUN, env=ALONE)
    assert done.returncode == 0, done.stderr
    call("sample.py", *draw, "--out", tmp_path / "1.png")
    pictures = [np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in (1, 2)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("layout", ["flat", "training"])
def test_published_files_load_as_they_are(tmp_path, call, layout):
    torch.manual_seed(0)
    arguments = {**DIT_MODELS["DiT-S/4"], "depth": 2, "input_size": 16, "num_classes": 7}
    state = DiT(**arguments).state_dict()
    ema = {name: tensor + 0.01 for name, tensor in state.items()}
    blob = state if layout == "flat" else {"model": state, "ema": ema, "args": argparse.Namespace(model="DiT-S/4")}
    torch.save(blob, tmp_path / "DiT.pt")
    model, config = load_checkpoint(tmp_path / "DiT.pt")
    expected = state if layout == "flat" else ema
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    assert config["objective"] == "gaussian"
    assert infer_arguments(state).items() >= arguments.items()

    call("sample.py", "--checkpoint", tmp_path / "DiT.pt", "--classes", 0, 6, "--per-class", 1, "--steps", 2,
         "--device", "cpu", "--out", tmp_path / "out.png")  # fmt: skip
    assert load_file(tmp_path / "out.safetensors")["latents"].shape == (2, 4, 16, 16)


def mistake(monkeypatch, capsys, script: str, *arguments) -> str:
    """The one line that the script writes; any traceback or other exit code fails."""
    module = importlib.import_module(f"examples.image.{script}")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2
    written = capsys.readouterr().err.strip()
    assert "\n" not in written
    assert written.startswith(f"{script}.py: error: ")
    return written


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps: '0' is not a whole number above 0"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--steps", "9" * 5000], "is more than 1000000000"),
        (["--seed", "1" * 25], f"{'1' * 25} is more than {2**63 - 1}"),
        (["--seed", 2**63], f"{2**63} is more than {2**63 - 1}"),
        (["--seed", "-1"], "'-1' is not a whole number"),
        (["--num-classes", "99999999999"], "99999999999 is more than 1000000"),
        (["--lr", "nan"], "'nan' is not a number above 0"),
        (["--ema-decay", "1"], "--ema_decay"),
        (["--ema-decay", "0"], "--ema_decay: must be above 0"),
        (["--model", "DiT-XXL/2"], "DiT-XXL/2"),
        (["--objective", "magic"], "magic"),
        (["--nonsense"], "--nonsense"),
        (["--image-size", "9"], "image size 9 is not a multiple of patch size 2"),
        (["--num-heads", "3"], "not a multiple of 3 heads"),
        (["--num-classes", "3"], "the data has 10 classes"),
        (["--batch-size", "100000"], "--batch_size 100000"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--data", __file__], "test_scripts.py"),
        (["--data", ""], "--data_path: the path is empty"),
        (["--outputs", ""], "--outputs: the path is empty"),
        (["--name", "/etc/zz"], "--name: '/etc/zz' is not the name of a sub-folder"),
        (["--name", ".."], "--name: '..' is not"),
        (["--name", "."], "--name: '.' is not"),
        (["--name", ""], "--name: '' is not"),
        (["--kernels", "magic"], "magic"),
        (["--attention", "magic"], "magic"),
        (["--objective", "gaussian", "--sample-steps", "2000"], "1000"),
        (["--epochs", "2", "--steps", "3"], "--epochs: contradicts --steps"),
        (["--min_snr", "5"], "--min_snr: is a weighting of the objectives gaussian and v"),
        (["--objective", "v", "--flow_timesteps", "uniform"], "--flow_timesteps: is for --objective flow, not v"),
        (["--sampler", "ddim"], "--sampler: ddim is none for flow: heun, euler"),
        (["--model", "PixArt-S/2"], "reads texts; name a --text_encoder"),
        (["--model", "Latte-S/2"], "Latte-S/2"),
        (["--num_frames", "16"], "--num_frames"),
        (["--text_encoder", "words", "--num_classes", "20"], "--num_classes: contradicts --text_encoder"),
        (["--sample_prompts", "a dog"], "--sample_prompts: needs a --text_encoder"),
        (["--plugin", "zero2", "--no_accelerate"], "--plugin: zero2 is opendit's"),
        (["--plugin", "zero2", "--compare_steps", "3"], "--compare_steps: the speed table is for whole models"),
        (["--no_accelerate", "--mixed_precision", "fp16"], "--mixed_precision: fp16's loss scale is opendit's"),
        (["--no_accelerate", "--grad_checkpoint"], "--grad_checkpoint: is opendit's"),
        (["--no_accelerate", "--compile"], "--compile: is opendit's"),
        (["--no_accelerate", "--kernels", "reference"], "--kernels: is opendit's"),
        (["--no_accelerate", "--attention", "sdpa"], "--attention: is opendit's"),
        (["--val_every", "3"], "--val_every: there is nothing to judge by; hold out a --val_fraction"),
        (["--conf", "settings.yaml"], "unrecognized arguments: --conf"),
        (["--no_accelerate", "--enable_flashattn"], "--enable_flashattn: on contradicts --no_accelerate"),
        (
            ["--no_accelerate", "--sequence_parallel_size", "1", "--enable_modulate_kernel"],
            "contradicts --no_accelerate",
        ),
        (["--sequence_parallel_type", "ring"], "needs a --sequence_parallel_size above 1"),
        (["--sequence_parallel_size", "2"], "2 does not divide the 1 processes"),
        (["--kernels", "reference", "--enable_modulate_kernel", "off"], "--kernels: contradicts"),
        (["--attention", "sdpa", "--enable_flashattn", "off"], "--attention: contradicts --enable_flashattn"),
        (
            ["--enable_layernorm_kernel", "--enable_modulate_kernel", "off"],
            "on contradicts --enable_modulate_kernel off",
        ),
        (["--enable_flashattn", "on"], "flash kernels need a GPU"),
        (["--load", "/nowhere"], "--load /nowhere is no folder"),
        (["--val_fraction", "0.0001"], "--val_fraction 0.0001"),
        (["--grad_clip", "-1"], "--grad_clip: -1.0 is not"),
        (["--schedule", "wsd"], "wsd"),
        (["--label_drop", "0"], "--label_drop: 0 leaves nothing to guide by; take --cfg_scale 1 with it"),
    ],
)
def test_train_mistakes_cost_one_line(monkeypatch, capsys, tmp_path, arguments, words):
    assert words in mistake(monkeypatch, capsys, "train", "--outputs", tmp_path, "--device", "cpu", *arguments)


def test_train_refuses_folders_it_cannot_use(monkeypatch, capsys, tmp_path):
    imageless = tmp_path / "notes"
    (imageless / "a").mkdir(parents=True)
    (imageless / "a" / "readme.txt").write_text("no image")
    assert "holds no images" in mistake(monkeypatch, capsys, "train", "--data", imageless, "--outputs", tmp_path)
    a_file = tmp_path / "file"
    a_file.write_text("")
    assert str(a_file) in mistake(monkeypatch, capsys, "train", *TINY, "--outputs", a_file)


def settings(tmp_path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_a_yaml_file_holds_the_same_settings_and_the_command_line_goes_first(monkeypatch, tmp_path):
    from examples.common import OneLineParser
    from examples.options import parse_train_options

    text = "model: DiT-S/4\nlr: 1.0e-4\nno_flip: true\ncompile: false\nenable_flashattn: off\nsample_every:\nsteps: 7"
    text += "\ngrad_checkpoint: off\nenable_modulate_kernel: on"
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(settings(tmp_path, text)), "--steps", "9"])
    args = parse_train_options(OneLineParser())
    assert (args.model, args.lr, args.no_flip, args.compile, args.enable_flashattn, args.sample_every, args.steps) == (
        "DiT-S/4", 1e-4, True, False, "off", 0, 9)  # fmt: skip
    assert (args.grad_checkpoint, args.enable_modulate_kernel) == ("off", "on")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(settings(tmp_path, "grad_checkpoint: true"))])
    assert parse_train_options(OneLineParser()).grad_checkpoint == "full"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("leraning_rate: 1", "sets 'leraning_rate', which is no setting of train.py"),
        ("batchsize: 1", "did you mean 'batch_size'?"),
        ("steps: many", "'many' is not a whole number"),
        ("objective: magic", "magic"),
        ("no_flip: 3", "sets no_flip to 3; allowed: true or false"),
        ("- steps", "holds a list; allowed: names with values"),
        ("steps: [", "settings.yaml"),
        ("a: !!python/object/apply:os.system ['touch /tmp/no']", "settings.yaml"),
        ("objective: v\nsampler: euler", "--sampler: euler is none for v"),
    ],
)
def test_mistakes_in_a_yaml_file_cost_one_line(monkeypatch, capsys, tmp_path, text, words):
    given = ["--config", settings(tmp_path, text), "--outputs", tmp_path]
    assert words in mistake(monkeypatch, capsys, "train", *given)
    assert "--config" in mistake(monkeypatch, capsys, "train", "--config", tmp_path / "missing.yaml")


def test_mistakes_are_found_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("examples.image.train.open_images", None)
    monkeypatch.setattr("examples.image.train.build", None)
    assert "--min_snr" in mistake(monkeypatch, capsys, "train", "--min_snr", 5, "--outputs", tmp_path)


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ([], "auto"),
        (["--kernels", "reference"], "reference"),
        (["--enable_modulate_kernel", "off"], dict.fromkeys(
            ("gate_residual", "gate_residual_layernorm_modulate", "layernorm_modulate"), "reference")),
        (["--enable_layernorm_kernel", "off"], dict.fromkeys(
            ("gate_residual_layernorm_modulate", "layernorm_modulate"), "reference")),
        (["--enable_layernorm_kernel", "off", "--enable_modulate_kernel", "on"], {
            "gate_residual": "triton", "gate_residual_layernorm_modulate": "reference",
            "layernorm_modulate": "reference"}),
    ],
)  # fmt: skip
def test_kernel_flags_name_opendits_kernels(monkeypatch, flags, kernels):
    from examples.common import OneLineParser
    from examples.options import attention_of, kernels_of, parse_train_options

    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    args = parse_train_options(OneLineParser())
    assert kernels_of(args) == kernels
    assert attention_of(args, on_gpu=True) == "auto"
    args.enable_flashattn = "off"
    assert attention_of(args, on_gpu=True) == "sdpa-math"
    args.enable_flashattn = "on"
    assert attention_of(args, on_gpu=True) == "sdpa-flash"


@pytest.mark.parametrize("flags", [["--no_accelerate"], []])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, call, flags, monkeypatch, capsys):
    options = [*QUICK, "--steps", 6, "--ckpt_every", 3, "--schedule", "cosine", "--accum", 2, "--val_fraction", 0.1,
               "--val_every", 3, "--sample_every", 3, "--objective", "v", *flags]  # fmt: skip
    call("train.py", *options, "--outputs", tmp_path, "--name", "whole")
    load = ["--load", tmp_path / "whole" / "checkpoints" / "step-00000003"]
    call("train.py", *options, "--outputs", tmp_path, "--name", "resumed", *load)
    whole, resumed = (tmp_path / name for name in ("whole", "resumed"))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    ends = [json.loads((folder / "log.jsonl").read_text().splitlines()[-1]) for folder in (whole, resumed)]
    assert ends[0] == ends[1]
    assert "val_loss" in ends[0]
    assert {path.name for path in (whole / "samples").iterdir()} == {"step-000003.png", "step-000006.png"}
    # And once more from where it stopped, by name.
    metrics = (whole / "metrics.json").read_text()
    with pytest.raises(SystemExit):
        call("train.py", *options, "--outputs", tmp_path, "--name", "whole", "--load", "latest")
    assert (whole / "metrics.json").read_text() == metrics
    # Nor does a new run mix its checkpoints with these.
    capsys.readouterr()
    said = mistake(monkeypatch, capsys, "train", *options, "--outputs", tmp_path, "--name", "whole")
    assert "whole/checkpoints holds another run's" in said


def test_a_run_that_was_never_saved_starts_from_the_beginning_with_latest(tmp_path, call):
    call("train.py", *QUICK, "--outputs", tmp_path, "--load", "latest")
    assert json.loads((tmp_path / "digits-flow/metrics.json").read_text())["steps"] == 3


def test_training_from_latents_is_training_from_pixels_to_the_bit(tmp_path, call):
    """A real VAE and a text encoder, tiny: encoded at every step, or once by preprocess.py."""
    from tests.examples.making import captioned_folder, tiny_text_encoder, tiny_vae

    data = captioned_folder(tmp_path / "data", 9)
    tiny_vae(tmp_path / "vae")
    tiny_text_encoder(tmp_path / "text", "t5")
    networks = ["--vae", tmp_path / "vae", "--text_encoder", tmp_path / "text"]
    made = ["--data_path", data, "--out", tmp_path / "latents", "--image_size", 16, "--device", "cpu"]
    call("preprocess.py", *made, *networks)
    options = [*QUICK, "--model", "PixArt-Digits/2", "--image_size", 16, "--no_flip", *networks, "--outputs", tmp_path]
    for name, path in (("pixels", data), ("latents", tmp_path / "latents")):
        call("train.py", *options, "--data_path", path, "--name", f"from-{name}")
    first, second = (load_file(tmp_path / f"from-{name}" / "model.safetensors") for name in ("pixels", "latents"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    draw = ["--checkpoint", tmp_path / "from-latents", "--prompts", "a red cat", "--per_class", 2, "--steps", 2]
    call("sample.py", *draw, "--device", "cpu", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (100, 50)


@pytest.mark.parametrize("model", ["PixArt-Digits/2", "DiT-Digits/2"])
def test_text_to_image_end_to_end(tmp_path, call, model):
    """Digits by their names: train, resume, draw by prompt, with and without a negative prompt."""
    options = [*QUICK, "--model", model, "--text_encoder", "words", "--lr", 1e-2, "--warmup", 1, "--ckpt_every", 4,
               "--outputs", tmp_path, "--name", "t"]  # fmt: skip
    call("train.py", *options, "--steps", 4)
    call("train.py", *options, "--steps", 8, "--load", "latest", "--sample_prompts", "nine", "one")
    common = ["--checkpoint", tmp_path / "t", "--prompts", "three", "four", "--per_class", 2, "--device", "cpu",
              "--steps", 2]  # fmt: skip
    images = []
    for name, flags in (("a", []), ("b", ["--negative_prompt", "five"]), ("c", ["--batch_size", 3, "--no_accelerate"])):
        call("sample.py", *common, *flags, "--out", tmp_path / f"{name}.png")
        images.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int))
    assert images[0].shape == (100, 100, 3)
    assert np.abs(images[0] - images[2]).max() <= 1
    assert not np.array_equal(images[0], images[1])


def test_sample_mistakes_cost_one_line(monkeypatch, capsys, trained, tmp_path):
    def said(*arguments) -> str:
        return mistake(monkeypatch, capsys, "sample", "--device", "cpu", "--out", tmp_path / "x.png", *arguments)

    with monkeypatch.context() as patch:
        patch.setattr("examples.options.SHIPPED", (tmp_path / "none",))
        assert "--checkpoint: is needed" in said()
    assert "does not exist" in said("--checkpoint", tmp_path / "missing")
    text = tmp_path / "text.safetensors"
    text.write_text("not a checkpoint")
    assert "not a safetensors file" in said("--checkpoint", text)
    lonely = tmp_path / "lonely" / "model.safetensors"
    lonely.parent.mkdir()
    lonely.write_bytes((trained / "model.safetensors").read_bytes())
    assert "no config.json" in said("--checkpoint", lonely)
    lonely.with_name("config.json").write_text('{"model": {"depth": 9}, "objective": "flow", "pixels": true}')
    assert "does not fit a DiT" in said("--checkpoint", lonely)
    whole = json.loads((trained / "config.json").read_text())
    for change, words in (
        ({"objective": None}, "config.json: 'objective' is None, which is no str"),
        ({"objective": "magic"}, "config.json: 'objective' is 'magic'; there are flow, gaussian, v"),
        ({"pixels": "yes"}, "config.json: 'pixels' is 'yes', which is no bool"),
        ({"model": {**whole["model"], "num_heads": 0}}, "does not fit a DiT"),
    ):
        lonely.with_name("config.json").write_text(json.dumps({**whole, **change}))
        assert words in said("--checkpoint", lonely)
    for key in ("model", "objective", "pixels"):
        lacking = {name: value for name, value in whole.items() if name != key}
        lonely.with_name("config.json").write_text(json.dumps(lacking))
        assert f"config.json has no '{key}'" in said("--checkpoint", lonely)
    lonely.with_name("config.json").write_bytes(b"\xff")
    assert "is not JSON" in said("--checkpoint", lonely)
    pickled = tmp_path / "bad.pt"
    torch.save({"model": ROOT}, pickled)
    assert "does not hold a model's tensors" in said("--checkpoint", pickled)
    assert "knows 0 … 9" in said("--checkpoint", trained, "--classes", 10)
    assert "takes heun or euler" in said("--checkpoint", trained, "--sampler", "ddim")
    assert "--prompts: this checkpoint takes classes" in said("--checkpoint", trained, "--prompts", "a dog")
    assert "--negative_prompt: this checkpoint takes classes" in said("--checkpoint", trained, "--negative_prompt", "x")
    assert "--text_encoder: this checkpoint takes classes" in said("--checkpoint", trained, "--text_encoder", "words")
    assert "--vae: this checkpoint makes pixels" in said("--checkpoint", trained, "--vae", "x")
    assert "--out: contradicts --out_dir" in said("--checkpoint", trained, "--out_dir", tmp_path / "files")
    assert "contradicts --classes" in said("--checkpoint", trained, "--prompts", "a dog", "--classes", 1)
    assert "means nothing with --cfg_scale 1" in said(
        "--checkpoint", trained, "--negative_prompt", "x", "--cfg_scale", 1
    )
    assert "--cfg_interval: 0.5 0.2" in said("--checkpoint", trained, "--cfg_interval", 0.5, 0.2)
    assert not (tmp_path / "x.png").exists()


def test_sample_looks_at_its_output_before_it_draws(monkeypatch, capsys, trained, tmp_path):
    def said(out) -> str:
        return mistake(monkeypatch, capsys, "sample", "--checkpoint", trained, "--device", "cpu", "--out", out)

    monkeypatch.setattr("examples.drawing.sample", None)
    monkeypatch.chdir(tmp_path)
    for out in ("x.xyz", "x", tmp_path):
        assert "does not end in one of .bmp, .jpeg, .jpg, .png" in said(out)
    assert "the path is empty" in said("")
    (tmp_path / "folder.png").mkdir()
    assert "Is a directory" in said("folder.png")
    (tmp_path / "file").touch()
    assert "file" in said("file/x.png")
    assert "more than" in mistake(monkeypatch, capsys, "sample", "--checkpoint", trained, "--seed", "1" * 25)


def test_mistakes_in_a_real_process_exit_with_2_and_one_line(tmp_path):
    for script, arguments in (("train.py", ["--data", "/nowhere"]), ("sample.py", ["--checkpoint", "/nowhere"])):
        done = run(script, *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stdout == ""


def test_latents_bring_their_vae_and_refuse_another(tmp_path, call, monkeypatch, capsys):
    from tests.examples.making import image_folder, tiny_text_encoder, tiny_vae

    data, vae = image_folder(tmp_path / "data", per_class=4), tiny_vae(tmp_path / "vae")
    other, text = tiny_vae(tmp_path / "other"), tiny_text_encoder(tmp_path / "text", "t5")
    call("preprocess.py", "--data_path", data, "--out", tmp_path / "latents", "--image_size", 16, "--device", "cpu",
         "--vae", vae)  # fmt: skip
    options = [*QUICK, "--data_path", tmp_path / "latents", "--image_size", 16, "--outputs", tmp_path]
    capsys.readouterr()
    assert "Train with --no_flip" in mistake(monkeypatch, capsys, "train", *options)
    options += ["--no_flip"]
    assert f"were made with {vae}" in mistake(monkeypatch, capsys, "train", *options, "--vae", other)
    assert "were made without" in mistake(monkeypatch, capsys, "train", *options, "--text_encoder", text)
    monkeypatch.chdir(tmp_path)
    call("train.py", *options, "--name", "x", "--vae", "vae")  # the same folder by another path
    call("train.py", *options, "--name", "y")
    config = json.loads((tmp_path / "y" / "config.json").read_text())
    assert (config["pixels"], config["vae"]) == (False, str(vae))
    assert Image.open(tmp_path / "y" / "samples.png").size == Image.open(tmp_path / "x" / "samples.png").size
    call("sample.py", "--checkpoint", tmp_path / "y", "--steps", 2, "--per_class", 1, "--device", "cpu")
    assert not (tmp_path / "samples.safetensors").exists()  # the VAE decoded them


def test_pixart_takes_as_many_tokens_as_the_encoder_makes():
    from types import SimpleNamespace

    from examples.encoding import Encoder, model_config

    args = SimpleNamespace(depth=1, hidden_size=32, num_heads=2, label_drop=0.1, num_classes=None)
    encoder = Encoder(None, "bert", "PixArt", [], torch.device("cpu"))
    for length, allowed in ((128, 128), (32, 120)):
        item = {"pixels": torch.zeros(3, 8, 8), "text": torch.zeros(length, 8), "pooled": torch.zeros(8)}
        config = model_config(args, [item], encoder, False, {})
        assert config["model"]["max_tokens"] == allowed


def test_without_dropped_labels_there_is_no_guidance(tmp_path, call, monkeypatch, capsys):
    call("train.py", *QUICK, "--label_drop", 0, "--cfg_scale", 1, "--outputs", tmp_path, "--name", "x")
    draw = ["--checkpoint", tmp_path / "x", "--steps", 2, "--per_class", 1, "--device", "cpu"]
    call("sample.py", *draw, "--out", tmp_path / "x.png")
    capsys.readouterr()
    said = mistake(monkeypatch, capsys, "sample", *draw, "--cfg_scale", 2, "--out", tmp_path / "x.png")
    assert "trained with --label_drop 0" in said


def test_diverged_training_with_checkpoints_stops_in_one_line_too(tmp_path, call, capsys):
    options = [*QUICK, "--no_accelerate", "--lr", "1e30", "--ckpt_every", 1, "--log_every", 100, "--steps", 5]
    with pytest.raises(SystemExit) as stop:
        call("train.py", *options, "--grad_clip", 0, "--outputs", tmp_path, "--name", "x")
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("training diverged: ")


def test_a_resumed_run_takes_the_new_lr_and_says_what_differs(tmp_path, call, capsys):
    options = [*QUICK, "--warmup", 1, "--ckpt_every", 2, "--outputs", tmp_path, "--name", "x", "--log_every", 1]
    call("train.py", *options, "--lr", 1e-3, "--steps", 2)
    log = tmp_path / "x" / "log.jsonl"
    kept = log.read_text().splitlines()[:2]
    log.write_text("\n".join(kept) + '\n{"step": 2, "lo')  # torn by a kill
    call("train.py", *options, "--lr", 1e-4, "--steps", 4, "--load", "latest", "--sampler", "euler")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("going on from"))
    assert said.endswith("with other settings: steps 4 (was 2), lr 0.0001 (was 0.001), sampler euler (was heun)")
    assert log.read_text().splitlines()[:2] == kept
    assert [json.loads(line).get("lr") for line in log.read_text().splitlines()[2:4]] == [1e-4, 1e-4]


def test_looking_whether_a_file_can_be_written_survives_another_process(tmp_path, monkeypatch):
    from examples.common import check_writable

    opened = Path.open

    def open_and_lose(self, *mode):
        file = opened(self, *mode)
        self.unlink()  # the other process was done first
        return file

    monkeypatch.setattr(Path, "open", open_and_lose)
    check_writable(tmp_path / "new" / "x.png")
    assert not list((tmp_path / "new").iterdir())
