"""What a pre-training run is made of: text, tokenizer, data, model and optimizer, all checked before training."""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model_center import engine
from model_center.engine.lr_scheduler import WarmupLRScheduler
from model_center.engine.optim import AdamOptimizer, OptimManager
from model_center.model.base import BaseModel
from model_center.model.checkpoint import Checkpoint
from model_center.model.config import Config
from model_center.model.source import LocalDirectory
from model_center.tokenizer import load_tokenizer

from .agreement import together
from .anomalies import LossWatch
from .callbacks import Callbacks
from .checkpoints import Found, TrainingState
from .memory_prediction import GIB, Planner
from .metrics import ValidationMetrics
from .optimization import loss_scale_for
from .planning import configured_model, micro_batch, setting_of
from .pretrain_configuration import PretrainConfig, PretrainModelOptions
from .pretraining_data import PretrainingData
from .pretraining_objectives import PretrainingObjective
from .pretraining_resume import check_space, find_start, resume
from .pretraining_text import prepare_datasets, prepare_tokenizer, text_files
from .progress import count
from .wandb_recorder import check_login, import_wandb


@dataclass
class PretrainingJob:
    """A pre-training run whose input has been read and checked; its output directory has not been touched yet."""

    config: PretrainConfig
    callbacks: Callbacks
    overwrite: bool
    """Whether what is in the output directory is deleted."""
    found: Found
    """The checkpoint to go on from, if there is one and this was asked for, and the damaged ones that were passed
    over."""
    model: BaseModel
    tokenizer: Any
    data: PretrainingData
    optimizer: AdamOptimizer
    scheduler: WarmupLRScheduler
    manager: OptimManager
    watch: LossWatch
    step: int = 0
    """Steps done."""
    validations: list[ValidationMetrics] = field(default_factory=list)
    """All of the run, those before it was resumed too."""
    predicted_memory_gib: float | None = None
    """What tensors will take of a GPU at most; None on a CPU, for which there is no prediction."""
    warning: str | None = None
    """What should be known before the run begins."""
    begins_again: bool = False
    """Whether going on was asked for, with a run that had no whole checkpoint yet."""

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from; None begins."""
        return self.found.path

    @property
    def state(self) -> TrainingState:
        """What a checkpoint holds."""
        progress = {"step": self.step, "corpus": self.data.fingerprint, "watch": self.watch.state_dict()}
        return TrainingState(self.model, self.tokenizer, self.manager, progress)

    @property
    def summary(self) -> dict[str, Any]:
        """What `model-center report` says of the run."""
        return {
            "model": type(self.model).__name__,
            "parameters": sum(engine.current_engine().whole_shape(each).numel() for each in self.model.parameters()),
            "data": self.config.data.corpus,
            "predicted_memory_gib": self.predicted_memory_gib,
        }

    @property
    def title(self) -> str:
        """Model and data in a few words, for headings."""
        summary = self.summary
        return f"{summary['model']} with {count(summary['parameters'])} parameters on {summary['data']}"

    @property
    def announcement(self) -> str:
        """What the run will do, a line each."""
        parameter, processes = next(self.model.parameters()), engine.world_size()
        dtype = str(parameter.dtype).removeprefix("torch.")
        lines = [
            f"{self.title}: {self.data.total} training samples",
            f"{self.config.max_steps} steps of {self.config.batch.global_size} samples, {dtype} on {parameter.device}, "
            + (f"{processes} processes" if processes > 1 else "1 process"),
        ]
        lines += [f"passed over a damaged checkpoint: {damage}" for damage in self.found.damaged]
        if self.resume_from is not None:
            lines.append(f"resumed after step {self.step} from {self.resume_from}")
        if self.begins_again:
            lines.append(
                f"the run in {self.config.output} ended before its first checkpoint was whole: it begins again"
            )
        if self.step == self.config.max_steps:
            lines.append("these are all steps of the run; it goes on with a larger max_steps")
        if self.warning is not None:
            lines.append(f"warning: {self.warning}")
        return "\n".join(lines)


def prepare_pretraining(
    config: PretrainConfig, *, resume_run: bool = False, overwrite: bool = False, callbacks: Callbacks | None = None
) -> PretrainingJob:
    """Read and check everything that a run needs; raw text becomes data sets on the way.

    Starts the engine, which seeds the random generators of PyTorch, NumPy and Python.

    Args:
        config: what to train, on what, how and where to.
        resume_run: go on from the newest whole checkpoint of the output directory, if there is one.
        overwrite: delete an earlier run in the output directory.
        callbacks: what is not done as by default.

    Raises:
        ValueError, OSError: something that the configuration names is missing, broken or does not fit.
        ImportError: an option needs a package that is not installed.
    """
    if resume_run and overwrite:
        raise ValueError("resume and overwrite: one goes on with the run that the other deletes; give one of them")
    config, callbacks = config.resolved(), callbacks or Callbacks()
    if config.wandb.mode != "disabled":
        import_wandb()
    engine.init_distributed(seed=config.seed, **config.engine.settings)
    if config.wandb.mode == "online":
        together(lambda: check_login() if engine.rank() == 0 else None)
    found, overwrite = find_start(config, resume=resume_run, overwrite=overwrite)
    family, model_config = configured_model(config.model)
    tokenizer, objective = _prepare_text(config, model_config, callbacks)
    data = _open_data(config, tokenizer, objective)
    dtype = engine.HALF if config.model.precision == "half" else model_config.dtype
    model = _make_model(family, replace(model_config, dtype=dtype), config.model)
    # All processes have made the same weights by now; their dropout should differ.
    torch.manual_seed(config.seed + engine.rank())
    optimizer = callbacks.make_optimizer(model, config.optimizer)
    scheduler = callbacks.make_scheduler(optimizer, config.optimizer, config.max_steps)
    manager = OptimManager(loss_scale=loss_scale_for(model))
    manager.add_optimizer(optimizer, scheduler)
    watch = LossWatch(config.watch, scales_loss=manager.loss_scale_enabled)
    job = PretrainingJob(
        config, callbacks, overwrite, found, model, tokenizer, data, optimizer, scheduler, manager, watch
    )
    job.begins_again = resume_run and overwrite
    job.warning = together(lambda: check_space(job) if engine.rank() == 0 else None)
    if engine.current_engine().device.type == "cuda" and engine.rank() == 0:
        job.predicted_memory_gib = predicted_peak(config, family, model_config, objective)
    if found.path is not None:  # last, as it restores the random generators
        resume(job, found.path)
    # The first process writes the output directory as soon as it trains, so all must have seen it before.
    engine.synchronize()
    return job


def predicted_peak(
    config: PretrainConfig, family: type[BaseModel], model_config: Config, objective: PretrainingObjective
) -> float:
    """Return what `model-center plan` says that tensors take at most of each GPU under the current engine, in GiB."""
    current = engine.current_engine()
    setting = setting_of(config, current.world_size, current.name)
    batch = micro_batch(objective, config.batch.micro_size)
    return Planner(family, model_config).predict(setting, batch).peak / GIB


def _prepare_text(
    config: PretrainConfig, model_config: Config, callbacks: Callbacks
) -> tuple[Any, PretrainingObjective]:
    """The tokenizer and the objective; the first process makes what does not exist yet, the others come after it."""
    options, folder, is_first = config.data, Path(config.data.path), engine.rank() == 0
    files = [] if options.text is None else together(partial(text_files, options.text))
    make_tokenizer = partial(prepare_tokenizer, options.tokenizer, files, folder, model_config.model_type)
    together(lambda: make_tokenizer() if is_first else None)
    name = together(make_tokenizer)

    def load() -> tuple[Any, PretrainingObjective]:
        tokenizer = load_tokenizer(name)
        return tokenizer, callbacks.make_objective(model_config, tokenizer, options.objective_options)

    tokenizer, objective = together(load)
    make_datasets = partial(
        prepare_datasets, files, folder, options.name, name, max_length=objective.room, workers=os.cpu_count() or 1
    )
    together(lambda: make_datasets() if files and is_first else None)
    return tokenizer, objective


def _open_data(config: PretrainConfig, tokenizer: Any, objective: PretrainingObjective) -> PretrainingData:
    options = config.data
    return together(
        lambda: PretrainingData(
            options.path,
            options.name,
            objective,
            global_size=config.batch.global_size,
            micro_size=config.batch.micro_size,
            tokenizer=tokenizer,
            seed=config.seed,
            pack=options.pack,
            full_rows=options.full_rows,
            fixed_shape=options.fixed_shape,
            validation_name=options.validation_name,
            validation_share=0.0 if options.validation_name else options.validation_share,
            rank=engine.rank(),
            world_size=engine.world_size(),
        )
    )


def _make_model(family: type[BaseModel], model_config: Any, options: PretrainModelOptions) -> BaseModel:
    """A fresh model, or a loaded one where a directory holds weights and nothing else was asked for.

    Raises:
        ValueError: weights are wanted, but there are none.
    """
    path = Path(options.name)
    if path.is_dir() and options.from_scratch is not True:
        try:
            Checkpoint(LocalDirectory(path))
        except FileNotFoundError as error:
            if options.from_scratch is False:
                raise ValueError(f"model.from_scratch is false, but {error}") from error
        else:
            return family.from_pretrained(path, model_config)
    elif options.from_scratch is False:
        raise ValueError(f"model.from_scratch is false, but model.name {options.name!r} is no directory with weights")
    return family(model_config)
