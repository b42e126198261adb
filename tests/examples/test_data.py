"""Data sets of every kind of file, whole and broken; what is drawn at random, and the order of samples."""

import multiprocessing
import pickle
import tarfile

import av
import pytest
import torch
from PIL import Image

from examples.data import Order, batches, open_data
from examples.data.images import crop
from examples.data.video import window
from tests.examples.making import (
    CAPTIONS,
    captioned_folder,
    clip,
    hugging_face,
    image_folder,
    picture,
    tar_shards,
    video_table,
)


def shown(i: int, size: int = 8) -> torch.Tensor:
    return crop(picture(i), size).float() / 127.5 - 1


def grey(pixels: torch.Tensor) -> list[int]:
    """Which frames of `making.clip` these are."""
    return [round(((frame.mean().item() + 1) * 127.5) / 8) for frame in pixels]


def test_folders_whose_names_are_numbers_are_in_their_order(tmp_path):
    data = open_data(image_folder(tmp_path / "x", 1, ("10", "2", "0")), image_size=8)
    assert data.classes == ["0", "2", "10"]


def test_image_folder_png_jpg_webp(tmp_path):
    data = open_data(image_folder(tmp_path / "x"), image_size=8)
    assert (len(data), data.classes, data.captions) == (6, ["cat", "dog"], None)
    assert [data[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    for i in (0, 2, 3, 5):  # png and webp are lossless
        sample = data[i]
        assert torch.equal(sample["pixels"], shown(i))
        assert sample["id"] == i
    assert (data[1]["pixels"] - shown(1)).abs().mean() < 0.4  # noise in a jpg


def test_the_centre_is_cropped():
    image = Image.new("RGB", (12, 4), (255, 0, 0))
    image.paste((0, 255, 0), (4, 0, 8, 4))
    assert torch.equal(crop(image, 4), torch.tensor([0, 255, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4))
    tall = crop(image.transpose(Image.Transpose.ROTATE_90), 2)
    assert tall.shape == (3, 2, 2)
    assert tall[1].float().mean() > 200


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_hugging_face_files(tmp_path, suffix):
    data = open_data(hugging_face(tmp_path / "x", suffix), image_size=8)
    assert (len(data), data.classes) == (4, ["cat", "dog"])
    for i in (3, 0, 2, 1):
        sample = data[i]
        assert torch.equal(sample["pixels"], shown(i))
        assert (sample["label"], sample["caption"]) == (i % 2, CAPTIONS[i % 3])


def test_web_dataset_shards(tmp_path):
    root = tar_shards(tmp_path / "x")
    data = open_data(root, image_size=8)
    assert (len(data), data.classes) == (4, ["0", "1"])
    for i in (3, 0):
        assert torch.equal(data[i]["pixels"], shown(i))
        assert (data[i]["label"], data[i]["caption"]) == (i % 2, CAPTIONS[i % 3])
    assert len(open_data(root / "train-0001.tar", image_size=8)) == 2
    assert len(open_data(root / "train-*.tar", image_size=8)) == 4
    (root / "train-0001.tar").rename(root / "test-0000.tar")
    with pytest.raises(ValueError, match=r"several names, test, train. Say which: .*test\*.tar"):
        open_data(root, image_size=8)


def test_cut_and_incomplete_shards_are_named_and_the_rest_is_used(tmp_path):
    root = tar_shards(tmp_path / "x")
    whole = (root / "train-0001.tar").read_bytes()
    with tarfile.open(root / "train-0001.tar") as tar:
        second = tar.getmember("000003.png").offset
    (root / "train-0001.tar").write_bytes(whole[: second + 100])
    data = open_data(root, image_size=8)
    assert [name.rsplit("/")[-1] for name in data.names] == ["000000.png", "000001.png", "000002.png"]
    assert "train-0001.tar after 1 samples: " in data.skipped[0]
    with tarfile.open(root / "train-0001.tar", "w") as tar:
        info = tarfile.TarInfo("000009.png")
        tar.addfile(info)
    data = open_data(root, image_size=8)
    assert len(data) == 2
    assert data.skipped == ["train-0001.tar/000009.png: no text, which others have"]


def test_table_of_captions(tmp_path):
    root = captioned_folder(tmp_path / "x")
    with (root / "captions.jsonl").open("a") as file:
        file.write(
            'not json\n{"file": "9.png", "class": "cat"}\n{"file": "8.png", "caption": "gone", "class": "cat"}\n'
        )
    data = open_data(root, image_size=8)
    assert (len(data), data.classes) == (7, ["bird", "cat", "dog"])
    assert (data[1]["caption"], data[1]["label"]) == ("a blue dog", 2)
    assert [entry.split(":")[1] for entry in data.skipped] == ["7", "8"]
    assert data[6]["id"] == 0  # 8.png is not there: the next one, from the beginning
    assert data.skipped[-1] == "8.png"
    assert len(open_data(root / "captions.jsonl", image_size=8)) == 7


def test_broken_files_are_named_counted_and_replaced_by_the_next(tmp_path, capfd):
    root = image_folder(tmp_path / "x")
    whole = (root / "cat" / "00.png").read_bytes()
    (root / "cat" / "00.png").write_bytes(whole[:100])
    (root / "cat" / "01.jpg").write_bytes(b"\xff\xd8\xffno image")
    (root / "dog" / "05.webp").write_bytes(b"")
    data = open_data(root, image_size=8)
    for _ in range(2):
        assert [data[i]["id"] for i in range(6)] == [2, 2, 2, 3, 4, 2]
    assert data.skipped == ["cat/00.png", "cat/01.jpg", "dog/05.webp"]
    assert capfd.readouterr().err.count("skipping") == 3  # said once
    for path in root.rglob("*.*"):
        path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"none of the 6 samples can be read; the first: cat/00\.png"):
        open_data(root, image_size=8)[0]


def test_loader_workers_tell_what_they_skip(tmp_path):
    root = image_folder(tmp_path / "x")
    (root / "dog" / "04.jpg").write_bytes(b"no")
    data = open_data(root, image_size=8)
    stream = batches(data, Order(6, 2), workers=2)
    ids = [i for _ in range(3) for i in next(stream)["id"].tolist()]
    assert sorted(ids) == [0, 1, 2, 3, 5, 5]
    assert data.skipped == ["dog/04.jpg"]


@pytest.mark.parametrize(
    ("kind", "codec"),
    [
        ("mp4", "libx264"),
        ("mkv", "libx264"),
        ("mov", "mpeg4"),  # seeking lands behind the frame
        ("avi", "mpeg4"),  # packets without times
        ("avi", "libx264"),
        ("mpg", "mpeg2video"),
        ("gif", "gif"),
    ],
)
def test_windows_of_frames_are_those_asked_for(tmp_path, kind, codec):
    clip(tmp_path / "run" / f"a.{kind}", 25, codec=codec)
    with av.open(str(tmp_path / "run" / f"a.{kind}")) as container:
        every = torch.stack([crop(frame.to_image(), 16) for frame in container.decode(video=0)]).float() / 127.5 - 1
    data = open_data(tmp_path, image_size=16, num_frames=4, frame_interval=3, seed=5)
    starts = set()
    for epoch in range(24):
        start = window(25, 4, 3, data._draw(0, epoch)[0])[0]
        assert torch.equal(data[epoch, 0]["pixels"], every[start : start + 10 : 3])
        starts.add(start)
    assert len(starts) > 8


def test_all_windows_are_equally_likely():
    starts = [window(12, 4, 3, i / 600)[0] for i in range(600)]
    assert [starts.count(start) for start in range(3)] == [200, 200, 200]
    assert list(window(10, 4, 3, 0.999)) == [0, 3, 6, 9]
    with pytest.raises(ValueError, match="too short: 9 frames, 4 at an interval of 3 need 10"):
        window(9, 4, 3, 0.0)


def test_videos_of_a_table_short_and_broken_ones_named(tmp_path, capfd):
    table = video_table(tmp_path / "x")
    clip(tmp_path / "x" / "short.mp4", 3)
    whole = (tmp_path / "x" / "0.mp4").read_bytes()
    (tmp_path / "x" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with table.open("a") as file:
        file.write("short.mp4,too short\ncut.mp4,cut\nnone.mp4,not there\nempty.mp4,\nnotes.txt,not a video\n")
    data = open_data(table, image_size=16, num_frames=4)
    assert len(data) == 6
    assert [data[i]["id"] for i in range(6)] == [0, 1, 2, 0, 0, 0]
    assert data[1]["caption"] == "a blue dog"
    assert data.skipped == [
        "videos.csv:8: no text",
        "videos.csv:9: notes.txt is no video",
        "short.mp4",
        "cut.mp4",
        "none.mp4",
    ]
    assert "skipping short.mp4: too short: 3 frames, 4 at an interval of 1 need 4" in capfd.readouterr().err


def test_videos_in_shards(tmp_path):
    clip(tmp_path / "a.mp4", 6)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.mp4", "k.mp4")
    data = open_data(tmp_path / "x.tar", image_size=16, num_frames=6)
    assert grey(data[0]["pixels"]) == [0, 1, 2, 3, 4, 5]


def test_torchcodec_decodes_the_same(tmp_path):
    try:
        import torchcodec  # noqa: F401
    except Exception as error:
        pytest.skip(f"torchcodec does not import: {error}")
    clip(tmp_path / "run" / "a.mp4", 25)
    ours, theirs = (
        open_data(tmp_path, image_size=16, num_frames=4, frame_interval=3, decoder=name)
        for name in ("pyav", "torchcodec")
    )
    for epoch in range(4):
        assert (ours[epoch, 0]["pixels"] - theirs[epoch, 0]["pixels"]).abs().max() <= 2 / 127.5


def test_augmentation_depends_on_seed_epoch_and_sample_alone(tmp_path):
    root = image_folder(tmp_path / "x", per_class=8)
    plain = open_data(root, image_size=8)
    flipped = open_data(root, image_size=8, flip=True, seed=3)

    def flips(data, epoch):
        return [torch.equal(data[epoch, i]["pixels"], plain[i]["pixels"].flip(-1)) for i in range(16)]

    first = flips(flipped, 0)
    assert 0 < sum(first) < 16
    assert flips(flipped, 1) == [not flip for flip in first]  # every second epoch, so both are seen equally often
    assert flips(flipped, 2) == first
    assert flips(open_data(root, image_size=8, flip=True, seed=4), 0) != first
    assert all(torch.equal(plain[e, 0]["pixels"], plain[0]["pixels"]) for e in range(3))

    order = Order(16, 4, seed=1)
    alone, two = (batches(flipped, order, workers=workers) for workers in (0, 2))
    for _ in range(6):
        a, b = next(alone), next(two)
        assert torch.equal(a["pixels"], b["pixels"])
        assert torch.equal(a["id"], b["id"])


def test_loading_leaves_torchs_generator_alone(tmp_path):
    data = open_data(image_folder(tmp_path / "x"), image_size=8, flip=True)
    before = torch.get_rng_state()
    next(batches(data, Order(6, 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_order_resumes_at_a_step_and_is_shared_by_the_ranks():
    def take(steps, **options):
        stream = iter(Order(22, options.pop("batch_size", 3), seed=7, **options))
        return [next(stream) for _ in range(steps)]

    whole = take(20)
    assert take(9, start=11) == whole[11:]
    for epoch in (0, 1):
        epoch_batches = whole[7 * epoch : 7 * epoch + 7]  # 22 // 3 batches
        ids = [i for batch in epoch_batches for e, i in batch]
        assert {e for batch in epoch_batches for e, _ in batch} == {epoch}
        assert len(set(ids)) == 21
    assert [i for _, i in whole[0]] != [i for _, i in whole[7]]
    one = take(8, batch_size=6)
    two = [take(8, batch_size=3, rank=rank, ranks=2) for rank in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == one
    with pytest.raises(ValueError, match="batch_size: got 12 on 2 data-parallel ranks; the data has only 22 samples"):
        Order(22, 12, ranks=2)


def test_samples_are_the_same_in_a_spawned_process(tmp_path):
    """What a loader's worker gets where processes are not forked."""
    data = open_data(hugging_face(tmp_path / "x"), image_size=8, flip=True)
    assert torch.equal(
        pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(data))[1]["pixels"], data[1]["pixels"]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "image_size: got 0"),
        ({"num_frames": -1}, "num_frames: got -1"),
        ({"frame_interval": 2}, "frame_interval: got 2 with num_frames 1"),
        ({"decoder": "gpu"}, "decoder: got 'gpu'"),
        ({"num_frames": 2}, "holds no videos; it has images"),
        ({"path": "nowhere"}, "nowhere does not exist"),
        ({"path": "notes.txt"}, "notes.txt is a file; allowed"),
        ({"path": "*.tar"}, "matches 0 files"),
        ({"path": "columns.csv"}, "columns.csv has the columns a, b; one of path, file"),
        ({"path": "mixed"}, "has files both beside and in sub-folders"),
        ({"path": "bad.parquet"}, "holds no images; of 1 entries: bad.parquet"),
    ],
)
def test_mistakes_are_explained(tmp_path, options, words):
    image_folder(tmp_path / "x")
    image_folder(tmp_path / "mixed")
    picture(0).save(tmp_path / "mixed" / "loose.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "columns.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nothing")
    path = tmp_path / options.pop("path", "x")
    with pytest.raises(ValueError, match="(?s)" + words.replace("*", r"\*")):
        open_data(path, **{"image_size": 8, **options})
