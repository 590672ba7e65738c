"""A model with its optimizer, ours or Transformers', that does training steps."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from model_center import engine as bmt
from model_center.model import Config, families

from .batches import Batch
from .workloads import Setting, Workload

MAX_NORM = 1.0
WEIGHT_DECAY = 1e-2
LR = 1e-4
CALM_LR = 2e-5
"""With that, and without warm-up, losses fall evenly: one that jumps does so a step earlier or later."""


class Trainee(Protocol):
    """What is measured."""

    config: Config
    module: torch.nn.Module

    def step(self, batch: Batch) -> Tensor:
        """One training step; returns the mean loss of the batch, without waiting for it."""

    def new_optimizer(self, lr: float = LR) -> None:
        """Forgets what training has gathered beside the weights."""

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from weights that may be finer than the module's own, which they have been rounded to."""


class Ours:
    """A public model under a public engine."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        bmt.init_distributed(
            seed=0,
            engine=setting.engine,
            use_checkpoint=setting.recomputed,
            compile=setting.compiled,
            activation_budget=setting.activation_budget,
            deterministic=setting.deterministic,
        )
        self.family = workload.family
        self.config = workload.config(getattr(torch, setting.dtype))
        self.module: Any = families[workload.family](self.config)
        self.optimizer_class = bmt.optim.AdamOffloadOptimizer if setting.offloaded else bmt.optim.AdamOptimizer
        # Padding is left out where only hidden states are asked for.
        self.more = {"output_hidden_states": True} if setting.keeps_padding else {}
        self.new_optimizer()

    def new_optimizer(self, lr: float = LR) -> None:
        """Without masters of earlier weights."""
        self.optimizer = self.optimizer_class(self.module.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
        self.manager = bmt.optim.OptimManager()
        self.manager.add_optimizer(self.optimizer)

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """As from a checkpoint of the optimizer before its first step."""
        names = [name for name, _ in self.module.named_parameters()]

        def read(index: int, name: str, held: range) -> Tensor:
            if name == "step":
                return torch.zeros(1)
            whole = weights[names[index]].flatten()[held.start : held.stop]
            return whole if name == "master" else torch.zeros_like(whole)

        self.optimizer.load_shards(self.optimizer.options(), read)

    def step(self, batch: Batch) -> Tensor:
        """As a user writes it."""
        self.manager.zero_grad()
        hidden_states = self.module(**batch.ours(self.family), **self.more).last_hidden_state
        loss: Tensor = self.module.summed_loss(hidden_states, batch.labels) / batch.targets
        self.manager.backward(loss)
        self.manager.clip_grad_norm(self.optimizer.param_groups, max_norm=MAX_NORM)
        self.manager.step()
        return loss.detach()


class Theirs:
    """A model of Transformers: float32 weights, bfloat16 autocast, fused AdamW; FSDP2 in several processes."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

        bmt.init_distributed(seed=0, engine="torch")
        self.device, self.family = bmt.current_engine().device, workload.family
        self.config = workload.config(torch.float32)
        theirs = self.config.checked_huggingface()
        config = AutoConfig.for_model(theirs.pop("model_type"), **theirs, use_cache=False)
        automatic = {"bert": AutoModelForMaskedLM, "t5": AutoModelForSeq2SeqLM}
        with self.device:
            self.module: Any = automatic.get(workload.family, AutoModelForCausalLM).from_config(
                config, attn_implementation=setting.attention
            )
        self.module.train()
        if setting.recomputed:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
        if bmt.world_size() > 1:
            _shard(self.module, getattr(torch, setting.dtype))
        self.new_optimizer()
        self.run = torch.compile(self.module) if setting.compiled else self.module
        self.dtype = getattr(torch, setting.dtype)

    def new_optimizer(self, lr: float = LR) -> None:
        """Without moments."""
        options: dict[str, Any] = {"lr": lr, "weight_decay": WEIGHT_DECAY}
        self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True, **options)

    def set_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing: its weights are the masters."""

    def step(self, batch: Batch) -> Tensor:
        """As Transformers' users write it."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss: Tensor = self.run(**batch.transformers(self.family)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), MAX_NORM)
        self.optimizer.step()
        return loss.detach()


def _shard(module: torch.nn.Module, dtype: torch.dtype) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype)
    blocks: Iterable[Any] = (
        layer for part in module.modules() if isinstance(part, torch.nn.ModuleList) for layer in part
    )
    for block in list(blocks):
        if type(block).__name__ in ("BertLayer", "GPT2Block", "T5Block"):
            fully_shard(block, mp_policy=policy)
    fully_shard(module, mp_policy=policy)


def make_trainee(workload: Workload, setting: Setting) -> Trainee:
    """The model of a workload, run as the setting says."""
    return (Ours if setting.side == "ours" else Theirs)(workload, setting)
