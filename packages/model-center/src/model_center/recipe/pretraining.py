"""Pre-training of any family on indexed data sets: the reference training loop, readable from top to bottom."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, perf_counter
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from model_center import engine
from model_center.dataset.indexed import IndexedDatasetError
from model_center.model.base import BaseModel

from .anomalies import TrainingStoppedError, Verdict, report_batch
from .callbacks import Callbacks, MicroBatch, SummedLoss, cross_entropy
from .checkpoint_files import step_name
from .checkpoints import CheckpointStore
from .commands import OK, RunInterrupted, error_of_run, preparing, print_lines
from .measuring import measure
from .metrics import JsonLines, Recorder, StepMetrics, TensorBoard, ValidationMetrics, recording
from .plot import Plot
from .pretrain_configuration import PretrainConfig
from .pretraining_corpus import SampleError
from .pretraining_data import PretrainingData, StepBatches
from .pretraining_job import PretrainingJob, prepare_pretraining
from .pretraining_resume import open_store, restore
from .progress import show_progress
from .report import RunSummary, read_records, summarize, texts_of
from .run_directory import Entry, RunDirectory, open_run
from .stop_signals import stop_signals
from .wandb_recorder import WeightsAndBiases

Resume = Literal["never", "auto"]
SHOWN = ("time in steps", "tokens/s", "operations", "share of peak", "memory, GiB", "predicted, GiB")
"""What of a run's summary is printed at the end."""
RESULT = (
    *("steps", "tokens", "final_loss", "perplexity", "best_loss", "seconds", "tokens_per_second", "tflops"),
    *("peak_share", "memory_gib", "predicted_memory_gib", "anomalies"),
)
"""What of a run's summary goes into its status.json at the end."""


@dataclass(frozen=True)
class PretrainingResult:
    """What a pre-training run came to."""

    run: RunDirectory
    summary: RunSummary
    """What `model-center report` tells of it."""
    validations: list[ValidationMetrics]
    """All of the run, those before it was resumed too."""


def pretrain(
    config: PretrainConfig,
    *,
    resume: Resume = "never",
    overwrite: bool = False,
    callbacks: Callbacks | None = None,
    recorders: Sequence[Recorder] = (),
) -> PretrainingResult:
    """Pre-train a model and write a run directory (see `model_center.recipe.run_directory`).

    Args:
        config: what to train, on what, how and where to.
        resume: "auto" goes on from the newest whole checkpoint of the output directory, or begins if there is none.
        overwrite: delete an earlier run in the output directory.
        callbacks: what is not done as by default.
        recorders: told every step and validation, beside those that write the run directory.

    Raises:
        ValueError, OSError: something that the configuration names is missing, broken or does not fit.
        ImportError: an option needs a package that is not installed.
        TrainingStoppedError: the watch over the loss stopped the run.
        RunInterrupted: a signal (SIGTERM or SIGINT) asked for the end; a checkpoint of the last step was saved. It is a
            KeyboardInterrupt.
    """
    job = prepare_pretraining(config, resume_run=resume == "auto", overwrite=overwrite, callbacks=callbacks)
    return train(job, recorders=recorders)


def run(config: PretrainConfig, console: Console, *, overwrite: bool, resume: Resume) -> int:
    """Run `model-center pretrain`."""
    with preparing(console, "Loading model and data"):
        job = prepare_pretraining(config, resume_run=resume == "auto", overwrite=overwrite)
    try:
        result = train(job, console=console)
    except (TrainingStoppedError, SampleError, IndexedDatasetError, OSError) as error:
        raise error_of_run(error, "go on with --resume auto") from error
    texts = texts_of(result.summary)
    lines = {name: text for name in SHOWN if (text := texts[name])}
    if result.validations:
        last = result.validations[-1]
        lines["validation"] = f"loss {last.loss:.4f}, perplexity {last.perplexity:.4g} after {last.step} steps"
    path = result.run.path
    print_lines(console, lines | {"plot": str(path / Entry.PLOT), "checkpoints": str(path / Entry.CHECKPOINTS)})
    engine.current_engine().shutdown()
    return OK


