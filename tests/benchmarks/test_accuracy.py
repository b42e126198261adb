"""The accuracy runs: what differs between variants is speed alone, and what is written is what was found."""

from __future__ import annotations

import io
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.accuracy import (
    alignment,
    cifar,
    classifier,
    files,
    page,
    prepare,
    resnet,
    text_to_image,
    text_to_video,
    upstream,
)
from benchmarks.accuracy import training as accuracy
from benchmarks.accuracy.training import START_UP, Trainer, Way, train
from benchmarks.records import load
from examples.models.checkpoint import load_checkpoint
from examples.models.dit import DiT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="smoke runs are for machines without a GPU")


def smoke(monkeypatch: pytest.MonkeyPatch, script, out: Path, *options: object) -> dict:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--smoke", "--out", str(out), *map(str, options)])
    assert script.main() == 0
    return load(out)[-1].data


# --- training against the clock ---


class Ticking:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def small_script():
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=10,
                learn_sigma=False)  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.1)
    images, labels = torch.rand(30, 3, 8, 8) * 2 - 1, torch.arange(30) % 10
    return model.train(), images, labels


def trained(way: Way, steps: int = 14, lr: float = 1e-3, draws: int = 0):
    """`draws`: how many random numbers someone else takes after each step."""
    model, images, labels = small_script()
    args = type("Args", (), {"batch": 6, "seed": 3})
    trainer = Trainer(model, way, cifar.flow_loss(images, labels, args), lr=lr, ema=0.9)
    losses = torch.stack([trainer.step() + 0 * torch.rand(draws).sum() for _ in range(steps)])
    return losses, trainer.averaged(), dict(model.named_parameters())


def test_every_way_is_the_same_script():
    """In fp32 on a CPU: equal losses, weights and averages, published, foreach, and accelerated."""
    losses, averages, weights = trained(Way(bf16=False, plain=True))
    assert losses.std() > 1e-3  # the steps' data differ
    start = small_script()[0].state_dict()
    assert any((weights[name] - start[name]).abs().max() > 1e-4 for name in weights)
    for draws, way in enumerate((Way(bf16=False), Way(bf16=False, accelerated=True)), start=1):
        other_losses, other_averages, other_weights = trained(way, draws=draws)
        torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
        assert other_averages.keys() == averages.keys()
        for name, value in averages.items():
            torch.testing.assert_close(other_averages[name], value, rtol=1e-4, atol=1e-6, msg=name)
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_averages_are_averages():
    _, averages, weights = trained(Way(bf16=False), steps=1, lr=100.0)
    start = small_script()[0].state_dict()
    for name, value in weights.items():
        expected = start[name] + (1 - 2 / 11) * (value.detach() - start[name])
        torch.testing.assert_close(averages[name], expected, msg=name)


def test_the_clock_counts_training_and_nothing_else(monkeypatch):
    clock = Ticking()
    monkeypatch.setattr(accuracy, "time", clock)

    class Fake:
        device, way = torch.device("cpu"), Way()
        taken = 0

        def step(self):
            self.taken += 1
            clock.now += 7.0 if self.taken <= START_UP else 0.5
            return torch.tensor(float(self.taken))

        def averaged(self):
            clock.now += 100.0
            return {"steps": torch.tensor(self.taken)}

    done = train(Fake(), seconds=10.0, snapshots=4)
    assert done.start_up_s == 7.0 * START_UP
    assert done.seconds == 10.0
    assert len(done.losses) == START_UP + 20
    assert [s.seconds for s in done.snapshots] == [2.5, 5.0, 7.5, 10.0]
    assert [s.steps for s in done.snapshots] == [START_UP + n for n in (5, 10, 15, 20)]
    assert [int(s.weights["steps"]) for s in done.snapshots] == [s.steps for s in done.snapshots]
    assert done.steps_per_s == 2.0
    by_steps = train(Fake(), seconds=1e9, snapshots=2, max_steps=20)
    assert [s.steps for s in by_steps.snapshots] == [START_UP + 1, 20]  # the start-up is half of the steps


