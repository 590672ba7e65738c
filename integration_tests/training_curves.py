"""Training curves of tiny models of all families: under an engine in any number of processes, and in plain PyTorch.

    torchrun --nproc_per_node 2 training_curves.py '{"engine": "torch", "dtypes": ["float32"], "folder": "curves"}'

trains every model on this process's share of the same global batches. Rank 0 writes `curves.json` and the checkpoints.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center import engine as bmt
from model_center.model import BaseModel, families

Batch = dict[str, Tensor]
STEPS, GLOBAL_BATCH, SHARE, LENGTH, TARGETS = 50, 8, 2, 12, 6
WORDS = 59
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 2e-3, 1e-2, 1.0
LOSS_SCALE = {"float32": None, "bfloat16": None, "float16": 1024.0}
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}

_SIZES: dict[str, Any] = {"vocab_size": WORDS + 1, "dim_model": 32, "num_heads": 2, "dim_head": 16, "dim_ff": 48}
_SPREAD: dict[str, Any] = {"emb_init_std": 0.5, "proj_init_std": 0.1, "pos_init_std": 0.1, "dropout_p": 0.0}
_STACK: dict[str, Any] = {"num_layers": 2, "att_init_std": 0.1, "ffn_init_std": 0.1}
_SCALED: dict[str, Any] = {"att_init_std": 1.0, "ffn_init_std": 1.0, "proj_init_std": 1.0, "attn_scale": True}
_STACKS: dict[str, Any] = {"num_encoder_layers": 2, "num_decoder_layers": 2, "att_init_std": 0.1, "ffn_init_std": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**_STACK, "position_size": 16, "tied": True},
    "gpt2": {**_STACK, "position_size": 16},
    "gptj": {**_STACK, "pos_rotary_dim": 8},
    # With T5's ReLU two runs of one process that differ by rounding drift apart by 1e-3 in 50 steps.
    "t5": {**_STACKS, "ffn_activate_fn": "gated_gelu"},
    "cpm1": {**_STACK, **_SCALED, "length_scale": True},
    "cpm2": {**_STACKS, **_SCALED, "length_scale": True},
}
"""Options of a tiny model of each family."""
SHAPES = ("bert", "gpt2", "t5")
"""One family of each shape: encoder, decoder, encoder-decoder."""


@dataclass(frozen=True)
class Curve:
    """What training came to: the mean loss of each global batch, and the norm of its gradients before clipping."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def differences(self, other: "Curve") -> dict[str, float]:
        """The largest relative difference of losses and of norms, infinite if one of them is not finite."""
        return {
            name: max(
                abs(one - two) / abs(two) if math.isfinite(one) and math.isfinite(two) else math.inf
                for one, two in zip(getattr(self, name), getattr(other, name), strict=True)
            )
            for name in ("losses", "norms")
        }


def build(family: str, dtype: str) -> BaseModel:
    """A tiny model of a family, the same on every process."""
    torch.manual_seed(0)
    config_class = families[family].config_class
    config = config_class(**{**_SIZES, **_SPREAD, **FAMILIES[family], "dtype": getattr(torch, dtype)})
    return families[family](config)


def global_batch(family: str, step: int) -> tuple[Batch, Tensor]:
    """Inputs of a step for all processes together, and the labels: -100 where a sequence is padded.

    All shares have the same lengths, so that the mean loss of the processes is that of all labels.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, WORDS, (GLOBAL_BATCH, LENGTH), generator=generator)
    real = torch.randint(TARGETS, LENGTH + 1, (SHARE,), generator=generator).repeat(GLOBAL_BATCH // SHARE)
    labels = ids.roll(-1, 1).masked_fill(torch.arange(LENGTH) >= real[:, None], -100)
    targets = ids[:, :TARGETS].flip(1)
    whole = torch.full((GLOBAL_BATCH,), TARGETS)
    if family == "cpm1":
        context = (torch.arange(LENGTH) < 4).expand(GLOBAL_BATCH, -1)
        return {"input": ids, "length": real, "context": context, "span": (ids * 0)}, labels
    if family == "cpm2":
        return {"enc_input": ids, "enc_length": real, "dec_input": targets, "dec_length": whole}, targets.roll(-1, 1)
    if family == "t5":
        return {"input_ids": ids, "length": real, "decoder_input_ids": targets}, targets.roll(-1, 1)
    return {"input_ids": ids, "length": real}, labels


def share(batch: tuple[Batch, Tensor], rank: int, world_size: int, device: torch.device) -> tuple[Batch, Tensor]:
    """A process's rows of a global batch."""
    inputs, labels = batch
    rows = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    return {name: value[rows].to(device) for name, value in inputs.items()}, labels[rows].to(device)