def train(
    job: PretrainingJob, *, console: Console | None = None, recorders: Sequence[Recorder] = ()
) -> PretrainingResult:
    """Train what `prepare_pretraining` put together, and write the run directory.

    Args:
        job: the model, the data and the configuration.
        console: where progress is shown; nowhere if not given.
        recorders: told every step and validation, in every process, beside those that write the run directory.

    Raises:
        TrainingStoppedError: the watch over the loss stopped the run.
        RunInterrupted: as `pretrain`.
    """
    config, callbacks = job.config, job.callbacks
    console = console or Console(quiet=True)
    console.print(job.announcement, highlight=False, soft_wrap=True)
    path = Path(config.output)
    with (
        open_run(
            path,
            config.to_yaml(),
            overwrite=job.overwrite,
            is_writer=engine.rank() == 0,
            resume=job.resume_from is not None,
        ) as run,
        job.data,
        open_store(config) as store,
        stop_signals() as asked,
        recording(*run_recorders(run, job, console), *recorders) as record,
    ):
        run.set_state("running", summary=job.summary)
        saving = Saving(job, store)
        while job.step < config.max_steps:
            done = job.step
            if job.watch.excludes(job.step + 1):
                leave_out_step(job)
            elif (metrics := train_step(job, store, console)) is not None:
                record(metrics)
                callbacks.after_step(job, metrics)
            elif job.step <= done:  # the run has gone back to a checkpoint
                continue
            is_last = job.step == config.max_steps
            if is_last or job.step % config.validation.every_steps == 0:
                validated = validate(
                    job.model, job.data, callbacks.summed_loss, step=job.step, batches=config.validation.batches
                )
                record(validated)
                job.validations.append(validated)
                callbacks.after_validation(job, validated)
            # Signals and clocks differ between processes; what one of them saw holds for all.
            seen = torch.tensor([asked.stop, saving.is_turn()], dtype=torch.int32)
            stops, is_turn = engine.distributed.all_reduce(seen, "max").tolist()
            if is_last or stops or is_turn:
                saving.save()
            if stops and not is_last:
                saving.finish()
                raise RunInterrupted(f"interrupted after step {job.step}, which was saved")
        saving.finish()
        summary = summarize(path, read_records(path))
        run.status["result"] = {name: getattr(summary, name) for name in RESULT}
    return PretrainingResult(run, summary, job.validations)


def train_step(job: PretrainingJob, store: CheckpointStore, console: Console) -> StepMetrics | None:
    """Do the next step, or what the watch over the loss says in place of its update. All processes must call it.

    Returns:
        What was measured; None if the run has gone back to a checkpoint, or if the step's samples have no target
        tokens: it is left out then.

    Raises:
        TrainingStoppedError: the watch stopped the run.
    """
    options, manager, scheduler = job.config.optimizer, job.manager, job.scheduler
    job.model.train()
    started = perf_counter()
    batches = job.data.step(job.step)
    if not batches.targets:
        # Of documents of one token, for example. A mean over nothing is no loss that the watch could judge.
        told = f"step {job.step + 1}: its samples have no target tokens, so it was left out"
        console.print(told, highlight=False, soft_wrap=True)
        leave_out_step(job)
        return None
    manager.zero_grad()
    total = accumulate_gradients(job.model, manager, batches.batches, batches.targets, job.callbacks.summed_loss)
    norm = manager.clip_grad_norm(job.optimizer.param_groups, max_norm=options.max_gradient_norm)
    loss, gradient_norm, learning_rate = total.item(), norm.item(), scheduler.current_lr
    verdict = job.watch.judge(job.step + 1, loss, gradient_norm)
    if verdict.action != "fine":
        report_anomaly(job, console, verdict, loss, gradient_norm, batches)
    if verdict.action == "rewind":
        rewind(job, store)
        return None
    if verdict.action == "skip":
        manager.zero_grad()
        scheduler.step()
    else:
        manager.step()
    job.step += 1
    return measure(job, batches, perf_counter() - started, loss, gradient_norm, learning_rate)


def leave_out_step(job: PretrainingJob) -> None:
    """Go on to the step after the next one; what the model has learned and the optimizer's states stay as they are."""
    job.scheduler.step()
    job.step += 1


def run_recorders(run: RunDirectory, job: PretrainingJob, console: Console) -> list[Recorder]:
    """Return what writes the metrics into the run directory and shows them; nothing in all processes but the first."""
    if engine.rank() != 0:
        return []
    config, resumed_after = job.config, None if job.resume_from is None else job.step
    recorders: list[Recorder] = [
        JsonLines(run.metrics, resumed_after=resumed_after),
        TensorBoard(run.tensorboard, resumed_after=resumed_after),
        Plot(run.metrics, run.plot, job.title),
        show_progress(console, config.max_steps, config.log_every),
    ]
    if config.wandb.mode != "disabled":
        name = config.wandb.name or run.path.name
        options = asdict(config)
        recorders.append(
            WeightsAndBiases(run.path, project=config.wandb.project, name=name, mode=config.wandb.mode, config=options)
        )
    return recorders


