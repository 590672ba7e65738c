import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_encoder import boolq_rows

from model_center.model import Bert
from model_center.recipe import (
    DataOptions,
    EncoderClassifier,
    FinetuneConfig,
    Job,
    ModelOptions,
    OptimizerOptions,
    StepMetrics,
    evaluate_checkpoint,
    finetune,
    prepare,
    read_status,
    train,
)
from model_center.recipe.cli import main
from model_center.recipe.evaluation import evaluate, majority_scores
from model_center.recipe.metrics import Metrics


def config(encoder: Path, tasks: Path, run: Path, *, task: str = "BoolQ", **changes: Any) -> FinetuneConfig:
    options: dict[str, Any] = {
        "output": str(run),
        "model": ModelOptions(name=str(encoder)),
        "data": DataOptions(path=str(tasks), task=task, max_length=32, batch_size=8),
        "optimizer": OptimizerOptions(learning_rate=1e-2),
    }
    return FinetuneConfig(**options | changes)


class Listener:
    """A recorder that remembers, and may raise at a step."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.heard: list[Metrics] = []
        self.closed = False
        self.interrupt_at = interrupt_at

    def record(self, metrics: Metrics) -> None:
        self.heard.append(metrics)
        if metrics.step == self.interrupt_at:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("task", ["BoolQ", "COPA"])
def test_both_kinds_of_tasks_are_learnt(encoder: Path, tasks: Path, tmp_path: Path, task: str) -> None:
    result = finetune(config(encoder, tasks, tmp_path / "run", task=task, epochs=4))
    assert result.best.score >= 0.9
    assert result.best.baseline == 0.5
    assert len(result.evaluations) == 4
    assert evaluate_checkpoint(result.run.checkpoint("best"), tasks).scores == result.best.scores


def test_prepare_writes_nothing(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    job = prepare(config(encoder, tasks, tmp_path / "run"))
    assert job.total_steps == 36
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(2, None, [12, 24]), (2, 5, [5]), (2, 14, [12, 14])])
def test_when_it_evaluates(
    encoder: Path, tasks: Path, tmp_path: Path, epochs: int, max_steps: int | None, expected: list[int]
) -> None:
    result = finetune(config(encoder, tasks, tmp_path / "run", epochs=epochs, max_steps=max_steps))
    assert [evaluation.step for evaluation in result.evaluations] == expected


def test_recorders_hear_everything_and_are_closed(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    listener = Listener()
    result = finetune(config(encoder, tasks, tmp_path / "run", epochs=1), recorders=[listener])
    assert [type(metrics).__name__ for metrics in listener.heard] == ["StepMetrics"] * 12 + ["EvaluationMetrics"]
    assert listener.heard[-1] is result.last
    assert listener.closed
    steps = [metrics for metrics in listener.heard if isinstance(metrics, StepMetrics)]
    lines = [json.loads(line) for line in result.run.metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [metrics.loss for metrics in steps]


def test_an_interruption_between_evaluations_leaves_plot_and_metrics(
    encoder: Path, tasks: Path, tmp_path: Path
) -> None:
    listener = Listener(interrupt_at=5)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(encoder, tasks, tmp_path / "run"), recorders=[listener])
    assert listener.closed
    assert read_status(tmp_path / "run")["state"] == "interrupted"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "run" / "plot.png").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()


class Saboteur(Listener):
    """Makes a model forget its classifier just before its last evaluation."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def record(self, metrics: Metrics) -> None:
        super().record(metrics)
        if isinstance(metrics, StepMetrics) and metrics.step == self.job.total_steps:
            assert isinstance(self.job.model, EncoderClassifier)
            torch.nn.init.zeros_(self.job.model.classifier.weight)


