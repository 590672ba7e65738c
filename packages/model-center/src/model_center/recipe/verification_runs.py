"""What a model computes on a sample, here and in Transformers: hidden states, logits, gradients of its parameters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.engine import TorchEngine, use_engine
from model_center.model import BaseModel
from model_center.model.output_projection import IGNORED
from model_center.model.rules import Row
from model_center.model.t5_scaling import T5ScalingConfig

from .stored_models import absent_heads_unsaid
from .verification_sample import Sample

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Observed:
    """What one side computes.

    Attributes:
        states: Hidden states, (positions, dim_model), by name; of what is not padding.
        logits: (positions, classes); None where there is no head.
        gradients: Of each parameter that has one, by name: of the mean cross entropy of the sample's labels, or without
            a head of a fixed random projection of the last hidden states.
    """

    states: Mapping[str, Tensor]
    logits: Tensor | None
    gradients: Mapping[str, Tensor]


def run_ours(directory: Path, model: BaseModel, sample: Sample, dtype: torch.dtype, absent: Sequence[str]) -> Observed:
    """Load a checkpoint as a user does, and run it as training does.

    Args:
        directory: The checkpoint.
        model: Its model, of shapes only.
        sample: The input.
        dtype: What is computed in.
        absent: Heads that it does not hold.
    """
    with use_engine(TorchEngine(CPU, use_checkpoint=False)):
        with absent_heads_unsaid():
            loaded: Any = type(model).from_pretrained(directory, dtype=dtype)
        outputs = loaded(**_inputs(sample, dtype), output_hidden_states=True)
        scale = loaded.config.residual_scale or 1.0 if isinstance(loaded.config, T5ScalingConfig) else 1.0
        states = _states(outputs, sample, absent, scale)
        logits = None
        if model.has_scores(absent):
            with torch.no_grad():
                logits = loaded.logits(outputs.last_hidden_state)[sample.positions]
                logits = logits[:, : logits.shape[-1] - loaded.config.padding_ids]
            count = int((sample.labels != IGNORED).sum())
            (loaded.summed_loss(outputs.last_hidden_state, sample.labels) / count).backward()
        else:
            _projection(outputs, sample, absent).backward()
    return Observed(states, logits, _gradients(loaded.named_parameters()))


def run_transformers(
    directory: Path, model: BaseModel, sample: Sample, dtype: torch.dtype, absent: Sequence[str]
) -> tuple[Observed, list[str]]:
    """Load the directory with Transformers and run it there.

    Args:
        directory: The Transformers directory.
        model: Our model, of shapes only.
        sample: The input.
        dtype: What is computed in.
        absent: Heads that it does not hold.

    Returns:
        What it computes, gradients by the names of the weight rules, and the names that Transformers found no weights
        for.

    Raises:
        ValueError: Transformers cannot load it.
    """
    table, architecture = model.counterpart()
    theirs, missing = _load(directory, architecture if model.has_scores(absent) else "AutoModel", dtype)
    outputs = theirs(**_inputs(sample, dtype), output_hidden_states=True)
    logits = None
    if model.has_scores(absent):
        logits = outputs.logits[sample.positions]
        F.cross_entropy(logits, sample.labels[sample.positions]).backward()
    else:
        _projection(outputs, sample, absent).backward()
    gradients = {table.canonical(name): each for name, each in _gradients(theirs.named_parameters()).items()}
    observed = Observed(_states(outputs, sample, absent), None if logits is None else logits.detach(), gradients)
    return observed, [name for name in map(table.canonical, missing) if not table.is_derived(name)]


def gradients_as_theirs(
    rows: Mapping[str, Row], gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """Our gradients as those of the other side's parameters.

    What turns their tensor into ours is linear, so its transpose, which autograd knows, turns gradients around; where
    several of ours are made of one of theirs, they add up.

    Args:
        rows: The rule that makes each of our parameters.
        gradients: Our gradients by name.
        expected: Theirs, whose names and shapes decide.

    Returns:
        Their name -> our names and the gradient.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for row in dict.fromkeys(rows.values()):
        names = [*row.theirs, *([row.fallback] if row.fallback else [])]
        name = next((name for name in names if name in expected), None)
        if name is None or not all(ours in gradients for ours in row.ours):
            continue
        theirs = torch.zeros_like(expected[name], requires_grad=True)
        outgoing = [gradients[ours] for ours in row.ours]
        (gradient,) = torch.autograd.grad(row.to_ours(theirs), theirs, outgoing)
        before, total = found.get(name, ("", torch.zeros_like(gradient)))
        found[name] = ", ".join(filter(None, (before, *row.ours))), total + gradient
    return found


def _load(directory: Path, architecture: str, dtype: torch.dtype) -> tuple[Any, list[str]]:
    # Only here, since it takes seconds to import.
    import transformers

    model_class = getattr(transformers, architecture)
    with _quiet(transformers.utils.logging):
        try:
            model, report = model_class.from_pretrained(
                directory, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
            )
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise ValueError(f"Transformers cannot load {directory} as {architecture}: {error}") from error
    return model.eval(), sorted(report["missing_keys"])


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without Transformers' bars and remarks about weights, which the checks are about."""
    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()


def _inputs(sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in sample.inputs.items()}


def _states(outputs: Any, sample: Sample, absent: Sequence[str], scale: float = 1.0) -> dict[str, Tensor]:
    """Hidden states of all layers, those before a stack's last norm multiplied by what they are divided by here."""
    stacks = {"layer": ("hidden_states", sample.positions)}
    if "decoder_input_ids" in sample.inputs:
        stacks = {
            "encoder layer": ("encoder_hidden_states", sample.encoder_positions),
            "decoder layer": ("decoder_hidden_states", sample.positions),
        }
    found: dict[str, Tensor] = {}
    for stack, (name, where) in stacks.items():
        *layers, last = (each.detach()[where] for each in outputs[name])
        found |= {f"{stack} {number}": each * scale for number, each in enumerate(layers)}
        found[f"{stack} {len(layers)}"] = last
    if "pooler_output" in outputs.keys() and "pooler" not in absent:  # noqa: SIM118 - ours iterate over values
        found["pooled"] = outputs["pooler_output"].detach()
    return found


def _projection(outputs: Any, sample: Sample, absent: Sequence[str]) -> Tensor:
    """A scalar that every position of what a model without a head returns counts in."""
    states = outputs["last_hidden_state"][sample.positions]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
    total: Tensor = (states * weights).mean()
    return total if "pooler" in absent else total + outputs["pooler_output"].mean()


def _gradients(parameters: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
