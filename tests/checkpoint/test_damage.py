"""What the disk did to a checkpoint is seen before anything of it is used, and the one before is offered."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import unittest.mock

import pytest
import safetensors.torch
import torch

import opendit
from opendit.checkpoint import disk, jsonfile, manifest
from tests.checkpoint.running import Trainer, differences


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = Trainer(0)
    for until in (1, 2, 3):
        trainer.train(until)
        trainer.save(folder)
    return folder


@pytest.fixture(scope="module")
def reader():
    trainer = Trainer(1)
    trainer.train(1)
    return trainer


def _flip(path, dice):
    content = bytearray(path.read_bytes())
    where = dice.randrange(len(content) * 8)
    content[where // 8] ^= 1 << where % 8
    path.write_bytes(content)


def _truncate(path, dice):
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])


def _lengthen(path, dice):
    path.write_bytes(path.read_bytes() + bytes(dice.randrange(1, 9)))


def _lose(path, dice):
    path.unlink()


def _empty(path, dice):
    path.write_bytes(bytes(path.stat().st_size))


def _older(path, dice):
    """The same file of an earlier checkpoint of the same run."""
    shutil.copy(path.parent.parent / "step-00000002" / path.name, path)


DAMAGES = [_flip, _truncate, _lengthen, _lose, _empty, _older]
FILES = ["manifest.json", "index.json", "shard-00000-00000.safetensors"]


def _refused(trainer, folder, damaged, intact):
    before = trainer.facts()
    with pytest.raises(opendit.DamagedCheckpointError) as caught:
        trainer.load(folder)
    assert caught.value.intact == intact
    assert damaged in str(caught.value)
    assert intact is None or f"newest intact checkpoint before it is {folder / intact}" in str(caught.value)
    assert differences(trainer.facts(), before) == []


def test_200_of_200_damages_are_detected(saved, reader, tmp_path):
    dice = random.Random(0)
    found, before = 0, reader.facts()
    for i in range(200):
        folder = tmp_path / str(i)
        shutil.copytree(saved, folder)
        damage, name = DAMAGES[i % len(DAMAGES)], FILES[i // len(DAMAGES) % len(FILES)]
        path = folder / "step-00000003" / name
        good = path.read_bytes()
        damage(path, dice)
        assert not path.exists() or path.read_bytes() != good
        with pytest.raises(opendit.DamagedCheckpointError, match="step-00000002") as caught:
            opendit.load(folder, reader.model, reader.optimizer, **reader.parts())
        assert caught.value.intact == "step-00000002"
        found += 1
        shutil.rmtree(folder)
    assert found == 200
    assert differences(reader.facts(), before) == []
    assert reader.load(saved).step == 3  # the original is whole


def test_shards_that_changed_places(saved, reader, tmp_path):
    """Of one size, each whole, but not where it belongs: between checkpoints, and within one."""
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    for name in ("shard-00000-00000.safetensors",):
        two, three = folder / "step-00000002" / name, folder / "step-00000003" / name
        assert two.stat().st_size == three.stat().st_size
        two_content = two.read_bytes()
        two.write_bytes(three.read_bytes())
        three.write_bytes(two_content)
    _refused(reader, folder, "step-00000003", "step-00000001")


def test_an_old_checkpoint_under_a_new_name(saved, reader, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "step-00000003")
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    _refused(reader, folder, "belongs to 'step-00000002', not to step-00000003", "step-00000002")


def test_an_index_with_another_manifests_identity(saved, reader, tmp_path):
    """Index and manifest that are each whole, and of different saves: the manifest was signed anew over it."""
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    three = folder / "step-00000003"
    index = json.loads((three / "index.json").read_text())
    disk.write(three / "index.json", jsonfile.text({**index, "id": "0" * 32}))
    found = json.loads((three / "manifest.json").read_text())
    files = {name: manifest.file_record(three / name) for name in found["files"]}
    disk.write(three / "manifest.json", manifest.build("step-00000003", found["id"], files))
    with pytest.raises(opendit.DamagedCheckpointError, match="belongs to another checkpoint"):
        reader.load(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no checkpoint's name"),
        (b"step-00000009\n", "no folder of that name"),
        (b"../evil\n", "no checkpoint's name"),
        (b"/etc\n", "no checkpoint's name"),
        (b"step-0000000\xff\n", "no checkpoint's name"),
        (b"step-00000003" * 100, "no checkpoint's name"),
    ],
)
def test_latest_is_not_trusted(saved, reader, tmp_path, content, match):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    (folder / "latest").write_bytes(content)
    with pytest.raises(opendit.DamagedCheckpointError, match=match) as caught:
        reader.load(folder)
    assert caught.value.intact == "step-00000003"
    reader.load(folder / "step-00000003")


def test_without_latest_the_newest_is_taken(saved, reader, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    (folder / "latest").unlink()
    assert opendit.latest_checkpoint(folder) == folder / "step-00000003"
    assert reader.load(folder).step == 3


def test_all_damaged(saved, reader, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    for name in disk.names(folder):
        _truncate(folder / name / "index.json", random.Random(1))
    _refused(reader, folder, "step-00000003", None)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_disk_fails_to_read(saved, reader, monkeypatch, name):
    opened = jsonfile.open_plain

    def failing(path):
        file = opened(path)
        if path == saved / "step-00000003" / name:
            file = unittest.mock.Mock(wraps=file, __enter__=lambda self: self, __exit__=lambda self, *error: None)
            file.read.side_effect = OSError(5, "Input/output error")
        return file

    monkeypatch.setattr(jsonfile, "open_plain", failing)
    _refused(reader, saved, f"{name}: can't be read (OSError: [Errno 5] Input/output error)", "step-00000002")


@pytest.mark.parametrize("size", ["1e999", "-1e999", "NaN", "1" * 5000])
def test_a_size_that_is_no_number(saved, reader, tmp_path, size):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    for step in ("2", "3"):
        path = folder / f"step-0000000{step}" / "manifest.json"
        path.write_text(re.sub(r'"size": \d+', f'"size": {size}', path.read_text(), count=1))
    _refused(reader, folder, "manifest.json: is no JSON", "step-00000001")


def test_each_file_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """The order in which a crash of the machine can cut things off: files, folder, rename, parent, latest, parent."""
    events = []
    fsync, rename = disk.os.fsync, disk.os.rename
    paths = {}
    opened = disk.os.open

    def open_(path, *rest, **more):
        descriptor = opened(path, *rest, **more)
        paths[descriptor] = str(path)
        return descriptor

    def fsync_(descriptor):
        import os

        events.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename_(source, target):
        events.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(disk.os, "open", open_)
    monkeypatch.setattr(disk.os, "fsync", fsync_)
    monkeypatch.setattr(disk.os, "rename", rename_)
    opendit.save(tmp_path, torch.nn.Linear(2, 2), step=1)
    done = tmp_path / "step-00000001"
    at = events.index(("rename", str(done)))
    flushed = [path.rsplit("/", 1)[-1] for kind, path in events[:at] if kind == "flush"]
    files = sorted(p.name for p in done.iterdir())
    assert sorted(flushed[:-1]) == files, "a file got its name before it was on the disk"
    assert flushed[-1].startswith("step-00000001.tmp-")
    rest = [(kind, path.rsplit("/", 1)[-1]) for kind, path in events[at + 1 :]]
    folder = tmp_path.name
    assert rest == [("flush", folder), ("flush", "latest.new"), ("rename", "latest"), ("flush", folder)]


class _Killed(BaseException):
    """Nothing that handles exceptions handles it: what follows does not happen, as after a kill."""


def _killed_at(number: int, monkeypatch) -> list[str]:
    """Lets `number` changes of the disk happen and none after; the names of those that were tried."""
    tried = []

    def counted(owner, name):
        real = getattr(owner, name, open)

        def call(*args, **kwargs):
            tried.append(name)
            if len(tried) > number:
                raise _Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call, raising=False)

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        counted(disk.os, name)
    counted(disk, "open")  # for writing
    counted(safetensors.torch, "save_file")
    return tried


@pytest.mark.parametrize("keep", [None, 1])
def test_cut_off_after_any_change_of_the_disk(tmp_path, monkeypatch, keep):
    """At every point of a save, one by one: what is left loads, is the old or the new state, and is saved over."""
    model = torch.nn.Linear(2, 2)
    states, points = [{n: torch.full_like(v, float(s)) for n, v in model.state_dict().items()} for s in (1, 2)], 0
    seen = set()
    while True:
        folder = tmp_path / str(points)
        for step in (1, 2):
            model.load_state_dict(states[step - 1])
            with monkeypatch.context() as patch:
                tried = _killed_at(points, patch) if step == 2 else []
                with contextlib.suppress(_Killed):
                    opendit.save(folder, model, step=step, keep=keep)
        found = opendit.load(folder, model).step
        assert all(torch.equal(v, states[found - 1][n]) for n, v in model.state_dict().items())
        seen.add(found)
        opendit.save(folder, model, step=3, keep=1)
        assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000003"]
        if len(tried) <= points:
            break
        points += 1
    assert seen == {1, 2}
    assert points >= 12


def test_named_and_not_yet_the_latest(tmp_path, monkeypatch):
    """Between the rename and `latest`: the one before counts; the same step is saved beside it."""
    model = torch.nn.Linear(2, 2)
    opendit.save(tmp_path, model, step=1)

    def killed(*args):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(disk, "replace", killed)
        with pytest.raises(_Killed):
            opendit.save(tmp_path, model, step=2)
    assert disk.names(tmp_path) == ["step-00000001", "step-00000002"]
    assert opendit.load(tmp_path, model).step == 1
    opendit.save(tmp_path, model, step=2)
    assert opendit.latest_checkpoint(tmp_path).name == "step-00000002-2"


def test_without_the_check_damage_is_not_seen(saved, tmp_path, monkeypatch):
    """A mutant: the hashes of files are not compared."""
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    path = folder / "step-00000003" / "shard-00000-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    monkeypatch.setattr(manifest, "check_files", lambda *args: None)
    assert Trainer(1).load(folder).step == 3


def test_keep(tmp_path):
    model = torch.nn.Linear(2, 2)
    for step in (1, 2, 3, 3, 10):
        opendit.save(tmp_path, model, step=step, keep=3)
    assert disk.names(tmp_path) == ["step-00000003", "step-00000003-2", "step-00000010"]
    opendit.load(tmp_path / "step-00000003", model)
    opendit.save(tmp_path, model, step=4, keep=2)  # taken back to 3: what is later stays until it is passed
    assert disk.names(tmp_path) == ["step-00000003-2", "step-00000004", "step-00000010"]
    assert opendit.latest_checkpoint(tmp_path) == tmp_path / "step-00000004"
    assert opendit.load(tmp_path, model).step == 4
    opendit.save(tmp_path, model, step=11, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000011"]
    (tmp_path / "step-00000012.tmp-0123456789abcdef").mkdir()
    (tmp_path / "notes.tmp-0123456789abcdef").mkdir()
    opendit.save(tmp_path, model, step=12, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "notes.tmp-0123456789abcdef", "step-00000012"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("when", ["before latest", "latest", "after latest"])
def test_a_disk_that_fails_once_the_checkpoint_is_whole_is_told_so(tmp_path, monkeypatch, when, background):
    model = torch.nn.Linear(2, 2)
    opendit.save(tmp_path, model, step=1)
    owner, name = (disk.os, "rename") if when == "latest" else (disk, "flush")
    real, calls = getattr(owner, name), []

    def failing(*args):
        calls.append(args)
        folders = [given for given in calls if given == (tmp_path,)]
        if str(args[-1]).endswith("/latest") or len(folders) == {"before latest": 1, "after latest": 2}.get(when):
            raise OSError(5, "Input/output error")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(
            opendit.CheckpointError, match=r"step-00000002: was saved and is whole, but .*Errno 5"
        ) as said:
            opendit.save(tmp_path, model, step=2, background=background).wait()
    assert disk.names(tmp_path) == ["step-00000001", "step-00000002"]
    assert opendit.load(tmp_path / "step-00000002", model).step == 2
    if when == "after latest":
        assert "a crash may undo that" in str(said.value)
        assert opendit.load(tmp_path, model).step == 2
    else:
        assert f"so load({str(tmp_path)!r}) takes step-00000001; load('{tmp_path}/step-00000002') takes" in str(
            said.value
        )
        assert opendit.load(tmp_path, model).step == 1


@pytest.mark.parametrize("what", ["rename", "rmtree"])
@pytest.mark.parametrize("background", [False, True])
def test_what_cannot_be_removed_fails_no_save(tmp_path, monkeypatch, caplog, what, background):
    model = torch.nn.Linear(2, 2)
    opendit.save(tmp_path, model, step=1)
    owner = disk.os if what == "rename" else disk.shutil
    real = getattr(owner, what)

    def failing(path, *rest):
        if ".tmp-" in str((path, *rest)[-1]):  # what is doomed, by either
            raise OSError(39, "Directory not empty")
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, failing)
        for step in (2, 3):
            assert opendit.save(tmp_path, model, step=step, keep=1, background=background).wait().exists()
            assert opendit.latest_checkpoint(tmp_path) == tmp_path / f"step-0000000{step}"
    assert "can't be removed ([Errno 39] Directory not empty)" in caplog.text
    opendit.save(tmp_path, model, step=4, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000004"]


def test_large_states_go_into_several_files(tmp_path, monkeypatch):
    from opendit.checkpoint import shards

    monkeypatch.setattr(shards, "PART", 4096)
    trainer = Trainer(0)
    trainer.train(1)
    folder = trainer.save(tmp_path).wait()
    assert len(list(folder.glob("*.safetensors"))) > 5
    saved = trainer.facts()
    trainer.train(3)
    trainer.load(tmp_path)
    assert differences(trainer.facts(), saved) == []
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(opendit.DamagedCheckpointError, match="there is no intact one before"):
        trainer.load(tmp_path)


@pytest.mark.parametrize("when", ["rename", "fsync", "write"])
def test_a_disk_that_fails_leaves_what_was(tmp_path, monkeypatch, when):
    trainer = Trainer(0)
    trainer.train(1)
    trainer.save(tmp_path)
    good = trainer.facts()
    trainer.train(2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for background in (False, True):
        with monkeypatch.context() as patch:
            if when == "write":
                patch.setattr(disk, "write", full)
            else:
                patch.setattr(disk.os, when, full)
            with pytest.raises(opendit.CheckpointError, match=r"OSError: .*No space left"):
                trainer.save(tmp_path, background=background).wait()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    other = Trainer(1)
    other.load(tmp_path)
    assert differences(other.facts(), good) == []
