"""Fine-tuning of any family on a task: the reference training loop, readable from top to bottom."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from model_center import engine
from model_center.dataset import DistributedDataLoader
from model_center.dataset.tasks import load_task
from model_center.dataset.tasks.dataset import TaskDataset
from model_center.model import BaseModel, EncoderLM
from model_center.tokenizer import load_tokenizer

from .classifier import EncoderClassifier, HeadConfig
from .commands import OK, error_of_run, preparing, print_lines, say_interrupted
from .configuration import require
from .evaluation import evaluate, make_loader
from .finetune_configuration import FinetuneConfig
from .metrics import EvaluationMetrics, JsonLines, Recorder, StepMetrics, TensorBoard, recording
from .optimization import loss_scale_for, make_optimizer, make_scheduler, warmup_of
from .plot import Plot
from .progress import show_progress
from .prompting import PromptHead, label_words, prompt_model
from .run_directory import RunDirectory, check_output, open_run
from .task_input import answer_length, read_split
from .task_model import TaskModel, load_backbone

PRECISIONS = {"half": engine.HALF, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """A run whose input has all been read and checked; nothing has been written yet."""

    config: FinetuneConfig
    overwrite: bool
    model: TaskModel
    tokenizer: Any
    train_loader: DistributedDataLoader
    dev_loader: DistributedDataLoader

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        steps = self.config.epochs * len(self.train_loader)
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    @property
    def title(self) -> str:
        """Model and task in a few words, for headings."""
        backbone, current = self.model.backbone, engine.current_engine()
        parameters = sum(current.whole_shape(parameter).numel() for parameter in backbone.parameters())
        model = f"{type(backbone).__name__} with {parameters / 1e6:.1f} million parameters"
        return f"{model} on {self.train_loader.dataset.task.name}"

    def __str__(self) -> str:
        """Return what the run will do, in two lines."""
        parameter = next(self.model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        return (
            f"{self.title}: {len(self.train_loader.dataset)} training and {len(self.dev_loader.dataset)} dev samples, "
            f"{self.model.answers_in}\n"
            f"{self.total_steps} steps of {self.config.data.batch_size} samples, {dtype} on {parameter.device}"
        )


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run: RunDirectory
    evaluations: list[EvaluationMetrics] = field(default_factory=list)

    @property
    def last(self) -> EvaluationMetrics:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def best(self) -> EvaluationMetrics:
        """The first evaluation with the highest score."""
        return max(self.evaluations, key=lambda evaluation: evaluation.score)


def run(config: FinetuneConfig, console: Console, *, overwrite: bool) -> int:
    """Fine-tune as `model-center finetune` does, and print what came out.

    Returns:
        The exit code.
    """
    with preparing(console, "Loading model and data"):
        job = prepare(config, overwrite=overwrite)
    try:
        result = train(job, console=console)
    except KeyboardInterrupt:
        return say_interrupted(f"interrupted; {job.config.output} holds the metrics and checkpoints so far")
    except OSError as error:
        raise error_of_run(error, "begin again with --overwrite") from error
    best, run = result.best, result.run
    baseline = f"always the commonest answer: {best.baseline:.1%}"
    lines = {
        f"dev {best.measure.replace('_', ' ')}": f"{best.score:.1%} after epoch {best.epoch:.3g} ({baseline})",
        "plot": run.plot,
        "checkpoint": run.checkpoint("best"),
    }
    print_lines(console, lines)
    engine.current_engine().shutdown()
    return OK


def finetune(config: FinetuneConfig, *, overwrite: bool = False, recorders: Sequence[Recorder] = ()) -> Result:
    """Fine-tune a model and write a run directory (see `model_center.recipe.run_directory`).

    Args:
        config: what to train, on what, how and where to.
        overwrite: delete an earlier run in the output directory.
        recorders: told every step and evaluation, beside those that write the run directory.

    Raises:
        ValueError, OSError: something that the configuration names is missing, broken or does not fit. Nothing has
            been written then.
        OSError: the run directory cannot be written to the end, e.g. because the disk is full.
    """
    return train(prepare(config, overwrite=overwrite), recorders=recorders)


def prepare(config: FinetuneConfig, *, overwrite: bool = False) -> Job:
    """Read and check everything that a run needs, without writing anything.

    Starts the engine, which seeds the random generators of PyTorch, NumPy and Python.

    Raises:
        ValueError, OSError: as `finetune`.
    """
    config = config.resolved()
    check_output(Path(config.output), overwrite=overwrite)
    task = load_task(config.data.task)
    max_answer_length = answer_length(task, config.data.max_answer_length)
    engine.init_distributed(seed=config.seed, **config.engine.settings)
    dtype = PRECISIONS[config.model.precision]
    backbone = load_backbone(config.model.name, dtype=dtype, family=config.model.family)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.name)
    check_fit(backbone, tokenizer, config)
    train_set, dev_set = (
        read_split(
            config.data.path,
            split,
            task,
            tokenizer,
            config.data.max_length,
            family=backbone.config.model_type,
            max_answer_length=max_answer_length,
        )
        for split in ("train", "dev")
    )
    model = make_task_model(backbone, tokenizer, train_set, config)
    # All processes have made the same weights by now; their dropout should differ.
    torch.manual_seed(config.seed + engine.rank())
    # The first process writes the output directory as soon as it trains, so all must have seen it before.
    engine.synchronize()
    job = Job(
        config=config,
        overwrite=overwrite,
        model=model,
        tokenizer=tokenizer,
        train_loader=make_loader(
            train_set,
            config.data.batch_size,
            shuffle=True,
            seed=config.seed,
            bucket_by_length=config.data.bucket_by_length,
        ),
        dev_loader=make_loader(dev_set, config.data.eval_batch_size),
    )
    warmup_of(config.optimizer, job.total_steps)  # raises if it does not fit
    return job


def train(job: Job, *, console: Console | None = None, recorders: Sequence[Recorder] = ()) -> Result:
    """Train what `prepare` put together, evaluate after every epoch, and write the run directory.

    Args:
        job: the model, the data and the configuration.
        console: where progress is shown; nowhere if not given.
        recorders: told every step and evaluation, in every process, beside those that write the run directory.
    """
    config, model, total_steps = job.config, job.model, job.total_steps
    console = console or Console(quiet=True)
    console.print(str(job), highlight=False, soft_wrap=True)
    optimizer = make_optimizer(model, config.optimizer)
    scheduler = make_scheduler(optimizer, config.optimizer, total_steps)
    manager = engine.optim.OptimManager(loss_scale=loss_scale_for(model))
    manager.add_optimizer(optimizer, scheduler)
    step, world_size = 0, engine.world_size()
    is_first = engine.rank() == 0
    with open_run(Path(config.output), config.to_yaml(), overwrite=job.overwrite, is_writer=is_first) as run:
        result = Result(run)
        writers = run_recorders(run, job, console) if is_first else []
        with recording(*writers, *recorders) as record:
            while step < total_steps:
                model.train()
                started = perf_counter()
                for batch in job.train_loader:
                    manager.zero_grad()
                    loss = model.loss(batch)
                    targets = engine.distributed.all_reduce(torch.tensor(loss.targets), "sum").item()
                    # Processes are averaged: of a mean over all targets, each has world_size times its share.
                    manager.backward(loss.summed * (world_size / targets))
                    max_norm = config.optimizer.max_gradient_norm
                    gradient_norm = manager.clip_grad_norm(optimizer.param_groups, max_norm=max_norm)
                    learning_rate = scheduler.current_lr
                    manager.step()
                    step += 1
                    mean_loss = engine.distributed.all_reduce(loss.summed.detach(), "sum").item() / targets
                    seconds = perf_counter() - started
                    measured = StepMetrics(
                        step=step,
                        epoch=step / len(job.train_loader),
                        loss=mean_loss,
                        learning_rate=learning_rate,
                        gradient_norm=gradient_norm.item(),
                        seconds=seconds,
                        samples_per_second=len(job.train_loader.batch_indices) * world_size / seconds,
                    )
                    record(measured)
                    started = perf_counter()
                    if step == total_steps:
                        break
                # Before the evaluation, so that whatever ends that one leaves what was learned.
                with run.new_last_checkpoint() as directory:
                    model.save(job.tokenizer, directory)
                evaluation = evaluate(model, job.dev_loader, step=step, epoch=step / len(job.train_loader))
                record(evaluation)
                result.evaluations.append(evaluation)
                if result.best is evaluation:
                    run.keep_last_as_best()
        run.status["result"] = {"best": asdict(result.best), "last": asdict(result.last)}
    return result


def run_recorders(run: RunDirectory, job: Job, console: Console) -> list[Recorder]:
    """Return what writes the metrics into the run directory and shows them on the console."""
    return [
        JsonLines(run.metrics),
        TensorBoard(run.tensorboard),
        Plot(run.metrics, run.plot, job.title),
        show_progress(console, job.total_steps, job.config.log_every),
    ]


def make_task_model(backbone: BaseModel, tokenizer: Any, dataset: TaskDataset, config: FinetuneConfig) -> TaskModel:
    """Let a model answer a task: an encoder with a classifier, the others in words.

    Args:
        backbone: the model.
        tokenizer: its tokenizer.
        dataset: what it reads of the task.
        config: what is configured.

    Raises:
        ValueError: the model cannot answer so, or an option is not one of its family's.
    """
    task, options = dataset.task, config.model
    names: dict[str, Any] = {"task": config.data.task, "max_length": config.data.max_length}
    if isinstance(backbone, EncoderLM):
        head = HeadConfig(
            **names,
            num_classes=len(task.labels),
            num_choices=len(task.inputs),
            pooling=options.pooling or "mean",
            dropout=0.1 if options.dropout is None else options.dropout,
        )
        return EncoderClassifier(backbone, head)
    for option in ("pooling", "dropout"):
        if (value := getattr(options, option)) is not None:
            raise ValueError(
                f"model.{option} is for the classifier of an encoder, and {type(backbone).__name__} is none; "
                f"leave it out instead of {value!r}"
            )
    length = answer_length(task, config.data.max_answer_length)
    return prompt_model(backbone, tokenizer, PromptHead(**names, words=label_words(dataset), max_answer_length=length))


def check_fit(backbone: BaseModel, tokenizer: Any, config: FinetuneConfig) -> None:
    """Check that the model's vocabulary and positions suffice for the data.

    Raises:
        ValueError: they do not.
    """
    size, longest = getattr(backbone.config, "position_size", None), config.data.max_length
    require(size is None or longest <= size, "data.max_length", f"at most the model's position_size {size}", longest)
    tokens = 1 + max(tokenizer.get_vocab().values())
    if tokens > backbone.config.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name!r} has {tokens} tokens, but model {config.model.name!r} has a "
            f"vocabulary of only {backbone.config.vocab_size}; give the model's own tokenizer as model.tokenizer"
        )
