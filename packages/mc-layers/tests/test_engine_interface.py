"""The interface that scripts written for BMTrain rely on: names and, in order, arguments. Additions come last."""

import inspect
from typing import Any

import pytest

from model_center import engine as bmt

SCHEDULE = "optimizer start_lr warmup_iter end_iter num_iter"
ADAM = "params lr betas eps weight_decay hold_steps"
INTERFACE: list[tuple[Any, str]] = [
    (bmt.init_distributed, "seed"),
    (bmt.rank, ""),
    (bmt.world_size, ""),
    (bmt.synchronize, ""),
    (bmt.print_rank, "args rank kwargs"),
    (bmt.init_parameters, "module"),
    (bmt.save, "model path"),
    (bmt.load, "model path strict"),
    (bmt.sum_loss, "loss"),
    (bmt.gather_result, "result"),
    (bmt.distributed.all_reduce, "x op"),
    (bmt.distributed.all_gather, "x"),
    (bmt.distributed.broadcast, "src root"),
    (bmt.CheckpointBlock, "module"),
    (bmt.TransformerBlockList, "blocks"),
    (bmt.optim_step, "optimizer lr_scheduler"),
    (bmt.optim.AdamOptimizer, ADAM),
    (bmt.optim.AdamOffloadOptimizer, ADAM),
    (bmt.optim.AdamOptimizer.step, "self closure scale"),
    (bmt.optim.AdamOptimizer.loss_scale, "self loss"),
    (bmt.optim.clip_grad_norm, "param_groups max_norm norm_type scale eps"),
    (
        bmt.optim.OptimManager,
        "loss_scale loss_scale_factor loss_scale_steps min_loss_scale max_loss_scale grad_scale",
    ),
    (bmt.optim.OptimManager.add_optimizer, "self optimizer lr_scheduler"),
    (bmt.optim.OptimManager.scale_loss, "self loss"),
    (bmt.optim.OptimManager.backward, "self loss"),
    (bmt.optim.OptimManager.zero_grad, "self"),
    (bmt.optim.OptimManager.clip_grad_norm, "self param_groups max_norm norm_type eps"),
    (bmt.optim.OptimManager.step, "self"),
    (bmt.optim.OptimManager.state_dict, "self"),
    (bmt.optim.OptimManager.load_state_dict, "self state_dict"),
    (bmt.lr_scheduler.Noam, SCHEDULE),
    (bmt.lr_scheduler.Linear, SCHEDULE),
    (bmt.lr_scheduler.Cosine, SCHEDULE),
    (bmt.lr_scheduler.Exponential, SCHEDULE + " gamma"),
    (bmt.lr_scheduler.NoDecay, SCHEDULE),
    (bmt.lr_scheduler.WarmupLRScheduler.step, "self num_iter"),
    (bmt.loss.FusedCrossEntropy, "weight ignore_index reduction label_smoothing"),
]


@pytest.mark.parametrize(("function", "arguments"), INTERFACE, ids=[each.__qualname__ for each, _ in INTERFACE])
def test_arguments_keep_their_names_and_places(function: Any, arguments: str) -> None:
    assert list(inspect.signature(function).parameters)[: len(arguments.split())] == arguments.split()


def test_defaults_are_bmtrains() -> None:
    def defaults(function: Any) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.values()
        return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}

    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "hold_steps": 0}
    assert defaults(bmt.optim.AdamOptimizer).items() >= adam.items()
    assert defaults(bmt.optim.OptimManager) == {
        "loss_scale": None,
        "loss_scale_factor": 2,
        "loss_scale_steps": 1024,
        "min_loss_scale": 1,
        "max_loss_scale": float("inf"),
        "grad_scale": None,
    }
    assert defaults(bmt.lr_scheduler.Noam) == {"num_iter": 0}
    assert defaults(bmt.lr_scheduler.Exponential)["gamma"] == 0.95
    assert defaults(bmt.loss.FusedCrossEntropy) == {
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    init = {
        "seed": 0,
        "engine": None,
        "use_checkpoint": None,
        "zero_level": 3,
        "compile": False,
        "activation_budget": None,
        "deterministic": False,
    }
    assert defaults(bmt.init_distributed) == init
