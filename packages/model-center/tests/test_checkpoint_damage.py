"""Disks that fill up while a checkpoint is being written, and files that are damaged afterwards."""

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_training import assert_equal, contents, make_state, run_processes, seed, train

from model_center import engine
from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.recipe.agreement import from_all
from model_center.recipe.checkpoint_files import Manifest
from model_center.recipe.checkpoints import CheckpointStore, find_newest


class FullDisk:
    """Lets the call of a given number fail, of all calls that change the file system below a directory.

    Args:
        directory: The directory.
        number: Of the call, from 1.
        patch: Undoes it.
        stays_full: Whether all writes that follow fail as well.
    """

    def __init__(self, directory: Path, number: int, patch: pytest.MonkeyPatch, *, stays_full: bool = False) -> None:
        self.directory, self.remaining, self.calls, self.stays_full = directory, number, 0, stays_full
        original = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            if mode.startswith("r") or not path.is_relative_to(directory):
                return original(path, mode, *args, **options)
            self.count()
            return Writes(original(path, mode, *args, **options), self)

        patch.setattr(Path, "open", opened)
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "touch"), (os, "fsync")):
            patch.setattr(owner, name, self.counted(getattr(owner, name), needs_room=name in ("mkdir", "touch")))

    def counted(self, call: Any, *, needs_room: bool) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            self.count(needs_room=needs_room)
            return call(*args, **options)

        return counting

    def count(self, *, needs_room: bool = True) -> None:
        self.calls += 1
        self.remaining -= 1
        if self.remaining == 0 or (self.stays_full and needs_room and self.remaining < 0):
            raise OSError(errno.ENOSPC, "No space left on device")