class Saving:
    """When it is a checkpoint's turn, and who is told that one is complete."""

    def __init__(self, job: PretrainingJob, store: CheckpointStore) -> None:
        self.job, self.store, self.options = job, store, job.config.checkpoints
        self.last = monotonic()
        self.pending: Path | None = None

    def is_turn(self) -> bool:
        """Whether enough steps or minutes have passed, by the clock of this process."""
        steps, minutes = self.options.every_steps, self.options.every_minutes
        passed = (monotonic() - self.last) / 60
        return (steps is not None and self.job.step % steps == 0) or (minutes is not None and passed >= minutes)

    def save(self) -> None:
        """Save the state after the last step. All processes must call it."""
        self.finish()
        job = self.job
        validated = job.validations[-1] if job.validations else None
        score = validated.loss if validated is not None and validated.step == job.step else None
        self.store.save(job.state, step=job.step, config=job.config.to_yaml(), score=score)
        self.pending = Path(job.config.output) / Entry.CHECKPOINTS / step_name(job.step)
        self.last = monotonic()

    def finish(self) -> None:
        """Wait until what is being written is complete, and tell. All processes must call it."""
        self.store.wait()
        if self.pending is not None:
            self.job.callbacks.after_checkpoint(self.job, self.pending)
            self.pending = None


@torch.no_grad()
def validate(
    model: BaseModel,
    data: PretrainingData,
    summed_loss: SummedLoss = cross_entropy,
    *,
    step: int,
    batches: int | None = None,
) -> ValidationMetrics:
    """Return the mean loss over all target tokens that are held out; NaN if there are none.

    All processes must call it.

    Args:
        model: the model; it is in evaluation mode afterwards.
        data: whose validation batches are used.
        summed_loss: loss of a micro-batch, summed over its target tokens.
        step: training steps done before.
        batches: stop after so many micro-batches of each process.
    """
    model.eval()
    current = engine.current_engine()
    total = torch.zeros(3, dtype=torch.float64)
    for number, batch in enumerate(data.validation()):
        if number == batches:
            break
        moved = batch.to(current.device)
        loss = summed_loss(model, moved).item()
        total += torch.tensor([loss, batch.targets, batch.tokens], dtype=torch.float64)
    loss, targets, tokens = engine.distributed.all_reduce(total, "sum").tolist()
    return ValidationMetrics(step=step, loss=loss / targets if targets else math.nan, tokens=int(tokens))


def rewind(job: PretrainingJob, store: CheckpointStore) -> None:
    """Go back to the newest checkpoint; the watch remembers the step whose batch is then left out."""
    newest = store.newest().path
    if newest is None:
        raise TrainingStoppedError(
            f"step {job.step + 1}: there is no checkpoint yet to rewind to, so the run was stopped; save earlier with "
            "checkpoints.every_steps, or set watch.non_finite and watch.spike to other actions than rewind"
        )
    restore(job, store, newest)
    job.watch.rewound(job.step)
    job.validations = [each for each in job.validations if each.step <= job.step]


def report_anomaly(
    job: PretrainingJob,
    console: Console,
    verdict: Verdict,
    loss: float,
    gradient_norm: float,
    batches: StepBatches,
) -> None:
    """Write what is known of the batch of the coming step, and say so.

    Raises:
        TrainingStoppedError: the run is to stop.
    """
    step, told = job.step + 1, ""
    if engine.rank() == 0:
        rows = [row.tolist() for batch in batches.batches for row in next(iter(batch.inputs.values()))]
        file = report_batch(
            Path(job.config.output),
            step,
            verdict,
            loss=loss,
            gradient_norm=gradient_norm,
            samples=job.data.samples_of(job.step)[0].tolist(),
            rows=rows,
            tokenizer=job.tokenizer,
        )
        told = f" (its batch: {file})"
    if verdict.action == "stop":
        raise TrainingStoppedError(
            f"step {step}: {verdict.reason}; the run was stopped{told}. Lower optimizer.learning_rate (now "
            f"{job.config.optimizer.learning_rate:g}) or lengthen its warm-up; --resume auto then goes on from the "
            "newest checkpoint, --overwrite begins again"
        )
    console.print(f"step {step}: {verdict.reason}: {verdict.action}{told}", highlight=False, soft_wrap=True)


def accumulate_gradients(
    model: BaseModel,
    manager: engine.optim.OptimManager,
    batches: Iterable[MicroBatch],
    targets: int,
    summed_loss: SummedLoss = cross_entropy,
) -> Tensor:
    """Add up the gradients of the mean loss over all target tokens of the global batch.

    The result does not depend on the number of processes, nor on how the samples are divided into micro-batches,
    packed or padded. All processes must call it, with the same number of micro-batches.

    Args:
        model: the model.
        manager: scales the loss for the engine and, where there is one, by the loss scale.
        batches: micro-batches of this process.
        targets: labels of the global batch that are not -100, over all processes; at least 1.
        summed_loss: loss of a micro-batch, summed over its target tokens.

    Returns:
        The mean loss of the global batch, a scalar on the engine's device; the host does not wait for it.
    """
    current = engine.current_engine()
    total = torch.zeros((), device=current.device)
    for batch in batches:
        summed = summed_loss(model, batch.to(current.device))
        # The manager lets processes average: of a mean over all targets, each has world_size times its share.
        manager.backward(summed * (current.world_size / targets))
        total += summed.detach()
    return engine.distributed.all_reduce(total, "sum") / targets
