"""Pre-training of any family on indexed data sets: the reference training loop, readable from top to bottom."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic, perf_counter
from types import FrameType
from typing import Any, Literal, Protocol, Self

import torch
from rich.console import Console
from torch import Tensor

from model_center import engine
from model_center.model.base import BaseModel

from .anomalies import LossWatch, report_batch
from .checkpoints import CheckpointStore, TrainingState
from .commands import OK, preparing, print_lines
from .metrics import JsonLines, Recorder, StepMetrics, TensorBoard, ValidationMetrics, recording
from .optimization import loss_scale_for, make_optimizer, make_scheduler
from .plot import Plot
from .pretrain_configuration import PretrainConfig
from .pretraining_data import PretrainingData, StepBatches
from .pretraining_job import PretrainingJob, prepare_pretraining
from .progress import show_progress
from .run_directory import RunDirectory, open_run

Resume = Literal["never", "auto"]
GIB = 2**30


@dataclass(frozen=True)
class PretrainingResult:
    """What a pre-training run came to."""

    run: RunDirectory
    validations: list[ValidationMetrics] = field(default_factory=list)
    """Those of this process; a resumed run has those after its checkpoint."""

    @property
    def last(self) -> ValidationMetrics:
        """The last validation."""
        return self.validations[-1]


def pretrain(
    config: PretrainConfig, *, resume: Resume = "never", overwrite: bool = False, recorders: Sequence[Recorder] = ()
) -> PretrainingResult:
    """Pre-train a model and write a run directory (see `model_center.recipe.run_directory`).

    Args:
        config: what to train, on what, how and where to.
        resume: "auto" goes on from the newest whole checkpoint of the output directory, or begins if there is none.
        overwrite: delete an earlier run in the output directory.
        recorders: told every step and validation, beside those that write the run directory.

    Raises:
        ValueError, OSError: something that the configuration names is missing, broken or does not fit.
        KeyboardInterrupt: a signal (SIGTERM or SIGINT) asked for the end; a checkpoint of the last step was saved.
    """
    job = prepare_pretraining(config, resume=resume == "auto", overwrite=overwrite)
    return train(job, recorders=recorders)


def run(config: PretrainConfig, console: Console, *, overwrite: bool, resume: Resume) -> int:
    """Run `model-center pretrain`."""
    with preparing(console, "Loading model and data"):
        job = prepare_pretraining(config, resume=resume == "auto", overwrite=overwrite)
    result = train(job, console=console)
    last = result.last
    lines = {
        "validation": f"loss {last.loss:.4f}, perplexity {last.perplexity:.4g} after {last.step} steps",
        "plot": result.run.plot,
        "checkpoints": result.run.path / "checkpoints",
    }
    print_lines(console, lines)
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
        RuntimeError: the watch over the loss stopped the run.
        KeyboardInterrupt: as `pretrain`.
    """
    config, model, data = job.config, job.model, job.data
    console = console or Console(quiet=True)
    console.print(str(job), highlight=False, soft_wrap=True)
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, config.max_steps)
    manager = engine.optim.OptimManager(loss_scale=loss_scale_for(model))
    manager.add_optimizer(optimizer, scheduler)
    watch = LossWatch(config.watch, scales_loss=manager.loss_scale_enabled)
    state = TrainingState(model, job.tokenizer, manager)
    is_first, path = engine.rank() == 0, Path(config.output)
    options = config.checkpoints
    opened = open_run(
        path, config.to_yaml(), overwrite=job.overwrite, is_writer=is_first, resume=job.resume_from is not None
    )
    with (
        opened as run,
        data,
        CheckpointStore(
            path / "checkpoints",
            keep_last=options.keep_last,
            keep_best=options.keep_best,
            asynchronous=options.asynchronous,
        ) as store,
        stop_signals() as asked,
    ):
        step = 0
        for damage in job.found.damaged:
            console.print(f"passed over a damaged checkpoint: {damage}", highlight=False, soft_wrap=True)
        if job.resume_from is not None:
            step = _restore(store, job.resume_from, state, watch, data)
            console.print(f"resumed after step {step} from {job.resume_from}", highlight=False, soft_wrap=True)
        result = PretrainingResult(run)
        run.status["summary"] = job.summary
        writers = run_recorders(run, job, console, step) if is_first else []
        validated: ValidationMetrics | None = None
        saved_at = monotonic()
        with recording(*writers, *recorders) as record:
            while step < config.max_steps:
                if watch.excludes(step + 1):
                    scheduler.step()
                    step += 1
                    continue
                model.train()
                started = perf_counter()
                batches = data.step(step)
                manager.zero_grad()
                loss = accumulate_gradients(model, manager, batches.batches, batches.targets).item()
                norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=config.optimizer.max_gradient_norm)
                gradient_norm, learning_rate = norm.item(), scheduler.current_lr
                verdict = watch.judge(step + 1, loss, gradient_norm)
                if verdict.action != "fine":
                    _report(job, console, verdict, step + 1, loss, gradient_norm, batches)
                if verdict.action == "stop":
                    raise RuntimeError(f"step {step + 1}: {verdict.reason}; the run was stopped (watch)")
                if verdict.action == "rewind":
                    step = _rewind(store, state, watch, step + 1)
                    continue
                if verdict.action == "skip":
                    manager.zero_grad()
                    scheduler.step()
                else:
                    manager.step()
                step += 1
                seconds = perf_counter() - started
                tokens = _sum_over_processes(sum(batch.tokens for batch in batches.batches))
                record(
                    StepMetrics(
                        step=step,
                        epoch=step * config.batch.global_size / data.total,
                        loss=loss,
                        learning_rate=learning_rate,
                        gradient_norm=gradient_norm,
                        seconds=seconds,
                        samples_per_second=config.batch.global_size / seconds,
                        tokens=tokens,
                        tokens_per_second=tokens / seconds,
                        memory_gib=_peak_memory(),
                        loss_scale=manager.loss_scale if manager.loss_scale_enabled else None,
                    )
                )
                is_last = step == config.max_steps
                if is_last or step % config.validation.every_steps == 0:
                    validated = validate(model, data, step=step, batches=config.validation.batches)
                    record(validated)
                    result.validations.append(validated)
                minutes = (monotonic() - saved_at) / 60
                is_time = options.every_minutes is not None and minutes >= options.every_minutes
                is_turn = options.every_steps is not None and step % options.every_steps == 0
                # Signals and clocks differ between processes; what one of them saw holds for all.
                stops, is_time = _any_process(asked.stop, is_time)
                if is_last or stops or is_turn or is_time:
                    state.progress = {"step": step, "corpus": data.fingerprint, "watch": watch.state_dict()}
                    score = validated.loss if validated is not None and validated.step == step else None
                    store.save(state, step=step, config=config.to_yaml(), score=score)
                    saved_at = monotonic()
                if stops and not is_last:
                    store.wait()
                    raise KeyboardInterrupt(
                        f"interrupted after step {step}, which was saved; --resume auto goes on from there"
                    )
        run.status["result"] = {"validation": asdict(validated)} if validated else {}
    return result


