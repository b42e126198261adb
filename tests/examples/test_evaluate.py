"""Scores against closed forms and slow definitions; reports that say what was measured; files for other evaluators."""

import importlib
import json
import math
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from examples.evaluate.features import ClipImages, Extractor, load_extractor
from examples.evaluate.inception import Inception, average, load_inception, resize_like_tensorflow
from examples.evaluate.metrics import InceptionScore, Moments, frechet_distance, precision_recall
from examples.evaluate.npz import NpzImages, write_npz
from tests.examples.making import CAPTIONS, captioned_folder, clip, image_folder, tiny_text_encoder, video_table

CPU = torch.device("cpu")


def brightness(device: torch.device) -> Extractor:
    """A classifier of two classes, dark and light, for --classifier."""

    def compute(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = images.float().mean((1, 2, 3), keepdim=False)[:, None]
        return mean, torch.cat([128 - mean, mean - 128], 1)

    return Extractor("brightness", compute, has_logits=True)


def symmetric(width: int) -> torch.Tensor:
    a = torch.randn(width, width, dtype=torch.float64)
    return a @ a.T / width + 0.1 * torch.eye(width, dtype=torch.float64)


def test_moments_stream_to_the_mean_and_covariance():
    x = torch.randn(50, 7) * 3 + 100
    moments = Moments(7)
    for part in x.split(13):
        moments.add(part)
    mean, covariance = moments.mean_and_covariance()
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(covariance, torch.cov(x.double().T), atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="samples: got 0"):
        Moments(7).mean_and_covariance()


def test_frechet_distance_has_its_closed_form():
    """Where Σ₂ = AΣ₁A with A symmetric and positive, A is the optimal map: tr (Σ₁Σ₂)^½ = tr AΣ₁."""
    s1, a = symmetric(9), symmetric(9)
    m1, m2 = torch.randn(2, 9, dtype=torch.float64)
    s2 = a @ s1 @ a
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * (a @ s1).trace()
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(m1, s1, m1, s1) == pytest.approx(0, abs=1e-9)
    variances1, variances2 = torch.rand(2, 5, dtype=torch.float64)
    apart = ((variances1.sqrt() - variances2.sqrt()) ** 2).sum().item()
    zero = torch.zeros(5, dtype=torch.float64)
    assert frechet_distance(zero, variances1.diag(), zero, variances2.diag()) == pytest.approx(apart, rel=1e-9)
    flat = torch.zeros(9, 9, dtype=torch.float64)  # fewer samples than features: a covariance without full rank
    flat[0, 0] = 4.0
    assert math.isfinite(frechet_distance(m1, flat, m2, s2))


@pytest.mark.slow
def test_frechet_distance_is_torchmetrics_fid():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    real, generated = torch.rand(60, 3, 2, 2), torch.rand(50, 3, 2, 2) * 0.8
    theirs = FrechetInceptionDistance(Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    moments = []
    for images, is_real in ((real, True), (generated, False)):
        theirs.update(images.double(), real=is_real)
        moments.append(Moments(12))
        moments[-1].add(images.flatten(1))
    ours = frechet_distance(*moments[0].mean_and_covariance(), *moments[1].mean_and_covariance())
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_inception_score_by_its_definition():
    logits = torch.randn(40, 6) * 2
    score = InceptionScore(6, splits=4)
    for ids in torch.randperm(40).split(11):
        score.add(logits[ids], ids)

    def slowly(rows: list[list[float]]) -> float:
        p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows]
        mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
        kl = [sum(a * (math.log(a) - math.log(b)) for a, b in zip(row, mean, strict=True)) for row in p]
        return math.exp(sum(kl) / len(kl))

    rows = logits.double().tolist()
    parts = [slowly(rows[i::4]) for i in range(4)]
    value, spread = score.score()
    assert value == pytest.approx(slowly(rows), rel=1e-9)
    assert spread == pytest.approx(np.std(parts), rel=1e-9)
    sure = InceptionScore(5)
    sure.add(1000 * torch.eye(5), torch.arange(5))
    assert sure.score()[0] == pytest.approx(5)


def test_precision_and_recall_by_their_definition():
    real, generated = torch.randn(30, 3), torch.randn(25, 3) * 0.5 + 0.5

    def share(points, centres):
        def distance(a, b):
            return math.dist(a.tolist(), b.tolist())

        radius = [sorted(distance(c, other) for other in centres)[3] for c in centres]
        near = [any(distance(p, c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        return sum(near) / len(near)

    expected = (share(generated.double(), real.double()), share(real.double(), generated.double()))
    assert precision_recall(real, generated, block=7) == pytest.approx(expected)
    assert 0 < expected[1] < 1
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match="got 30 real and 3 generated; the 3-th neighbour takes more"):
        precision_recall(real, generated[:3])


def test_images_are_resized_as_tensorflow_1_did():
    x = torch.rand(2, 3, 5, 7)
    out = resize_like_tensorflow(x, 12)
    for row, column in ((0, 0), (4, 9), (11, 11), (7, 3)):
        y, z = row * 5 / 12, column * 7 / 12
        top, left = int(y), int(z)
        bottom, right = min(top + 1, 4), min(left + 1, 6)
        a, b = y - top, z - left
        upper = x[..., top, left] * (1 - b) + x[..., top, right] * b
        lower = x[..., bottom, left] * (1 - b) + x[..., bottom, right] * b
        torch.testing.assert_close(out[..., row, column], upper * (1 - a) + lower * a, atol=1e-5, rtol=1e-5)
    assert torch.equal(resize_like_tensorflow(x[..., :5], 5), x[..., :5])


def test_average_pools_leave_the_padding_out():
    assert torch.equal(average(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the published layout: fp16 convolutions, no BatchNorm scales."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    kept = {k: v.half() if v.ndim == 4 else v for k, v in state.items() if not k.endswith(("bn.weight", "tracked"))}
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(kept, path)
    return path


def test_inception_reads_the_published_layout(inception_file, tmp_path):
    model = load_inception(inception_file)
    names = {name for name in model.state_dict() if not name.endswith(("bn.weight", "tracked"))}
    assert len(names) == 376
    assert model.Mixed_6c.branch7x7dbl_4.conv.weight.shape == (160, 160, 7, 1)
    assert model.Mixed_7b.branch3x3dbl_3a.conv.weight.shape == (384, 384, 1, 3)
    assert sum(p.numel() for p in model.parameters() if p.ndim == 4) == 21_751_136
    assert not model.training
    features, logits = model(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 2048)
    assert logits is None
    extractor = load_extractor(str(inception_file), CPU)
    assert extractor.standard_for(1) == "FID"
    assert extractor.standard_for(16) is None
    assert not extractor.has_logits
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="is not in the layout of FID's Inception network: 376 tensors are missing, 1 un"
    ):
        load_inception(tmp_path / "other.safetensors")


def test_npz_is_what_adms_evaluator_reads(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "samples.npz"
    write_npz(path, iter(images), 5, labels=[4, 0, 1, 2, 3])
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], images)
        assert file["arr_1"].tolist() == [4, 0, 1, 2, 3]
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:  # that evaluator streams it like this
        assert archive.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((5, 8, 8, 3), False, np.dtype("uint8"))
        assert file.read() == images.tobytes()
    data = NpzImages(path, 8)
    assert isinstance(data.images, np.memmap)
    assert (len(data), data.read(1)["label"], len(data.classes)) == (5, 0, 5)
    assert torch.equal(
        ((data.read(3)["pixels"] + 1) * 127.5).round().byte(), torch.from_numpy(images[3]).permute(2, 0, 1)
    )
    np.savez_compressed(tmp_path / "small.npz", images)
    assert np.array_equal(NpzImages(tmp_path / "small.npz", 8).images, images)
    with pytest.raises(ValueError, match="image_size: got 16"):
        NpzImages(path, 16)
    with pytest.raises(ValueError, match="got 5; 6 were announced"):
        write_npz(tmp_path / "short.npz", iter(images), 6)
    assert not (tmp_path / "short.npz").exists()


def evaluate(monkeypatch, kind: str, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--device", "cpu"])
    importlib.import_module(f"examples.{kind}.evaluate").main()


def features_of(folder, count: int) -> torch.Tensor:
    from examples.data import open_data

    data = open_data(folder, image_size=16)
    pixels = torch.stack([((data[i]["pixels"] + 1) * 127.5).round() for i in range(count)])
    return F.adaptive_avg_pool2d(pixels / 255, 8).flatten(1)


def test_images_from_folder_to_report(tmp_path, monkeypatch, capfd):
    real, generated = image_folder(tmp_path / "real", 6), image_folder(tmp_path / "generated", 4)
    for path in (generated / "dog").iterdir():
        Image.new("RGB", (16, 16), (250, 250, 250)).save(path)
    (generated / "dog" / "05.webp").write_bytes(b"no image")
    out, stats, npz = tmp_path / "scores.json", tmp_path / "real.npz", tmp_path / "samples.npz"
    fixed = ["--image_size", 16, "--features", "pixels", "--batch_size", 3, "--out", out]
    options = [
        "--metrics",
        "frechet,precision_recall,accuracy",
        "--classifier",
        "tests.examples.test_evaluate:brightness",
    ]
    evaluate(monkeypatch, "image", "--real", real, "--generated", generated, *fixed, *options, "--save_stats", stats,
             "--npz", npz)  # fmt: skip
    scores = json.loads(out.read_text())
    assert json.loads(capfd.readouterr().out.partition("wrote")[0]) == scores
    a, b = features_of(real, 12), torch.cat([features_of(generated, 5), features_of(generated, 8)[6:]])
    moments = [(x.double().mean(0), torch.cov(x.double().T)) for x in (a, b)]
    assert scores["frechet_distance_of_other_features"] == pytest.approx(frechet_distance(*moments[1], *moments[0]))
    assert (scores["precision"], scores["recall"]) == pytest.approx(precision_recall(a, b))
    assert "fid" not in scores
    assert scores["features"] == "pixels 8x8"
    assert (scores["generated"], scores["real"]) == (7, 12)
    assert [entry.partition(":")[0] for entry in scores["skipped"]] == ["dog/05.webp"]
    # Cats are noise around 127, dogs are light.
    dark = sum((features_of(generated, 4).mean(1) * 255 < 128).tolist())
    assert scores["class_accuracy"] == pytest.approx((dark + 3) / 7)
    assert scores["classifier"] == "brightness"

    # The same from the .npz that was written and the statistics that were saved.
    assert len(NpzImages(npz, 16)) == 7
    evaluate(monkeypatch, "image", "--real_stats", stats, "--generated", npz, *fixed)
    again = json.loads(out.read_text())
    same = "frechet_distance_of_other_features"
    assert again[same] == pytest.approx(scores[same], rel=1e-9)
    assert again["real"] == 12

    # Figures of one network are never compared with another's statistics.
    named = np.load(stats)
    np.savez(tmp_path / "other.npz", mu=named["mu"], sigma=named["sigma"], about='{"features": "other", "n": 9}')
    np.savez(tmp_path / "unnamed.npz", mu=named["mu"], sigma=named["sigma"])
    for file, words in (
        ("other.npz", "is of other, not of pixels 8x8"),
        ("unnamed.npz", "does not say of which features"),
    ):
        said = mistake(monkeypatch, capfd, "image", "--real_stats", tmp_path / file, "--generated", npz, *fixed)
        assert words in said


@pytest.mark.slow
def test_fid_has_its_name_only_with_its_network(inception_file, tmp_path, monkeypatch):
    real, generated = image_folder(tmp_path / "real", 2), image_folder(tmp_path / "generated", 3)
    out = tmp_path / "scores.json"
    options = ["--image_size", 16, "--features", inception_file, "--out", out]
    evaluate(monkeypatch, "image", "--real", real, "--generated", generated, *options)
    scores = json.loads(out.read_text())
    assert scores["fid"] >= 0
    assert scores["features"].startswith("FID Inception-v3, 2048 features, weights sha256 ")


def test_clip_scores_of_captioned_images(tmp_path, monkeypatch):
    import transformers

    model = tiny_text_encoder(tmp_path / "clip", "clip")
    generated, out = captioned_folder(tmp_path / "generated", 6), tmp_path / "scores.json"
    options = ["--image_size", 16, "--features", "pixels", "--metrics", "clip", "--clip", model, "--batch_size", 4]
    evaluate(monkeypatch, "image", "--generated", generated, *options, "--out", out)
    scores = json.loads(out.read_text())

    from examples.data import open_data

    data = open_data(generated, image_size=16)
    plain = transformers.CLIPModel.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    mean, std = ClipImages(str(model), CPU).mean, ClipImages(str(model), CPU).std
    pixels = torch.stack([((data[i]["pixels"] + 1) / 2 - mean) / std for i in range(6)])
    captions = [data[i]["caption"] for i in range(6)]
    with torch.no_grad():
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        found = plain(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    similar = found.image_embeds @ found.text_embeds.T
    assert scores["clip_score"] == pytest.approx((100 * similar.diagonal()).clamp(min=0).mean().item(), rel=1e-3)
    nearest = [captions[i] for i in similar.argmax(1).tolist()]
    assert scores["caption_found_by_clip"] == sum(a == b for a, b in zip(nearest, captions, strict=True)) / 6
    assert scores["captions"] == 3
    assert "frechet" not in " ".join(scores)


def test_clips_from_folder_to_report(tmp_path, monkeypatch):
    for i, count in enumerate((8, 9, 10)):
        clip(tmp_path / "real" / f"{i}.mp4", count)
    table = video_table(tmp_path / "generated", count=3, frames=4)
    clip(tmp_path / "generated" / "short.mp4", 2)
    with table.open("a") as file:
        file.write("short.mp4,too short\n")
    model = tiny_text_encoder(tmp_path / "clip", "clip")
    out = tmp_path / "scores.json"
    options = ["--image_size", 16, "--num_frames", 4, "--real_frame_interval", 2, "--features", "pixels", "--out", out]
    options += ["--metrics", "frechet,clip", "--clip", model]
    evaluate(monkeypatch, "video", "--real", tmp_path / "real", "--generated", table, *options)
    scores = json.loads(out.read_text())
    assert scores["features"] == "pixels 8x8, per frame: mean and mean change"
    assert (scores["generated"], scores["real"]) == (3, 3)
    assert scores["skipped"] == ["short.mp4: too short: 2 frames, 4 at an interval of 1 need 4"]
    # Real clips move twice as fast, which the mean change sees: 16 grey levels against 8, of 192 features each.
    assert scores["frechet_distance_of_other_features"] > 192 * (8 / 255) ** 2 * 0.9
    assert "fvd" not in scores
    grey = torch.stack([torch.full((3, 16, 16), 8.0 * k) for k in range(4)]).byte()
    clips = ClipImages(str(model), CPU)
    seen = F.normalize(clips(grey).mean(0), dim=-1)  # all three show the same four frames
    similar = 100 * clips.text([*CAPTIONS, "too short"]) @ seen
    assert scores["clip_score"] == pytest.approx(similar[:3].clamp(min=0).mean().item(), rel=0.02, abs=0.1)
    assert scores["caption_found_by_clip"] == pytest.approx(1 / 3 if similar.argmax() < 3 else 0)
    assert scores["captions"] == 4


def mistake(monkeypatch, capfd, kind: str, *arguments) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate(monkeypatch, kind, *arguments)
    assert stop.value.code == 2
    written = capfd.readouterr().err.strip()
    assert "\n" not in written
    assert written.startswith("evaluate.py: error: ")
    return written


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("image", [], "--metrics: frechet takes --real or --real_stats"),
        ("image", ["--metrics", "fid"], "'fid' is no metric; there are frechet"),
        ("image", ["--real", "x", "--real_stats", "y"], "--real is given too"),
        ("image", ["--real_stats", "x", "--metrics", "precision_recall"], "precision_recall takes --real"),
        ("image", ["--real_stats", "x", "--save_stats", "y"], "--save_stats: it takes --real"),
        ("image", ["--metrics", "clip"], "--clip: it goes with --metrics clip"),
        ("image", ["--real", "x", "--clip", "y"], "--clip: it goes with --metrics clip"),
        ("image", ["--metrics", "accuracy"], "--classifier: it goes with --metrics accuracy"),
        ("image", ["--real", "/nowhere"], "/nowhere does not exist"),
        ("image", ["--metrics", "clip", "--clip", "x"], "clip takes captions"),
        ("image", ["--metrics", "inception_score"], "takes logits, which pixels 8x8 has not"),
        ("image", ["--real_stats", "SELF", "--features", "magic"], "features: got magic; allowed: pixels"),
        ("image", ["--real_stats", "SELF", "--features", "examples:magic"], "features: examples:magic can't be had"),
        ("image", ["--real_stats", "SELF", "--features", "x.safetensors"], "the file x.safetensors does not exist"),
        ("image", ["--real_stats", "/nowhere.npz"], "/nowhere.npz does not hold mu and sigma"),
        ("image", ["--real_stats", "SELF", "--out", "/proc/x/y"], "/proc/x"),
        ("video", ["--real_stats", "SELF", "--num_frames", 1], "a clip has at least 2 frames"),
        ("video", ["--real_stats", "SELF", "--npz", "x"], "unrecognized arguments: --npz x"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, monkeypatch, capfd, kind, arguments, words):
    generated = image_folder(tmp_path / "generated", per_class=1)
    monkeypatch.setattr("examples.evaluate.scoring.Pass", None)  # nothing is computed before the line is there
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "self.npz", mu=np.zeros(192), sigma=np.eye(192), about='{"features": "pixels 8x8", "n": 9}')
    arguments = [str(tmp_path / "self.npz") if a == "SELF" else a for a in arguments]
    fixed = ["--generated", generated, "--image_size", 16, "--features", "pixels"]
    assert words in mistake(monkeypatch, capfd, kind, *fixed, *arguments)


def test_something_must_be_evaluated(monkeypatch, capfd):
    said = mistake(monkeypatch, capfd, "image", "--image_size", 16, "--features", "pixels")
    assert "--generated: it is needed" in said