def train(
    family: str,
    dtype: str,
    steps: int = STEPS,
    *,
    offload: bool = False,
    start: Path | None = None,
    checkpoint: Path | None = None,
) -> Curve:
    """Trains under the current engine, from the checkpoint `start` if given, and saves `checkpoint`."""
    engine = bmt.current_engine()
    model = build(family, dtype)
    if start is not None:
        bmt.load(model, start)
    optimizer_class = bmt.optim.AdamOffloadOptimizer if offload else bmt.optim.AdamOptimizer
    optimizer = optimizer_class(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    manager = bmt.optim.OptimManager(loss_scale=LOSS_SCALE[dtype])
    manager.add_optimizer(optimizer)
    cross_entropy = bmt.loss.FusedCrossEntropy()
    curve = Curve()
    for step in range(steps):
        inputs, labels = share(global_batch(family, step), engine.rank, engine.world_size, engine.device)
        manager.zero_grad()
        loss = cross_entropy(model(**inputs, return_logits=True).flatten(0, 1), labels.flatten())
        manager.backward(loss)
        curve.norms.append(manager.clip_grad_norm(optimizer.param_groups, max_norm=MAX_NORM).item())
        manager.step()
        curve.losses.append(bmt.sum_loss(loss).item())
    if checkpoint is not None:
        bmt.save(model, checkpoint)
    return curve


def reference(family: str, dtype: str, steps: int = STEPS) -> Curve:
    """Trains in one process on whole batches with nothing but PyTorch: its AdamW on float32 masters, its clipping."""
    model = build(family, dtype)
    parameters = list(model.parameters())
    masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scale = LOSS_SCALE[dtype] or 1.0
    curve = Curve()
    for step in range(steps):
        inputs, labels = share(global_batch(family, step), 0, 1, parameters[0].device)
        logits = model(**inputs, return_logits=True).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        (loss * scale).backward()
        for parameter, master in zip(parameters, masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float() / scale
            parameter.grad = None
        curve.norms.append(torch.nn.utils.clip_grad_norm_(masters, MAX_NORM).item())
        optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        curve.losses.append(loss.item())
    return curve


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one launch does.

    Attributes:
        folder: where `curves.json` and the checkpoints go.
        engine: "torch" or "bmtrain".
        families: which models.
        dtypes: in which types.
        steps: how far.
        options: further arguments of `init_distributed`.
        offload: whether the optimizer's state is kept by the host.
        start: folder of the job whose checkpoints it starts from; by default from fresh weights.
    """

    folder: str
    engine: str = "torch"
    families: tuple[str, ...] = tuple(FAMILIES)
    dtypes: tuple[str, ...] = ("float32",)
    steps: int = STEPS
    options: Mapping[str, Any] = field(default_factory=dict)
    offload: bool = False
    start: str | None = None

    def checkpoint(self, family: str, dtype: str) -> Path:
        """Where a model is saved after training."""
        return Path(self.folder) / f"{family}-{dtype}.pt"

    def launch(self, processes: int, timeout: float = 600, **environment: str) -> dict[str, dict[str, Curve]]:
        """Runs in that many processes and returns the curves by family and type.

        Raises:
            RuntimeError: A process failed; the message is what they wrote.
        """
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*launcher, __file__, json.dumps(asdict(self))],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
        )
        if done.returncode:
            raise RuntimeError(f"{processes} processes of {self.engine} failed:\n{done.stdout}\n{done.stderr}")
        found = json.loads((Path(self.folder) / "curves.json").read_text())
        return {
            family: {dtype: Curve(**curve) for dtype, curve in by_dtype.items()} for family, by_dtype in found.items()
        }

    def run(self) -> None:
        """What each process does."""
        engine: Any = self.engine
        bmt.init_distributed(seed=0, engine=engine, **self.options)
        found: dict[str, dict[str, Any]] = {family: {} for family in self.families}
        for family, dtype in product(self.families, self.dtypes):
            checkpoint = self.checkpoint(family, dtype)
            start = None if self.start is None else Path(self.start) / checkpoint.name
            curve = train(family, dtype, self.steps, offload=self.offload, start=start, checkpoint=checkpoint)
            found[family][dtype] = asdict(curve)
            if bmt.rank() == 0:
                (Path(self.folder) / "curves.json").write_text(json.dumps(found))
        bmt.synchronize()
        bmt.current_engine().shutdown()


if __name__ == "__main__":
    Job(**json.loads(sys.argv[1])).run()