# --- networks that judge ---


def test_resnet_is_its_formula():
    """One block a stage, written out: shortcuts take every second pixel and pad channels with zeros on both sides."""
    torch.manual_seed(0)
    net = resnet.ResNet(blocks=1).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    x = (images + 1) / 2
    x = torch.stack([(x[:, i] - resnet.MEAN[i]) / resnet.STD[i] for i in range(3)], dim=1)
    x = net.bn1(net.conv1(x)).relu()
    for stage in (net.layer1, net.layer2, net.layer3):
        block = stage[0]
        y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        short = torch.zeros_like(y)
        if y.shape == x.shape:
            short = x
        else:
            short[:, x.shape[1] // 2 : x.shape[1] // 2 + x.shape[1]] = x[:, :, ::2, ::2]
        x = (y + short).relu()
    features, logits = net(images)
    torch.testing.assert_close(features, x.mean((2, 3)))
    torch.testing.assert_close(logits, features @ net.linear.weight.T + net.linear.bias)
    assert sum(name.endswith("conv1.weight") for name in resnet.ResNet().state_dict()) == 28


def test_the_judge_scores_what_is_drawn(monkeypatch):
    """Real test images in place of drawn ones get the score of real test images; training images have no distance."""
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--smoke"])
    data = cifar.invented(0)
    model = {"input_size": 32, "patch_size": 8, "in_channels": 3, "num_classes": 10, "hidden_size": 16, "depth": 1,
             "num_heads": 2, "learn_sigma": False}  # fmt: skip
    judge = cifar.Judge(data, torch.device("cpu"), model, cifar.parse())
    judge.resnet.linear.weight.data.normal_(0, 30)  # opinions
    judge.test, judge.test_logits = judge.moments(data["test"].float() / 127.5 - 1)
    logits = judge.resnet(data["test"].float() / 127.5 - 1)[1]
    right = (logits.argmax(1) == data["test.labels"]).double().mean().item()
    assert 0 < right < 1
    assert judge.real()["accuracy"] == right
    for split, asked in (("test", data["test.labels"]), ("test", (data["test.labels"] + 1) % 10), ("train", None)):
        images = data[split].float() / 127.5 - 1
        labels = data[f"{split}.labels"] if asked is None else asked
        monkeypatch.setattr(judge, "draw", lambda *_, drawn=(images, labels), **__: drawn)
        score = judge.score(1.0)
        assert abs(score["distance_to_test" if split == "test" else "distance"]) < 1e-9
        if split == "test":
            assert score["distance"] == pytest.approx(judge.real()["distance"])
            assert score["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    judge.take({name: torch.zeros_like(value) for name, value in judge.net.state_dict().items()})
    assert all(not value.any() for value in judge.net.parameters())


def test_the_classifier_learns_what_can_be_learned():
    torch.manual_seed(0)
    bright, tall = torch.arange(40) % 2, torch.arange(40) // 2 % 2
    images = torch.randn(40, 3, 16, 16) * 0.1 - 0.5
    images[bright == 1, 0] += 1
    for i in range(40):
        images[i, 1, 4 : 4 + (8 if tall[i] else 2), 7:9] += 2
    answers, counts = {"bright": bright, "tall": tall}, {"bright": 2, "tall": 2}
    model = classifier.fit(images[:32], {n: v[:32] for n, v in answers.items()}, counts, steps=60, width=8, layers=2)
    found = classifier.accuracy(model, images[32:], {n: v[32:] for n, v in answers.items()}, batch=3)
    assert found == {"bright": 1.0, "tall": 1.0, "all": 1.0}
    wrong = classifier.accuracy(model, images[32:], {"bright": 1 - bright[32:], "tall": tall[32:]})
    assert wrong == {"bright": 0.0, "tall": 1.0, "all": 0.0}


def test_nearest_real_image():
    real = torch.rand(20, 3, 4, 4)
    asked = torch.tensor([3, 7, 11])
    drawn = real[asked] + 0.01
    drawn[2] = real[5]
    assert text_to_image.nearest(drawn, real, asked)["first"] == pytest.approx(2 / 3)
    assert text_to_image.nearest(drawn, real, asked)["chance"] == 1 / 20


# --- data files ---


def test_files_there_and_back(tmp_path):
    pictures = [np.random.default_rng(i).integers(0, 256, (4 + i, 6, 3), dtype=np.uint8) for i in range(3)]
    encoded = []
    for picture in pictures:
        held = io.BytesIO()
        Image.fromarray(picture).save(held, "WEBP", lossless=True)
        encoded.append(held.getvalue())
    files.write(tmp_path / "x.safetensors", files.packed("a", encoded), captions=["ä", "b"])
    tensors, lists = files.read(tmp_path / "x.safetensors")
    assert lists == {"captions": ["ä", "b"]}
    for found, picture in zip(files.unpacked(tensors, "a"), pictures, strict=True):
        assert np.array_equal(found, picture)
    with pytest.raises(ValueError, match=r"data: .*none.safetensors does not exist; write it with"):
        files.read(tmp_path / "none.safetensors")


def test_cifar_is_prepared_to_the_pixel(tmp_path):
    data = tmp_path / "data"
    (data / "cifar10").mkdir(parents=True)
    (data / "cifar_resnet").mkdir()
    generator = np.random.default_rng(0)
    sheets = {f"{split}_{i}.webp": generator.integers(0, 256, (4 * 32, 32, 3), dtype=np.uint8)
              for split, count in (("train", 5), ("test", 1)) for i in range(count)}  # fmt: skip
    for name, sheet in sheets.items():
        Image.fromarray(sheet).save(data / "cifar10" / name, lossless=True)
    labels = {"train": list(range(20)), "test": [3, 1, 2, 0]}
    splits = {s: {"sheets": [n for n in sheets if n.startswith(s)], "labels": labels[s]} for s in labels}
    (data / "cifar10/labels.json").write_text(json.dumps({"classes": ["a", "b"], "splits": splits}))
    network = resnet.ResNet(blocks=1).state_dict()
    save_file(network, data / "cifar_resnet/resnet56.safetensors")
    found = cifar.load(prepare.cifar(data, tmp_path / "out"))
    for split in ("train", "test"):
        pixels = np.concatenate([sheets[name].reshape(-1, 32, 32, 3) for name in splits[split]["sheets"]])
        assert np.array_equal(found[split].permute(0, 2, 3, 1).numpy(), pixels)
        assert found[f"{split}.labels"].tolist() == labels[split]
    assert found["classes"] == ["a", "b"]
    for name, value in network.items():
        torch.testing.assert_close(found["resnet"][name], value.float(), rtol=1e-3, atol=1e-4)


def test_captions_of_shapes_become_labels():
    assert prepare._parts("a darkish purple star in circular motion") == {
        "colour": "purple", "shape": "star", "motion": "circular",
    }  # fmt: skip


def test_clips_there_and_back(tmp_path):
    clips = torch.randint(0, 256, (3, 16, 3, 32, 32), dtype=torch.uint8)
    tensors = files.packed("clips", [prepare._strip(clip) for clip in clips])
    tensors |= {f"clips.{name}": torch.arange(3) for name in text_to_video.QUESTIONS} | {"pooled": torch.randn(3, 8)}
    files.write(tmp_path / "x.safetensors", tensors, captions=list("abc"))
    found = text_to_video.load(tmp_path / "x.safetensors")
    assert torch.equal(((found["clips"] + 1) * 127.5).round().byte(), clips)
    torch.testing.assert_close(found["pooled"].square().mean(1), torch.ones(3))


# --- whole runs, and the page ---


UPSTREAM = {
    "models.py": """
        from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
        from examples.models import dit
        def tiny(input_size, in_channels, num_classes):
            model = dit.DiT(input_size, 8, in_channels, 32, 2, 2, num_classes=num_classes)
            model.x_embedder = PatchEmbed(input_size, 8, in_channels, 32, bias=True)
            for block in model.blocks:
                block.attn = Attention(32, num_heads=2, qkv_bias=True)
            for p in model.parameters():
                if not p.any():
                    p.data.normal_(0, 0.05)
            return model
        DiT_models = {"DiT-S/8": tiny}
        """,
    "diffusion/__init__.py": """
        from examples.diffusion.gaussian import GaussianDiffusion
        class Diffusion(GaussianDiffusion):
            num_timesteps = 1000
            def training_losses(self, model, x, t, model_kwargs):
                return {"loss": self.loss(model, x, model_kwargs, t=t)}
        def create_diffusion(timestep_respacing):
            return Diffusion()
        """,
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name, text in UPSTREAM.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, clone) -> Path:
    """The folder that all four leave their files in."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        smoke(patch, cifar, out, "--variants", "published", "opendit")
        smoke(patch, alignment, out, "--upstream", clone, "--runs", "fp32:plain", "fp32:opendit")
        smoke(patch, text_to_image, out)
        smoke(patch, text_to_video, out)
    return out


def record(runs: Path, theme: str) -> dict:
    return next(r.data for r in load(runs) if r.theme == theme)


def test_cifar_run(runs):
    found = record(runs, "accuracy_cifar")
    assert [row["variant"] for row in found["results"]] == ["published", "opendit"]
    for row in found["results"]:
        assert row["steps"] == 14
        assert [point["steps"] for point in row["points"]][-1] == 14
        assert row["points"][-1]["distance"] == pytest.approx(row["final"]["1.0"]["distance"])
        assert Image.open(runs / f"cifar_{row['variant']}.png").size == (680, 680)
    one, other = (np.array(row["curve"]["losses"]) for row in found["results"])
    assert np.abs(one - other).max() < 0.05  # fp32 and bf16
    model, config = load_checkpoint(runs / "checkpoint", kind="image")
    assert model.num_classes == len(config["classes"]) == 10
    card = (runs / "checkpoint/README.md").read_text()
    for word in ("Training:", "Data:", "Measured", "Licence:", "variant `opendit`"):
        assert word in card
    assert all(value.dtype == torch.bfloat16 for value in load_file(runs / "checkpoint/model.safetensors").values())


def test_alignment_run(runs):
    found = record(runs, "accuracy_alignment")
    assert [row["steps"] for row in found["results"]] == [3, 3]
    (compared,) = found["comparisons"]
    assert (compared["run"], compared["baseline"], compared["steps"]) == ("fp32:opendit", "fp32:plain", 3)
    assert compared["max_step"] < 1e-4
    assert found["layers"] == "stand-ins for timm's"
    assert found["command"].startswith("python benchmarks/accuracy/")
    assert "/" not in found["command"].partition("accuracy/")[2]


@pytest.mark.parametrize("run", ["fp32:plain", "fp32:opendit"])
def test_an_alignment_that_was_cut_goes_on_to_the_bit(run, clone, tmp_path, monkeypatch):
    images = torch.randint(256, (6, 3, 32, 32)).byte()  # an epoch has three batches
    monkeypatch.setattr(cifar, "invented", lambda seed: {"train": images, "train.labels": torch.arange(6)})
    monkeypatch.setattr(sys, "path", list(sys.path))  # load changes both
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "models", "diffusion")]:
            patch.delitem(sys.modules, name)
        loaded = upstream.load(clone)
        for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "models", "diffusion")]:
            del sys.modules[name]
    monkeypatch.setattr(upstream, "load", lambda clone: loaded)

    def trained(state: str, steps: int, *more: str):
        options = ["--smoke", "--upstream", str(clone), "--runs", run, "--state", str(tmp_path / state), *more]
        monkeypatch.setattr(sys, "argv", ["alignment.py", *options])
        args = alignment.parse()
        args.max_steps = steps
        return alignment.train(args)["losses"]

    whole = trained("whole", 5)
    assert [len(trained("cut", 2)), len(trained("cut", 4))] == [2, 4]
    assert torch.equal(trained("cut", 5), whole)
    assert torch.equal(trained("cut", 5), whole)  # nothing is left to do
    ends = [next((tmp_path / state).glob("*/step-*")) for state in ("whole", "cut")]
    assert [end.name for end in ends] == ["step-00000005"] * 2  # the others are gone
    shards = [load_file(next(end.glob("shard-*"))) for end in ends]
    assert shards[0].keys() == shards[1].keys()
    assert len(shards[0]) > 100  # parameters, the average, moments
    assert all(torch.equal(value, shards[1][name]) for name, value in shards[0].items())
    with pytest.raises(ValueError, match=r"state: .* holds a run with \{'lr': 0.0001\}; allowed: .*'lr': 0.1"):
        trained("cut", 6, "--lr", "0.1")


def test_alignment_finds_what_differs():
    plain = torch.linspace(2, 1, 40, dtype=torch.float64)
    off = plain.clone()
    off[20:] *= 1.02
    runs_ = {"fp32:plain": plain, "fp32:opendit": off[:35], "bf16:plain": plain, "tf32:opendit": off}
    (found,) = alignment.compare(runs_, window=5)
    assert found["steps"] == 35
    assert found["first_step"] == 0
    assert found["max_step"] == pytest.approx(0.02)
    assert found["max_smoothed"] == pytest.approx(0.02)
    assert 0.005 < found["mean_smoothed"] < 0.015


def test_text_runs(runs):
    image = record(runs, "accuracy_text_to_image")["results"][0]
    assert image["captions"] == {"trained": 36, "held_out": 4, "drawn": 8}
    assert set(image["group"]) == {"real_held_out", "drawn_trained", "drawn_held_out", "largest_group"}
    assert Image.open(runs / "text_to_image.png").width == 10 * 34 or len(image["shown"]["trained"]) < 10
    video = record(runs, "accuracy_text_to_video")["results"][0]
    assert video["captions"] == {"trained": 24, "held_out": ["0", "13", "26"]}
    assert video["shown"][-3:] == ["0", "13", "26"]
    assert Image.open(runs / "text_to_video.gif").n_frames == 4


def test_the_page_says_what_the_files_say(runs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["page.py", "--folder", str(runs)])
    assert page.main() == 0
    text = (runs / "README.md").read_text()
    assert "Not run yet" not in text
    point = record(runs, "accuracy_cifar")["results"][1]["points"][-1]
    assert f"| {point['distance']:.2f} | {point['accuracy']:.1%} |" in text
    for picture in ("cifar.png", "cifar_opendit.png", "alignment.png", "text_to_image.png", "text_to_video.gif"):
        assert f"({picture})" in text
        assert (runs / picture).is_file()
    monkeypatch.setattr(sys, "argv", ["page.py", "--folder", str(runs), "--check"])
    assert page.main() == 0
    (runs / "README.md").write_text(text.replace(f"{point['distance']:.2f}", "0.01"))
    assert page.main() == 1


def test_the_page_in_docs_is_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["page.py", "--check"])
    assert page.main() == 0


def test_when_a_distance_was_reached():
    points = [{"seconds": s, "distance": d} for s, d in ((10, 8.0), (20, 4.0), (30, 4.5), (40, 2.0))]
    assert page.seconds_to(points, 9.0) == 10
    assert page.seconds_to(points, 6.0) == 15
    assert page.seconds_to(points, 3.25) == 35
    assert page.seconds_to(points, 1.0) is None


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (cifar, [], "--data: is needed"),
        (text_to_image, [], "--data: is needed"),
        (text_to_video, [], "--data: is needed"),
        (alignment, ["--upstream", "x"], "--data: is needed"),
        (
            alignment,
            ["--upstream", "x", "--smoke"],
            "--upstream: x has no models.py; allowed: a clone of facebookresearch",
        ),
        (
            alignment,
            ["--upstream", "x", "--smoke", "--runs", "fp8:plain"],
            "--runs: got 'fp8:plain'; allowed: one of fp32",
        ),
    ],
)
def test_mistakes_cost_one_line(script, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", str(tmp_path), *words])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err
