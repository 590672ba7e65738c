"""Every family against outputs of the original system, from its own checkpoints (the shared golden files)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_equal
from torch import Tensor

from model_center import engine as bmt
from model_center.model import BaseModel, families

PRECISIONS = {"fp32": (torch.float32, 1e-5), "fp16": (torch.float16, 2e-2)}
# The original gave these no gradient: its last relative bucket was a padding index.
BUCKETS = "relative_attention_bias"


class Golden:
    """A golden model: the loaded checkpoint, its inputs and what the original made of them."""

    def __init__(self, folder: Path, family: str, dtype: torch.dtype) -> None:
        self.model: Any = families[family].from_pretrained(folder, dtype=dtype)
        self.record: dict[str, Any] = torch.load(folder / "golden.pt", weights_only=True)
        self.inputs: dict[str, Tensor] = self.record["inputs"]
        self.valid: Tensor = self.record["valid"].bool()

    def logits(self) -> Tensor:
        logits: Tensor = self.model(**self.inputs, return_logits=True)
        return logits


@pytest.fixture(params=[f"{family}_{precision}" for family in families for precision in PRECISIONS])
def golden(request: pytest.FixtureRequest, golden_model: Callable[[str], Path]) -> tuple[Golden, float]:
    family, precision = request.param.split("_")
    dtype, tolerance = PRECISIONS[precision]
    return Golden(golden_model(request.param), family, dtype), tolerance


def test_logits_and_other_outputs(golden: tuple[Golden, float]) -> None:
    run, tolerance = golden
    with torch.no_grad():
        logits, expected = run.logits()[run.valid].float(), run.record["logits"][run.valid]
        finite = torch.isfinite(expected)
        assert torch.equal(torch.isfinite(logits), finite)
        assert_equal(logits[finite], expected[finite], tolerance)
        output = run.model(**run.inputs, return_logits=False)
    for name, value in run.record["extra"].items():
        valid = run.inputs["attention_mask"].bool() if name.startswith("encoder") else run.valid
        where = valid if value.ndim == 3 else torch.ones(value.shape[:1], dtype=torch.bool)
        assert_equal(output[name][where].float(), value[where], tolerance)


def test_loss_and_gradient_norms(golden: tuple[Golden, float]) -> None:
    run, tolerance = golden
    labels = torch.where(run.valid, run.record["labels"], -100)
    logits = run.logits()
    loss = bmt.loss.FusedCrossEntropy(ignore_index=-100)(logits.view(-1, logits.shape[-1]), labels.view(-1))
    assert loss.item() == pytest.approx(run.record["loss"], rel=tolerance)
    scale = 1024.0  # keeps small gradients out of fp16's subnormal numbers
    (loss * scale).backward()
    norms = {
        name: parameter.grad.float().norm().item() / scale
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None
    }
    assert norms.keys() == run.record["grad_norms"].keys()
    # Keys' biases shift all scores of a query alike: their gradient is zero but for rounding.
    rounding = max(run.record["grad_norms"].values()) * tolerance / 100
    for name, norm in norms.items():
        if not name.endswith(BUCKETS):
            assert norm == pytest.approx(run.record["grad_norms"][name], rel=tolerance, abs=rounding), name


@pytest.mark.parametrize("family", ["gpt2", "cpm2"])
def test_training_trajectory(family: str, golden_model: Callable[[str], Path]) -> None:
    folder = golden_model(f"train_{family}")
    record = torch.load(folder / "trajectory.pt", weights_only=True)
    model = families[family](families[family].config_class.from_json_file(folder / "config.json"))
    bmt.load(model, folder / "init.pt")
    losses, norms = train(model, record["batches"])
    for loss, norm, expected, expected_norm in zip(losses, norms, record["losses"], record["grad_norms"], strict=True):
        assert loss == pytest.approx(expected, rel=3e-3)
        assert norm == pytest.approx(expected_norm, rel=5e-3)


def train(model: BaseModel, batches: list[Any]) -> tuple[list[float], list[float]]:
    """The original's 30 steps; it ran in fp16, this runs in fp32 from the same weights."""
    optimizer = bmt.optim.AdamOffloadOptimizer(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = bmt.lr_scheduler.Noam(optimizer, start_lr=3e-3, warmup_iter=10, end_iter=-1)
    manager = bmt.optim.OptimManager(loss_scale=1024)
    manager.add_optimizer(optimizer, schedule)
    loss_function = bmt.loss.FusedCrossEntropy(ignore_index=-100)
    losses, norms = [], []
    for batch in batches:
        if isinstance(batch, Tensor):
            logits, targets = model(batch, return_logits=True), batch
        else:
            source, targets = batch
            lengths = [torch.full(tensor.shape[:1], tensor.shape[1], device=tensor.device) for tensor in batch]
            logits = model(source, lengths[0], targets, lengths[1])
        loss = loss_function(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
        manager.zero_grad()
        manager.backward(loss)
        norms.append(manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0).item())
        manager.step()
        losses.append(loss.item())
    return losses, norms
