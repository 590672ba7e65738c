"""What goes wrong around checkpoints beside full disks: file systems, partners and programs that end early."""

import atexit
import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from checkpoint_training import (
    assert_equal,
    contents,
    exit_codes,
    make_state,
    run_processes,
    start_processes,
    train,
)

from model_center import engine
from model_center.dataset.indexed.manifest import checksum_of
from model_center.recipe import checkpoint_files, checkpoints
from model_center.recipe.checkpoint_files import Manifest, find_newest, is_locked
from model_center.recipe.checkpoint_writing import Writing
from model_center.recipe.checkpoints import CheckpointStore, TrainingState


def open_store(directory: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(directory, **{"keep_last": 1, "keep_best": False, "asynchronous": False, **options})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


@pytest.fixture
def state() -> TrainingState:
    made = make_state()
    train(made, 1)
    return made


def test_killed_between_the_renames_of_a_replacement(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the old one, under its hidden name, is the newest, before and after the directory is opened again."""
    store = open_store(tmp_path)
    store.save(state, step=1, config="old")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == tmp_path / "step-00000001":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(state, step=1, config="new")
    monkeypatch.undo()
    with pytest.warns(ResourceWarning, match=r"\.lock"):
        del store  # gives the lock back, as a killed process does
    newest = find_newest(tmp_path, verify=True).path
    assert newest is not None
    assert (newest / "run.yaml").read_text() == "old"
    store = open_store(tmp_path)
    assert store.newest(verify=True).path == newest
    store.load(newest, make_state())
    store.save(state, step=1, config="new")
    assert names(tmp_path) == ["step-00000001"]
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced")
    store.save(state, step=2, config="")
    assert names(tmp_path) == ["step-00000002"]


def test_a_rename_that_was_done_although_it_failed(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, when the answer to the first request is lost and the second one finds nothing to rename."""
    rename = Path.rename

    def twice(path: Path, target: Path) -> Path:
        rename(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", twice)
    store = open_store(tmp_path)
    for step in (1, 1, 2):
        store.save(state, step=step, config="")
    assert names(tmp_path) == ["step-00000002"]
    assert store.newest(verify=True).path == tmp_path / "step-00000002"


def test_an_old_checkpoint_that_somebody_reads(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps what a reader has open under another name, so that the directory cannot be deleted yet."""
    store = open_store(tmp_path)
    store.save(state, step=1, config="")
    delete = shutil.rmtree

    def busy(directory: Path, ignore_errors: bool = False) -> None:
        if directory.exists():
            (directory / ".nfs0001").touch()
            if not ignore_errors:
                raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    store.save(state, step=2, config="")
    store.save(state, step=1, config="")
    store.save(state, step=2, config="")
    assert find_newest(tmp_path, verify=True).path == tmp_path / "step-00000002"
    assert len(names(tmp_path)) > 1
    monkeypatch.setattr(shutil, "rmtree", delete)
    store.save(state, step=3, config="")
    assert names(tmp_path) == ["step-00000003"]


def test_new_directories_survive_a_power_cut(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint_files, "sync_directory", synced.append)
    open_store(tmp_path / "run" / "checkpoints").save(state, step=1, config="")
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoints"} <= set(synced)


def test_a_file_system_without_locks(tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> NoReturn:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    open_store(tmp_path).save(state, step=1, config="")
    assert names(tmp_path) == ["step-00000001"]


class BrokenTokenizer:
    """Fails as the Rust library does."""

    def save_pretrained(self, directory: Path) -> NoReturn:
        raise Exception("No space left on device (os error 28)")


def test_a_tokenizer_that_cannot_be_written(tmp_path: Path, state: TrainingState) -> None:
    store = open_store(tmp_path)
    state.tokenizer = BrokenTokenizer()
    with pytest.raises(OSError, match=r"cannot write the files of the tokenizer of .*step-00000001: No space left"):
        store.save(state, step=1, config="")
    assert names(tmp_path) == []


def test_a_manifest_of_something_else(tmp_path: Path, state: TrainingState) -> None:
    open_store(tmp_path).save(state, step=1, config="")
    path = tmp_path / "step-00000001" / "manifest.json"
    content = {"format": "another", "format_version": 1}
    path.write_bytes(checkpoint_files.as_json(content | {"checksum": checksum_of(content)}))
    assert "of the format 'another'" in find_newest(tmp_path).damaged[0].reason


def failing(writing: Writing, *_: object) -> NoReturn:
    raise OSError(f"no disk for {writing.target.name}")


def test_a_failed_checkpoint_is_told_beside_another_error(
    tmp_path: Path, state: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writing, "_write_pieces", failing)

    def diverge() -> NoReturn:
        with open_store(tmp_path, asynchronous=True) as store:
            store.save(state, step=1, config="")
            raise RuntimeError("the loss is nan")

    with pytest.raises(RuntimeError, match="the loss is nan") as told:
        diverge()
    assert told.value.__notes__ == ["besides, no disk for step-00000001"]
    assert not is_locked(tmp_path), "the lock must not wait for the traceback, which holds the store"
    monkeypatch.undo()
    store = open_store(tmp_path)
    assert names(tmp_path) == []
    store.save(state, step=1, config="")
    assert names(tmp_path) == ["step-00000001"]


def end_without_closing(folder: Path) -> None:
    """What a program does that ends after its last save."""
    state = make_state()
    train(state, 1)
    open_store(folder / "good", asynchronous=True).save(state, step=1, config="")
    Writing._write_pieces = failing  # type: ignore[assignment] # this process does nothing else
    open_store(folder / "bad", asynchronous=True).save(state, step=2, config="")
    with (folder / "stderr").open("w") as stderr, contextlib.redirect_stderr(stderr):
        atexit._run_exitfuncs()


def test_a_program_that_ends_after_its_last_save(tmp_path: Path) -> None:
    run_processes(end_without_closing, 1, tmp_path)
    assert find_newest(tmp_path / "good", verify=True).path == tmp_path / "good" / "step-00000001"
    assert (tmp_path / "stderr").read_text() == "no disk for step-00000002\n"


def lose_a_partner(folder: Path) -> None:
    """Save while the second process is killed, and fail for that reason."""
    checkpoints.HURRIED_TIMEOUT = 0.3  # type: ignore[attr-defined] # this process does nothing else
    engine.init_distributed(seed=1)
    state = make_state()
    train(state, 1)

    def save() -> None:
        with open_store(folder, asynchronous=True) as store:
            store.save(state, step=1, config="")
            store.wait()
            if engine.rank() == 1:
                Writing._write_pieces = lambda *_: os._exit(9)  # type: ignore[method-assign]
            store.save(state, step=2, config="")
            engine.synchronize()

    with pytest.raises(RuntimeError) as told:
        save()
    assert any("process 1 has not written its files" in note for note in told.value.__notes__)
    os._exit(5)


def test_a_partner_that_is_killed_is_not_waited_for(tmp_path: Path) -> None:
    assert exit_codes(start_processes(lose_a_partner, 2, tmp_path)) == [5, 9]
    assert find_newest(tmp_path, verify=True).path == tmp_path / "step-00000001"
    open_store(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def load_what_the_first_has_found(folder: Path) -> None:
    state = make_state()
    store = open_store(folder, keep_last=2)
    expected = []
    for step in (1, 2):
        train(state, 1)
        state.progress = {"step": step}
        store.save(state, step=step, config="")
        expected.append(contents(state))
    found = folder / f"step-{2 - engine.rank():08d}"  # as when a network file system shows a checkpoint later to some
    resumed = make_state()
    assert store.load(found, resumed) == {"step": 2}
    assert_equal(contents(resumed), expected[1])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        store.load(folder / ("missing" if engine.rank() == 0 else "step-00000001"), resumed)


def test_all_processes_load_the_same_checkpoint(tmp_path: Path) -> None:
    run_processes(load_what_the_first_has_found, 2, tmp_path)
    assert Manifest.read(tmp_path / "step-00000002").world_size == 2
