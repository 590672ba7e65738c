"""Optimizers for parameters of any precision, and what belongs to a training step."""

from model_center.engine.optim.adam import AdamOffloadOptimizer, AdamOptimizer
from model_center.engine.optim.clip import clip_grad_norm
from model_center.engine.optim.manager import OptimManager, optim_step

__all__ = ["AdamOffloadOptimizer", "AdamOptimizer", "OptimManager", "clip_grad_norm", "optim_step"]