def run_recorders(run: RunDirectory, job: PretrainingJob, console: Console, step: int) -> list[Recorder]:
    """Return what writes the metrics into the run directory and shows them, after `step` steps done before."""
    resumed_after = None if job.resume_from is None else step
    return [
        JsonLines(run.metrics, resumed_after=resumed_after),
        TensorBoard(run.tensorboard, resumed_after=resumed_after),
        Plot(run.metrics, run.plot, job.title),
        show_progress(console, job.config.max_steps, job.config.log_every),
    ]


@torch.no_grad()
def validate(model: BaseModel, data: PretrainingData, *, step: int, batches: int | None = None) -> ValidationMetrics:
    """Return the mean loss over all target tokens that are held out. All processes must call it.

    Args:
        model: the model; it is in evaluation mode afterwards.
        data: whose validation batches are used.
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
        hidden_states = model(**moved.inputs).last_hidden_state
        loss = model.summed_loss(hidden_states, moved.labels).item()
        total += torch.tensor([loss, int((batch.labels != -100).sum()), batch.tokens], dtype=torch.float64)
    loss, targets, tokens = engine.distributed.all_reduce(total, "sum").tolist()
    return ValidationMetrics(step=step, loss=loss / max(1, targets), tokens=int(tokens))


class StopSignals:
    """Whether a signal has asked the run to end after its step."""

    stop = False

    def __call__(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature of handlers
        """Take note of a signal; the second one ends the process at once."""
        self.stop = True
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Let SIGTERM and SIGINT ask for the end of the run instead of ending the process."""
    asked = StopSignals()
    previous = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _restore(store: CheckpointStore, path: Path, state: TrainingState, watch: LossWatch, data: PretrainingData) -> int:
    progress = store.load(path, state)
    if progress["corpus"] != data.fingerprint:
        raise ValueError(
            f"the checkpoint {path} was trained on other data, another objective or another seed than this "
            "configuration names, so its samples cannot be gone on with; give it as model.name to begin a new run"
        )
    watch.load_state_dict(progress["watch"])
    return int(progress["step"])