def test_best_is_the_best_evaluation_not_the_last(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    job = prepare(config(encoder, tasks, tmp_path / "run", epochs=4))
    result = train(job, recorders=[Saboteur(job)])
    scores = [evaluation.score for evaluation in result.evaluations]
    assert result.best.score == max(scores[:3]) >= 0.8
    assert result.best is result.evaluations[scores.index(max(scores))]
    assert result.last.score == 0.5
    for name, expected in (("best", result.best), ("last", result.last)):
        checkpoint = result.run.path / "checkpoints" / name
        assert evaluate_checkpoint(checkpoint, tasks).loss == pytest.approx(expected.loss, rel=1e-5)


def test_loss_and_scores_of_an_evaluation_row_by_row(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    job = prepare(config(encoder, tasks, tmp_path / "run", task="COPA"))
    found = evaluate(job.model, job.dev_loader)
    losses, hits = [], []
    dataset = job.dev_loader.dataset
    with torch.no_grad():
        for item in (dataset[row] for row in range(len(dataset))):
            logits = job.model({name: value.unsqueeze(0) for name, value in item.items() if name != "labels"})[0]
            losses.append(torch.nn.functional.cross_entropy(logits, item["labels"]).item())
            hits.append(int(logits.argmax()) == int(item["labels"]))
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.score == sum(hits) / len(hits)
    assert found.samples == len(dataset)


def test_majority_scores_on_uneven_classes(encoder: Path, tmp_path: Path) -> None:
    rows = boolq_rows(20, seed=3)
    uneven = [row for number, row in enumerate(rows) if row["label"] or number % 4 == 0]
    (tmp_path / "BoolQ").mkdir()
    for split in ("train", "val"):
        (tmp_path / "BoolQ" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven))
    dataset = prepare(config(encoder, tmp_path, tmp_path / "run")).dev_loader.dataset
    assert majority_scores(dataset) == {"accuracy": 10 / 15}


def test_a_task_of_ones_own(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mood.yaml").write_text(
        "name: Mood\nfields: [text]\nlabels: [sad, happy]\ninputs: '{text}'\nflexible: text\n", encoding="utf-8"
    )
    Path("Mood").mkdir()
    for split, count in (("train", 64), ("val", 16)):
        rows = [
            {"text": row["passage"], "label": ["sad", "happy"][row["label"]]} for row in boolq_rows(count, seed=count)
        ]
        Path(f"Mood/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = finetune(config(encoder, tmp_path, tmp_path / "run", task="mood.yaml", epochs=1))
    monkeypatch.chdir("/")
    assert evaluate_checkpoint(result.run.checkpoint("best"), tmp_path).scores == result.best.scores


def test_a_checkpoint_that_does_not_name_its_family(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    for file in encoder.iterdir():
        (nameless / file.name).write_bytes(file.read_bytes())
    values = json.loads((nameless / "config.json").read_text())
    del values["model_type"], values["format_version"]
    (nameless / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="`model_type`"):
        prepare(config(nameless, tasks, tmp_path / "run"))
    job = prepare(config(encoder, tasks, tmp_path / "run", model=ModelOptions(name=str(nameless), family="bert")))
    assert isinstance(job.model.backbone, Bert)


def test_precisions(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("half", torch.float32)):
        options = ModelOptions(name=str(encoder), precision=precision)  # type: ignore[arg-type]
        job = prepare(config(encoder, tasks, tmp_path / precision, model=options, epochs=4))
        assert {parameter.dtype for parameter in job.model.parameters()} == {dtype}, precision
        assert train(job).best.score >= 0.9


def test_the_global_generator_of_the_caller_does_not_matter(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    losses = []
    for number in range(2):
        torch.manual_seed(number)
        listener = Listener()
        finetune(config(encoder, tasks, tmp_path / str(number), max_steps=3), recorders=[listener])
        losses.append([metrics.loss for metrics in listener.heard])
    assert losses[0] == losses[1]


def test_an_evaluation_that_fails_loses_no_epoch(
    encoder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("model_center.recipe.finetuning.evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        finetune(config(encoder, tasks, tmp_path / "run", max_steps=1))
    monkeypatch.undo()
    assert evaluate_checkpoint(tmp_path / "run" / "checkpoints" / "last", tasks).samples > 0


def test_a_full_disk_ends_in_one_message(
    encoder: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(model: EncoderClassifier, tokenizer: Any, directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    monkeypatch.setattr(EncoderClassifier, "save", fail)
    data = [f"--data.path={tasks}", "--data.max_length=32", "--max_steps=1"]
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", f"--model.name={encoder}", *data, f"--output={tmp_path / 'run'}"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("model-center finetune: error: [Errno 28] No space left on device: ")
    assert told.endswith("; make room there, then begin again with --overwrite\n")
    assert read_status(tmp_path / "run")["state"] == "failed"


def test_what_is_shown(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as file:
        console = Console(file=file, width=200)
        train(prepare(config(encoder, tasks, tmp_path / "run", epochs=1, log_every=6)), console=console)
    lines = (tmp_path / "shown").read_text().splitlines()
    assert lines[0].startswith("Bert with 0.0 million parameters on BoolQ: 96 training and 32 dev samples, 2 classes")
    assert lines[1] == "12 steps of 8 samples, float32 on cpu"
    assert [line.split(" |")[0] for line in lines[2:5]] == ["step 1/12", "step 6/12", "step 12/12"]
    assert lines[5].startswith("evaluation after step 12 (epoch 1.00): loss ")
