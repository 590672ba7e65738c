import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from model_center.recipe import run_directory
from model_center.recipe.commands import error_of_run
from model_center.recipe.run_directory import check_output, open_run, read_status, replacing


def state(path: Path) -> str:
    return str(read_status(path)["state"])


def finished_run(path: Path) -> None:
    with open_run(path, "seed: 0\n") as run:
        run.metrics.write_text("old\n")
        run.checkpoint("best").mkdir(parents=True)


def test_states_of_a_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "a" / "run", "seed: 3\n") as run:
        assert state(run.path) == "running"
        assert run.config.read_text() == "seed: 3\n"
    assert state(run.path) == "finished"
    assert {"pid", "started", "updated", "versions"} <= read_status(run.path).keys()


def test_a_run_that_is_left_early_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "a", ""):
        raise KeyboardInterrupt
    assert state(tmp_path / "a") == "interrupted"
    with pytest.raises(RuntimeError), open_run(tmp_path / "b", ""):
        raise RuntimeError("boom")
    assert state(tmp_path / "b") == "failed"
    assert read_status(tmp_path / "b")["error"] == "RuntimeError: boom"


def full_disk(*arguments: Any, **options: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")


def test_a_disk_that_is_full_while_the_best_checkpoint_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk() -> None:
        with open_run(tmp_path / "run", "") as run:
            with run.new_last_checkpoint() as directory:
                for name in ("config.json", "model.safetensors"):
                    (directory / name).touch()
            monkeypatch.setattr(shutil, "copyfile", full_disk)
            run.keep_last_as_best()

    with pytest.raises(OSError, match="No space left on device") as caught:
        fill_the_disk()
    told = str(error_of_run(caught.value, "begin again"))
    assert told == "[Errno 28] No space left on device: 'model.safetensors'; make room there, then begin again"
    assert state(tmp_path / "run") == "failed"
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["last"]


def test_the_best_checkpoint_is_a_copy_of_the_last(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "") as run:
        for version in ("old", "new"):
            with run.new_last_checkpoint() as directory:
                for name in ("words/vocab.txt", f"{version}.json"):
                    (directory / name).parent.mkdir(exist_ok=True)
                    (directory / name).write_text(version)
            run.keep_last_as_best()
        for file in run.checkpoint("last").rglob("*.*"):
            file.write_text("changed later")
        best = run.checkpoint("best")
        kept = {str(file.relative_to(best)): file.read_text() for file in best.rglob("*.*")}
        assert kept == {"words/vocab.txt": "new", "new.json": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_error_of_a_run_is_told_even_if_its_status_cannot_be_written(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        monkeypatch.setattr(run_directory, "write_text", full_disk)
        raise error("boom")

    with pytest.raises(error, match="boom"), open_run(tmp_path / "run", ""):
        fail()
    assert state(tmp_path / "run") == "running"


def test_output_that_holds_something_is_refused_and_untouched(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"), open_run(tmp_path / "run", ""):
        pytest.fail("entered")
    assert state(tmp_path / "run") == "finished"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "old\n"


def test_overwrite_deletes_an_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "file").touch()
    for link in ("link", "tensorboard"):
        (tmp_path / "run" / link).symlink_to(kept)
    (tmp_path / "run" / ".metrics.jsonl.7.tmp").touch()  # of a killed process
    (tmp_path / "run" / "ids").mkdir()
    for foreign in ("ids/train_1.bin", "thesis.txt"):
        (tmp_path / "run" / foreign).write_text("years of work")
    with open_run(tmp_path / "run", "new", overwrite=True) as run:
        left = sorted(entry.name for entry in run.path.iterdir())
        assert left == [".lock", "config.yaml", "ids", "link", "status.json", "thesis.txt"]
    assert (kept / "file").exists()
    assert (tmp_path / "run" / "ids" / "train_1.bin").read_text() == "years of work"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").touch()
    with pytest.raises(ValueError, match="no run directory"):
        check_output(notes, overwrite=True)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, "first"):
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(ValueError, match=r"another run is writing to .*run"), open_run(run, "", **options):
                pytest.fail("entered")
        with pytest.raises(ValueError, match="another run is writing to"):
            check_output(run, overwrite=True)
        assert (run / "config.yaml").read_text() == "first"
    with open_run(run, "second", resume=True):
        assert (run / "config.yaml").read_text() == "second"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".lock").touch()  # of a run that was killed before it wrote anything
    check_output(tmp_path / "new", overwrite=False)


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_output_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be made: .*file' is a file"):
        check_output(tmp_path / "file" / below, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="no permission to write"):
        check_output(tmp_path / "deep" / "run", overwrite=False)


def test_a_relative_output_in_an_empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("deep/run"), overwrite=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run directory"),
        ("{", "cannot be read"),
        ("[]", "no format_version"),
        ('{"format_version": 99}', "format version 99; this version reads up to 1"),
    ],
)
def test_unreadable_status(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_status(tmp_path)


def test_replacing_keeps_the_previous_directory_when_filling_fails(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "best"
    with replacing(target) as new:
        (new / "weights").write_text("first")
        assert not target.exists()
    with pytest.raises(TypeError), replacing(target) as new:
        (new / "weights").write_text(b"not text")  # type: ignore[arg-type]
    assert (target / "weights").read_text() == "first"
    with replacing(target) as new:
        (new / "other").write_text("second")
    assert [entry.name for entry in target.iterdir()] == ["other"]
    assert [entry.name for entry in target.parent.iterdir()] == ["best"]


WRITER = """
import itertools, json, sys
from pathlib import Path
from model_center.recipe.run_directory import open_run
with open_run(Path(sys.argv[1]), "x") as run:
    print("started", flush=True)
    for number in itertools.count():
        run.set_state("running", number=number, padding="x" * 100_000)
"""


def test_a_killed_process_leaves_a_readable_status_that_is_not_finished(tmp_path: Path) -> None:
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(run)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert state(run) == "running"
        with open_run(run, "again", overwrite=True):
            pass
        assert state(run) == "finished"