def _rewind(store: CheckpointStore, state: TrainingState, watch: LossWatch, step: int) -> int:
    """Go back to the newest checkpoint; the watch remembers the step whose batch is then left out."""
    newest = store.newest().path
    if newest is None:
        raise RuntimeError(f"step {step}: there is no checkpoint yet to rewind to; the run was stopped (watch)")
    done = int(store.load(newest, state)["step"])
    watch.rewound(done)
    return done


def _report(
    job: PretrainingJob,
    console: Console,
    verdict: Any,
    step: int,
    loss: float,
    gradient_norm: float,
    batches: StepBatches,
) -> None:
    if engine.rank() != 0:
        return
    rows = [row.tolist() for batch in batches.batches for row in batch.inputs["input_ids"]]
    file = report_batch(
        Path(job.config.output),
        step,
        verdict,
        loss=loss,
        gradient_norm=gradient_norm,
        samples=batches.samples,
        micro_losses=[],
        rows=rows,
        tokenizer=job.tokenizer,
    )
    console.print(f"step {step}: {verdict.reason}: {verdict.action} (see {file})", highlight=False, soft_wrap=True)


def _sum_over_processes(number: int) -> int:
    return int(engine.distributed.all_reduce(torch.tensor(number), "sum"))


def _any_process(*flags: bool) -> list[bool]:
    """Whether each flag is set on any process."""
    return engine.distributed.all_reduce(torch.tensor(flags, dtype=torch.int32), "max").bool().tolist()


def _peak_memory() -> float | None:
    device = engine.current_engine().device
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


class MicroBatch(Protocol):
    """What one process computes at once."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""

    @property
    def labels(self) -> Tensor:
        """Ids to predict, (rows, length); -100 where there is nothing to predict."""

    def to(self, device: torch.device) -> Self:
        """Return it on a device."""


def accumulate_gradients(
    model: BaseModel, manager: engine.optim.OptimManager, batches: Iterable[MicroBatch], targets: int
) -> Tensor:
    """Add up the gradients of the mean loss over all target tokens of the global batch.

    The result does not depend on the number of processes, nor on how the samples are divided into micro-batches,
    packed or padded. All processes must call it, with the same number of micro-batches.

    Args:
        model: the model.
        manager: scales the loss for the engine and, where there is one, by the loss scale.
        batches: micro-batches of this process.
        targets: labels of the global batch that are not -100, over all processes.

    Returns:
        The mean loss of the global batch, a scalar on the engine's device; the host does not wait for it.
    """
    current = engine.current_engine()
    total = torch.zeros((), device=current.device)
    for batch in batches:
        batch = batch.to(current.device)
        output = model(**batch.inputs, return_logits=False)
        summed = model.summed_loss(output.last_hidden_state, batch.labels)
        # The manager lets processes average: of a mean over all targets, each has world_size times its share.
        manager.backward(summed * (current.world_size / targets))
        total += summed.detach()
    return engine.distributed.all_reduce(total, "sum") / targets
