"""Weights & Biases in offline mode, for real where it is installed."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from model_center.recipe.metrics import StepMetrics, ValidationMetrics
from model_center.recipe.wandb_recorder import WeightsAndBiases

STEP: dict[str, Any] = {"epoch": 0.1, "learning_rate": 1e-4, "gradient_norm": 2.0, "seconds": 0.5}


def open_recorder(run: Path) -> WeightsAndBiases:
    return WeightsAndBiases(run, project="tests", name="tiny", config={"seed": 3})


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="needs the package wandb, which is not installed"):
        open_recorder(tmp_path)


def logged(run: Path) -> Iterator[dict[str, str]]:
    """Yield what the offline files of a run hold of each call of `log`, as JSON texts by name."""
    protocol, datastore = (
        import_module(f"wandb.{name}") for name in ("proto.wandb_internal_pb2", "sdk.internal.datastore")
    )
    for file in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        store = datastore.DataStore()
        store.open_for_scan(str(file))
        while data := store.scan_data():
            record = protocol.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): item.value_json for item in items}


def test_offline_records_go_on_in_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb, which is not part of the development environment")
    monkeypatch.setenv("WANDB_MODE", "offline")
    identifiers = []
    for first in (1, 3):
        recorder = open_recorder(tmp_path)
        identifiers.append(recorder.run.id)
        for number in (first, first + 1):
            recorder.record(StepMetrics(step=number, loss=1 / number, samples_per_second=32.0, **STEP))
        recorder.record(ValidationMetrics(step=first + 1, loss=0.0, tokens=10))
        recorder.close()
    assert identifiers[0] == identifiers[1]
    records = list(logged(tmp_path))
    steps = [(float(each["step"]), float(each["train/loss"])) for each in records if "train/loss" in each]
    assert steps == [(1, 1), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert [float(each["validation/perplexity"]) for each in records if "validation/loss" in each] == [1, 1]
