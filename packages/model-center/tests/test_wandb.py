"""Weights & Biases in offline mode, for real where it is installed."""

import struct
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from model_center.recipe.cli import main
from model_center.recipe.metrics import StepMetrics, ValidationMetrics
from model_center.recipe.wandb_recorder import WeightsAndBiases, check_login

STEP: dict[str, Any] = {"epoch": 0.1, "learning_rate": 1e-4, "gradient_norm": 2.0, "seconds": 0.5}


def open_recorder(run: Path) -> WeightsAndBiases:
    return WeightsAndBiases(run, project="tests", name="tiny", mode="offline", config={"seed": 3})


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'needs the package wandb, .* install model-center with its extra "wandb"'):
        open_recorder(tmp_path)


class FakeWandb:
    """Stands for the package, and logs in or does not."""

    class Error(Exception):
        """The base class of the package's errors."""

    def __init__(self, answer: bool | str) -> None:
        self.answer = answer

    def login(self, *, verify: bool) -> bool:
        assert verify
        if isinstance(self.answer, str):
            raise self.Error(self.answer)
        return self.answer


@pytest.mark.parametrize("answer", [False, "No API key configured."])
def test_a_run_that_could_not_send_its_records_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Literal[False] | str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(answer))
    words = [f"--output={tmp_path / 'run'}", "--model.name=gpt2-base", f"--data.path={tmp_path}", "--data.tokenizer=x"]
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", *words, "--wandb.mode=online"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert ("nobody is logged in." if answer is False else answer) in told
    assert "Log in with `wandb login`, or give --wandb.mode offline" in told
    assert not (tmp_path / "run").exists()


def test_whoever_is_logged_in_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(True))
    check_login()


def stored(content: bytes) -> Iterator[bytes]:
    """Yield the records of an offline file, which is a log of LevelDB's form behind seven bytes of its own."""
    place, block, record = 7, 32768, b""
    while place + 7 <= len(content):
        if block - place % block < 7:  # too little room for a part's head
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the only part, or the last one
            yield record
            record = b""


def logged(run: Path) -> Iterator[dict[str, str]]:
    """Yield what the offline files of a run hold of each call of `log`, as JSON texts by name."""
    protocol = import_module("wandb.proto.wandb_internal_pb2")
    for file in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        for content in stored(file.read_bytes()):
            record = protocol.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): item.value_json for item in items}


def test_offline_records_go_on_in_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    identifiers = []
    for first in (1, 3):
        time.sleep(1)  # wandb names the folder of a process by run and second
        recorder = open_recorder(tmp_path)
        identifiers.append(recorder.run.id)
        for number in (first, first + 1):
            recorder.record(StepMetrics(step=number, loss=1 / number, samples_per_second=32.0, **STEP))
        recorder.record(ValidationMetrics(step=first + 1, loss=0.0, tokens=10))
        recorder.close()
    assert identifiers[0] == identifiers[1]
    records: list[dict[str, str]] = []
    deadline = time.monotonic() + 30
    while len(records) < 6 and time.monotonic() < deadline:  # wandb's own process may not have written them yet
        time.sleep(0.05)
        records = list(logged(tmp_path))
    steps = [(float(each["step"]), float(each["train/loss"])) for each in records if "train/loss" in each]
    assert steps == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert [float(each["validation/perplexity"]) for each in records if "validation/loss" in each] == [1, 1]
