"""Optimizers for parameters of any precision, and what belongs to a training step."""

from model_center.engine.optim.adam import AdamOptimizer
from model_center.engine.optim.adam_state import ReadTensor, Shard
from model_center.engine.optim.clip import clip_grad_norm
from model_center.engine.optim.manager import OptimManager, optim_step
from model_center.engine.optim.offload import AdamOffloadOptimizer

__all__ = [
    "AdamOffloadOptimizer",
    "AdamOptimizer",
    "OptimManager",
    "ReadTensor",
    "Shard",
    "clip_grad_norm",
    "optim_step",
]
