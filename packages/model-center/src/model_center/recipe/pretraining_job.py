"""What a pre-training run is made of: text, tokenizer, data and model, all read and checked before training."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model_center import engine
from model_center.model.base import BaseModel
from model_center.model.checkpoint import Checkpoint
from model_center.model.source import LocalDirectory
from model_center.tokenizer import load_tokenizer

from .agreement import together
from .checkpoints import Found, find_newest
from .finetuning import PRECISIONS
from .planning import configured_model
from .pretrain_configuration import PretrainConfig, PretrainModelOptions
from .pretraining_data import PretrainingData
from .pretraining_objectives import PretrainingObjective, make_objective
from .pretraining_text import prepare_datasets, prepare_tokenizer, text_files
from .run_directory import check_output, check_resumable


@dataclass(frozen=True)
class PretrainingJob:
    """A pre-training run whose input has been read and checked; its output directory has not been touched yet."""

    config: PretrainConfig
    overwrite: bool
    found: Found
    """The checkpoint to go on from, if there is one and this was asked for, and the damaged ones that were passed
    over."""
    model: BaseModel
    tokenizer: Any
    data: PretrainingData

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from; None begins."""
        return self.found.path

    @property
    def summary(self) -> dict[str, Any]:
        """What `model-center report` says of the run."""
        return {
            "model": type(self.model).__name__,
            "parameters": sum(engine.current_engine().whole_shape(each).numel() for each in self.model.parameters()),
            "data": self.config.data.name,
        }

    @property
    def title(self) -> str:
        """Model and data in a few words, for headings."""
        summary = self.summary
        return f"{summary['model']} with {summary['parameters'] / 1e6:.1f} million parameters on {summary['data']}"

    def __str__(self) -> str:
        """Return what the run will do, in two lines."""
        parameter = next(self.model.parameters())
        return (
            f"{self.title}: {self.data.total} training samples\n"
            f"{self.config.max_steps} steps of {self.config.batch.global_size} samples, "
            f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}, "
            f"{engine.world_size()} process{'es' * (engine.world_size() > 1)}"
        )


def prepare_pretraining(config: PretrainConfig, *, resume: bool = False, overwrite: bool = False) -> PretrainingJob:
    """Read and check everything that a run needs; raw text becomes data sets on the way.

    Starts the engine, which seeds the random generators of PyTorch, NumPy and Python.

    Raises:
        ValueError, OSError: something that the configuration names is missing, broken or does not fit.
    """
    config = config.resolved()
    output = Path(config.output)
    found = _newest_checkpoint(output) if resume else Found(None)
    if found.path is None:
        check_output(output, overwrite=overwrite)
    else:
        check_resumable(output)
    options = config.engine
    engine.init_distributed(
        seed=config.seed, engine=options.name, use_checkpoint=options.use_checkpoint, zero_level=options.zero_level
    )
    family, model_config = configured_model(config.model)
    tokenizer, objective = _prepare_text(config, model_config)
    data_options = config.data
    data = together(
        lambda: PretrainingData(
            data_options.path,
            data_options.name,
            objective,
            global_size=config.batch.global_size,
            micro_size=config.batch.micro_size,
            tokenizer=tokenizer,
            seed=config.seed,
            pack=data_options.pack,
            full_rows=data_options.full_rows,
            fixed_shape=data_options.fixed_shape,
            validation_name=data_options.validation_name,
            validation_share=0.0 if data_options.validation_name else data_options.validation_share,
            rank=engine.rank(),
            world_size=engine.world_size(),
        )
    )
    model = _make_model(family, replace(model_config, dtype=PRECISIONS[config.model.precision]), config.model)
    # All processes have made the same weights by now; their dropout should differ.
    torch.manual_seed(config.seed + engine.rank())
    # The first process writes the output directory as soon as it trains, so all must have seen it before.
    engine.synchronize()
    return PretrainingJob(config, overwrite, found, model, tokenizer, data)


def _newest_checkpoint(output: Path) -> Found:
    """The newest whole checkpoint of a run.

    Raises:
        ValueError: there are damaged ones only; the message names them.
    """
    if not (output / "checkpoints").is_dir():
        return Found(None)
    found = find_newest(output / "checkpoints", verify=True)
    if found.path is None and found.damaged:
        raise ValueError("\n".join([f"no checkpoint of {output} is whole:", *map(str, found.damaged)]))
    return found


def _prepare_text(config: PretrainConfig, model_config: Any) -> tuple[Any, PretrainingObjective]:
    """The tokenizer and the objective; the first process makes what does not exist yet, the others come after it."""
    options, folder, is_first = config.data, Path(config.data.path), engine.rank() == 0
    files = [] if options.text is None else together(partial(text_files, options.text))
    make_tokenizer = partial(prepare_tokenizer, options.tokenizer, files, folder, model_config.model_type)
    together(lambda: make_tokenizer() if is_first else None)
    name = together(make_tokenizer)

    def load() -> tuple[Any, PretrainingObjective]:
        tokenizer = load_tokenizer(name)
        return tokenizer, make_objective(model_config, tokenizer, options.objective_options)

    tokenizer, objective = together(load)
    make_datasets = partial(
        prepare_datasets, files, folder, options.name, name, max_length=objective.room, workers=os.cpu_count() or 1
    )
    together(lambda: make_datasets() if files and is_first else None)
    return tokenizer, objective


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