class Writes:
    """A file whose writes count, and the flush or close that brings what was written from its buffer to the disk."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self._file, self._disk, self._has_written = file, disk, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "Writes":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._count_flush()

    def write(self, data: Any) -> int:
        self._disk.count()
        self._has_written = True
        return int(self._file.write(data))

    def flush(self) -> None:
        self._file.flush()
        self._count_flush()

    def _count_flush(self) -> None:
        if self._has_written:
            self._has_written = False
            self._disk.count()


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("stays_full", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_no_space_left_at_any_moment(tmp_path: Path, asynchronous: bool, stays_full: bool) -> None:
    directory = tmp_path / "checkpoints"
    state = make_state()
    store = CheckpointStore(directory, keep_last=1, keep_best=True, asynchronous=asynchronous)
    train(state, 1)
    store.save(state, step=1, config="x", score=0.1)  # the best, which stays
    store.save(state, step=2, config="x", score=0.2)
    store.wait()
    before = {path.name: bytes_of(path) for path in directory.glob("step-*")}
    expected = contents(state)
    number, failures = 0, 0
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(directory, number, patch, stays_full=stays_full)
            try:
                store.save(state, step=3, config="x", score=0.3)
                store.wait()
            except OSError as error:
                assert "No space left on device" in str(error)  # noqa: PT017 - it need not be raised
                failures += 1
        if disk.calls < number:
            break
        found = find_newest(directory, verify=True)
        assert not found.damaged
        left = {path.name for path in directory.iterdir()} - {".lock"}
        if found.path == directory / "step-00000003":  # the failure came when it was complete
            store.save(state, step=2, config="x", score=0.2)
            store.wait()
            shutil.rmtree(directory / "step-00000003", ignore_errors=True)
            before = {path.name: bytes_of(path) for path in directory.glob("step-*")}
        else:
            assert left == before.keys()
            assert {name: bytes_of(directory / name) for name in before} == before
    assert failures > 60
    resumed = make_state()
    store.load(directory / "step-00000003", resumed)
    assert_equal(contents(resumed), expected)


def fill_the_disk_of_one(folder: Path) -> None:
    """Fail on one of two processes, at one call after the other."""
    directory = folder / "checkpoints"
    state = make_state()
    train(state, 1)
    failures = 0
    with CheckpointStore(directory, keep_last=1, keep_best=False, asynchronous=True) as store:
        store.save(state, step=1, config="x")
        store.wait()
        for number in range(1, 200, 5):
            engine.synchronize()
            failing = number // 5 % 2
            with pytest.MonkeyPatch.context() as patch:
                disk = FullDisk(
                    directory, number if engine.rank() == failing else -1, patch, stays_full=number % 4 == 1
                )
                try:
                    store.save(state, step=2, config="x")
                    store.wait()
                except OSError as error:
                    assert "No space left on device" in str(error)  # noqa: PT017 - it need not be raised
                    failures += 1
            calls = from_all(disk.calls)[failing]
            found = store.newest(verify=True)
            assert not found.damaged
            if found.path == directory / "step-00000002":
                store.save(state, step=1, config="x")
                store.wait()
            else:
                assert found.path == directory / "step-00000001"
                left = {path.name for path in directory.iterdir()} if engine.rank() == 0 else set()
                assert left <= {".lock", "step-00000001"}
            if calls < number and number > 100:
                break
        assert failures > 10


def test_no_space_left_for_one_of_two_processes(tmp_path: Path) -> None:
    run_processes(fill_the_disk_of_one, 2, tmp_path)


def test_the_message_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = SafetensorsWriter.add

    def failing(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        if "exp_avg_sq" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(writer, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "add", failing)
    state = make_state()
    train(state, 1)
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=True, asynchronous=True)
    store.save(state, step=1, config="")
    train(state, 1)
    file = r"optimizer-00001-of-00001\.safetensors"
    with pytest.raises(OSError, match=rf"cannot write {file} of checkpoint .*step-00000001: No space left on device"):
        store.save(state, step=2, config="")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    monkeypatch.undo()
    store.save(state, step=3, config="")
    store.close()
    assert store.newest(verify=True).path == tmp_path / "step-00000003"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    state = make_state()
    seed()
    store = CheckpointStore(directory, keep_last=3, keep_best=True, asynchronous=False)
    for step in (1, 2):
        train(state, 1)
        store.save(state, step=step, config="x: 1\n")
    return directory


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """What may happen to a file, and what is then in it."""
    content, chance = path.read_bytes(), random.Random(0)
    yield "missing", None
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        yield "truncated", content[:length]
    yield "too long", content + b"\0"
    for _ in range(20):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        yield "do not have their checksum", bytes(flipped)


def test_every_damaged_file_is_named(saved: Path) -> None:
    newest, state = saved / "step-00000002", make_state()
    store = CheckpointStore(saved, keep_last=3, keep_best=True, asynchronous=False)
    files = sorted(Manifest.read(newest).files)
    assert len(files) == 6
    for name in files:
        content = (newest / name).read_bytes()
        for number, (reason, damaged) in enumerate(damages(newest / name)):
            (newest / name).unlink(missing_ok=True)
            if damaged is not None:
                (newest / name).write_bytes(damaged)
            found = find_newest(saved, verify=True)
            assert found.path == saved / "step-00000001"
            assert [(damage.path, damage.file) for damage in found.damaged] == [(newest, name)]
            assert reason in found.damaged[0].reason
            if number % 5 == 0:
                with pytest.raises(ValueError, match=f"is damaged:\nstep-00000002/{name}: .*{reason}"):
                    store.load(newest, state)
        (newest / name).write_bytes(content)
    assert store.newest(verify=True).path == newest


def test_flipped_bits_of_a_manifest_are_seen(saved: Path) -> None:
    path = saved / "step-00000002" / "manifest.json"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place // 3 % 8)
        path.write_bytes(flipped)
        found = find_newest(saved)
        assert found.path == saved / "step-00000001"
        assert [damage.file for damage in found.damaged] == ["manifest.json"]
    for length in range(0, len(content) - 2, 50):
        path.write_bytes(content[:length])
        assert [damage.file for damage in find_newest(saved).damaged] == ["manifest.json"]
    with pytest.raises(ValueError, match=r"is damaged: manifest\.json: not a manifest"):
        CheckpointStore(saved, keep_last=1, keep_best=True, asynchronous=False).load(path.parent, make_state())
    path.write_bytes(content)
