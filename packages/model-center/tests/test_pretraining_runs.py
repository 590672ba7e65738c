"""Whole pre-training runs of a tiny BERT: what may change when they go on, what they measure, what stops them."""

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from strict_json import strict_loads
from tiny_pretraining import STEPS, tiny_run
from torch import Tensor

from model_center import recipe
from model_center.dataset import make_builder
from model_center.engine.optim import AdamOptimizer
from model_center.model.base import BaseModel
from model_center.recipe import Callbacks, OptimizerOptions, PretrainConfig, PretrainingJob, pretrain
from model_center.recipe.callbacks import MicroBatch
from model_center.recipe.pretraining import run_recorders, train
from model_center.recipe.pretraining_job import predicted_peak, prepare_pretraining
from model_center.recipe.run_directory import RunDirectory


@pytest.fixture(scope="module")
def base(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    return tiny_run(encoder, tmp_path_factory.mktemp("pretraining"))


@pytest.fixture(scope="module")
def short(base: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of six steps; copy it before it goes on."""
    output = tmp_path_factory.mktemp("runs") / "short"
    pretrain(replace(base, output=str(output)))
    return output


@pytest.fixture
def resumed(base: PretrainConfig, short: Path, tmp_path: Path) -> PretrainConfig:
    """The configuration of a copy of the run, to go on with."""
    shutil.copytree(short, tmp_path / "run")
    return replace(base, output=str(tmp_path / "run"))


def records(output: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(strict_loads, lines) if record["kind"] == kind]


def column(output: str | Path, name: str) -> list[float]:
    return [record[name] for record in records(output)]


def weights(output: str | Path, step: int) -> dict[str, Tensor]:
    return load_file(Path(output) / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def test_a_longer_run_goes_on_as_if_it_had_been_so_long_from_the_start(
    base: PretrainConfig, resumed: PretrainConfig, tmp_path: Path
) -> None:
    straight = replace(base, output=str(tmp_path / "straight"), max_steps=12)
    pretrain(straight)
    result = pretrain(replace(resumed, max_steps=12), resume="auto")
    assert column(resumed.output, "loss") == column(straight.output, "loss")
    expected, found = (weights(output, 12) for output in (straight.output, resumed.output))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert [validation.step for validation in result.validations] == [3, 6, 9, 12]


def test_a_schedule_ends_where_the_new_max_steps_says(resumed: PretrainConfig) -> None:
    """From the step it goes on at, the learning rate is that of a run of that length; before, it was another one."""
    linear = OptimizerOptions(learning_rate=1e-2, schedule="linear", warmup_steps=2)
    pretrain(replace(resumed, max_steps=12, optimizer=linear), resume="auto")
    rates = column(resumed.output, "learning_rate")
    assert rates[STEPS - 1] == 1e-2
    assert rates[STEPS:] == pytest.approx([1e-2 * (13 - step) / (13 - 2) for step in range(7, 13)])


def test_what_else_may_change(resumed: PretrainConfig) -> None:
    changed = replace(
        resumed,
        max_steps=8,
        log_every=3,
        batch=recipe.BatchOptions(global_size=4, micro_size=3),
        optimizer=OptimizerOptions(learning_rate=5e-3, schedule="constant", warmup_steps=2, weight_decay=0.5),
        validation=recipe.ValidationOptions(every_steps=1, batches=1),
        checkpoints=recipe.CheckpointOptions(every_steps=1, keep_last=5),
    )

    class Decay(Callbacks):
        def after_step(self, job: PretrainingJob, metrics: recipe.StepMetrics) -> None:
            self.seen = [group["weight_decay"] for group in job.optimizer.param_groups]

    callbacks = Decay()
    pretrain(changed, resume="auto", callbacks=callbacks)
    assert column(resumed.output, "learning_rate")[STEPS:] == [5e-3, 5e-3]
    assert callbacks.seen == [0.5]
    names = sorted(path.name for path in Path(resumed.output, "checkpoints").glob("step-*"))
    assert names[-2:] == ["step-00000007", "step-00000008"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 here"),
        ({"batch": recipe.BatchOptions(global_size=8)}, r"batch\.global_size: 4 in the checkpoint, 8 here"),
        ({"max_steps": 5}, "max_steps must be at least the 6 steps that .* has done, but is 5"),
    ],
)
def test_what_may_not_change(resumed: PretrainConfig, changes: dict[str, Any], message: str) -> None:
    before = records(resumed.output)
    with pytest.raises(ValueError, match=message):
        pretrain(replace(resumed, **changes), resume="auto")
    assert records(resumed.output) == before


def test_other_samples_or_another_model_are_named(resumed: PretrainConfig) -> None:
    data = replace(resumed.data, mask_share=0.3)
    with pytest.raises(ValueError, match=r"data\.mask_share: None in the checkpoint, 0\.3 here"):
        pretrain(replace(resumed, data=data), resume="auto")
    model = replace(resumed.model, options={"num_layers": 3})
    with pytest.raises(ValueError, match="`num_layers` is 2 in the checkpoint, 3 here"):
        pretrain(replace(resumed, model=model), resume="auto")


def test_a_finished_run_has_nothing_left_to_do(resumed: PretrainConfig) -> None:
    before = records(resumed.output)
    result = pretrain(resumed, resume="auto")
    assert records(resumed.output) == before
    assert [validation.step for validation in result.validations] == [3, 6]
    assert recipe.read_status(Path(resumed.output))["state"] == "finished"


class Broken(Callbacks):
    def after_step(self, job: PretrainingJob, metrics: recipe.StepMetrics) -> None:
        raise RuntimeError("power failure")


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(base: PretrainConfig, tmp_path: Path) -> None:
    config = replace(base, output=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="power failure"):
        pretrain(config, callbacks=Broken())
    with pytest.raises(ValueError, match=r"is not empty; .* --resume auto to go on with the run there, or --overwrite"):
        pretrain(config)
    with pytest.raises(ValueError, match=r"resume and overwrite: .* give one of them"):
        pretrain(config, resume="auto", overwrite=True)
    job = recipe.prepare_pretraining(config, resume_run=True)
    assert "ended before its first checkpoint was whole: it begins again" in job.announcement
    train(job)
    assert column(config.output, "step") == [1, 2, 3, 4, 5, 6]
    again = recipe.prepare_pretraining(config, resume_run=True)
    with again.data:
        assert "begins again" not in again.announcement


def test_what_a_run_tells(short: Path) -> None:
    steps, validations, status = records(short), records(short, "validation"), recipe.read_status(short)
    for record in steps:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["tflops"] * 1e12 * record["seconds"] > 6 * record["tokens"] * 2000  # parameters of the blocks
        assert "peak_share" not in record  # of a CPU
    assert steps[-1]["memory_gib"] >= steps[0]["memory_gib"] > 0.05
    assert status["summary"]["predicted_memory_gib"] is None
    result = status["result"]
    assert result["tokens"] == sum(record["tokens"] for record in steps)
    assert result["memory_gib"] == steps[-1]["memory_gib"]
    assert result["final_loss"] == validations[-1]["loss"]
    assert result["perplexity"] == pytest.approx(math.exp(validations[-1]["loss"]))


def test_prediction_of_a_gpu_holds_weights_gradients_and_states(base: PretrainConfig, tmp_path: Path) -> None:
    job = recipe.prepare_pretraining(replace(base, output=str(tmp_path / "run")))
    with job.data:
        objective = job.callbacks.make_objective(job.model.config, job.tokenizer, base.data.objective_options)
        found = predicted_peak(base, type(job.model), job.model.config, objective) * 2**30
    numel = sum(weight.numel() for weight in job.model.parameters())
    assert 16 * numel < found - 64 * 2**20 < 200 * numel  # beside what matrix libraries take


class Changed(Callbacks):
    """Twice the loss, half the learning rate, and a list of what happened."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def make_optimizer(self, model: BaseModel, options: OptimizerOptions) -> AdamOptimizer:
        return super().make_optimizer(model, replace(options, beta2=0.5))

    def summed_loss(self, model: BaseModel, batch: MicroBatch) -> Tensor:
        return 2 * super().summed_loss(model, batch)

    def after_step(self, job: PretrainingJob, metrics: recipe.StepMetrics) -> None:
        assert metrics.step == job.step
        assert job.optimizer.param_groups[0]["betas"][1] == 0.5
        self.events.append(("step", job.step))

    def after_validation(self, job: PretrainingJob, metrics: recipe.ValidationMetrics) -> None:
        assert not job.model.training
        self.events.append(("validation", metrics.step))

    def after_checkpoint(self, job: PretrainingJob, path: Path) -> None:
        assert (path / "manifest.json").is_file()
        self.events.append(("checkpoint", int(path.name.removeprefix("step-"))))


def test_callbacks(base: PretrainConfig, short: Path, tmp_path: Path) -> None:
    callbacks = Changed()
    pretrain(replace(base, output=str(tmp_path / "run")), callbacks=callbacks)
    assert column(tmp_path / "run", "loss")[0] == pytest.approx(2 * column(short, "loss")[0])
    steps = [("step", number) for number in range(1, STEPS + 1)]
    first, second = ([("validation", step), ("checkpoint", step)] for step in (3, 6))
    # The first checkpoint is told before the second one is written.
    assert callbacks.events == [*steps[:3], first[0], *steps[3:], second[0], first[1], second[1]]


def test_a_learning_rate_that_explodes_stops_the_run(base: PretrainConfig, tmp_path: Path) -> None:
    config = replace(
        base,
        output=str(tmp_path / "run"),
        max_steps=100,
        optimizer=OptimizerOptions(learning_rate=1.0, schedule="constant", warmup_steps=1),
        watch=recipe.WatchOptions(patience=3),
    )
    with pytest.raises(
        recipe.TrainingStoppedError, match=r"watch\.divergence.*Lower optimizer\.learning_rate \(now 1\)"
    ):
        pretrain(config)
    assert recipe.read_status(tmp_path / "run")["state"] == "failed"
    assert list((tmp_path / "run" / "anomalies").glob("step-*.json"))


class NotANumber(Callbacks):
    """The loss of one step is NaN, whenever its turn comes."""

    job: PretrainingJob

    def __init__(self, step: int) -> None:
        self.step = step

    def summed_loss(self, model: BaseModel, batch: MicroBatch) -> Tensor:
        loss = super().summed_loss(model, batch)
        return loss * math.nan if model.training and self.job.step + 1 == self.step else loss


@pytest.mark.parametrize(
    ("policy", "step", "steps"),
    [
        ("skip", 5, [1, 2, 3, 4, 5, 6]),
        ("rewind", 5, [1, 2, 3, 4, 4, 6]),
        ("rewind", 6, [1, 2, 3, 4, 5, 4, 5]),  # the last step, which is not done, ends the run all the same
    ],
)
def test_a_batch_whose_loss_is_no_number(
    base: PretrainConfig, tmp_path: Path, policy: Any, step: int, steps: list[int]
) -> None:
    output = tmp_path / "run"
    callbacks = NotANumber(step)
    watch = recipe.WatchOptions(non_finite=policy)
    job = recipe.prepare_pretraining(replace(base, output=str(output), watch=watch), callbacks=callbacks)
    callbacks.job = job
    expected = sorted(job.data.samples_of(step - 1)[0].tolist())
    result = train(job)
    assert column(output, "step") == steps
    assert [validation.step for validation in result.validations] == [3, 6]
    assert all(torch.isfinite(weight).all() for weight in weights(output, 6).values())
    report = json.loads((output / "anomalies" / f"step-{step:06d}.json").read_text())
    assert (report["action"], report["loss"]) == (policy, "nan")
    assert sorted(report["samples"]) == expected
    assert recipe.read_status(output)["result"]["anomalies"] == 1
    if policy == "skip":
        assert column(output, "loss")[step - 1] is None


def test_numbers_that_are_none_are_null_in_all_files_and_a_run_goes_on_after_them(
    base: PretrainConfig, tmp_path: Path
) -> None:
    class Diverged(Callbacks):
        def summed_loss(self, model: BaseModel, batch: MicroBatch) -> Tensor:
            return super().summed_loss(model, batch) * (1.0 if model.training else math.nan)

    config = replace(base, output=str(tmp_path / "run"), max_steps=3)
    pretrain(config, callbacks=Diverged())
    assert [(record["loss"], record["perplexity"]) for record in records(config.output, "validation")] == [(None, None)]
    assert strict_loads((tmp_path / "run" / "status.json").read_text())["result"]["final_loss"] is None
    result = pretrain(replace(config, max_steps=6), resume="auto", callbacks=Diverged())
    assert [record["loss"] for record in records(config.output, "validation")] == [None, None]
    assert [math.isnan(validation.loss) for validation in result.validations] == [True, True]


@pytest.fixture
def pieces(base: PretrainConfig, tmp_path: Path) -> PretrainConfig:
    """A run of a GPT-2 over documents half of which are single tokens, after which nothing is to be predicted."""
    for name, lengths in (("train", (1, 8) * 4), ("single", (1, 1))):
        with make_builder(tmp_path / f"{name}_1", dtype=np.uint16) as builder:
            for length in lengths:
                builder.add_item(np.arange(5, 5 + length))
                builder.end_document()
    sizes = {"vocab_size": 32, "dim_model": 16, "num_heads": 2, "dim_head": 8, "dim_ff": 32, "num_layers": 1}
    return replace(
        base,
        output=str(tmp_path / "run"),
        max_steps=8,
        model=recipe.PretrainModelOptions(name="gpt2-base", precision="fp32", options=sizes | {"position_size": 16}),
        data=replace(base.data, path=str(tmp_path), validation_name="single"),
        batch=recipe.BatchOptions(global_size=1, micro_size=1),
        validation=recipe.ValidationOptions(every_steps=4),
    )


def test_steps_and_validations_without_targets_are_left_out(pieces: PretrainConfig) -> None:
    """One epoch has each document in a step of its own, and nothing that is held out has a target."""
    output = io.StringIO()
    job = prepare_pretraining(pieces)
    result = train(job, console=Console(file=output, width=200))
    losses = column(pieces.output, "loss")
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
    assert job.watch.first == losses[0]
    assert output.getvalue().count("its samples have no target tokens, so it was left out") == 4
    assert [(each.step, math.isnan(each.loss)) for each in result.validations] == [(4, True), (8, True)]
    assert result.summary.best_loss is None
    assert result.summary.training_loss == losses[-1]
    assert job.scheduler.num_iter == 9  # the number of the step to come
    pretrain(replace(pieces, max_steps=16), resume="auto")
    assert len(column(pieces.output, "loss")) == 8


def test_there_must_be_a_checkpoint_to_rewind_to(base: PretrainConfig, tmp_path: Path) -> None:
    callbacks, watch = NotANumber(1), recipe.WatchOptions(non_finite="rewind")
    config = replace(base, output=str(tmp_path / "run"), watch=watch)
    callbacks.job = recipe.prepare_pretraining(config, callbacks=callbacks)
    with pytest.raises(
        recipe.TrainingStoppedError, match=r"step 1: there is no checkpoint yet .* checkpoints\.every_steps"
    ):
        train(callbacks.job)


def test_weights_and_biases_get_what_is_configured(
    base: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("model_center.recipe.pretraining_job.import_wandb", lambda: None)
    monkeypatch.setattr("model_center.recipe.pretraining.WeightsAndBiases", lambda run, **given: made.append(given))
    config = replace(base, output=str(tmp_path / "run"), wandb=recipe.WandbOptions(mode="offline", project="tests"))
    job = recipe.prepare_pretraining(config)
    job.data.close()
    (tmp_path / "run").mkdir()
    recorders = run_recorders(RunDirectory(tmp_path / "run"), job, Console(quiet=True))
    for recorder in recorders[:-1]:
        recorder.close()
    (given,) = made
    assert (given["project"], given["name"], given["mode"]) == ("tests", "run", "offline")
    assert given["config"]["max_steps"] == STEPS
