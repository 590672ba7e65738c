"""How well one predicts held-out tokens without looking at their context."""

from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from model_center.recipe import PretrainConfig, prepare_pretraining


def frequency_baseline(run: Path) -> float:
    """The validation loss of predicting each token by how often it is a target in the training part.

    One epoch of training targets is counted, and every entry of the vocabulary once more, so that none is impossible.

    Args:
        run: A directory that `model-center pretrain` has written.
    """
    parser = ArgumentParser()
    parser.add_class_arguments(PretrainConfig)
    config = PretrainConfig(**vars(parser.instantiate(parser.parse_path(run / "config.yaml"))))
    job = prepare_pretraining(replace(config, output=f"{config.output}-baseline"))
    vocab_size = job.model.config.vocab_size
    with job.data as data:
        steps = -(-data.total // config.batch.global_size)
        seen = 1 + sum(_counts(batch.labels, vocab_size) for step in range(steps) for batch in data.step(step).batches)
        held_out = sum(_counts(batch.labels, vocab_size) for batch in data.validation())
    assert isinstance(seen, Tensor)
    assert isinstance(held_out, Tensor)
    return -(held_out * (seen / seen.sum()).log()).sum().item() / held_out.sum().item()


def _counts(labels: Tensor, vocab_size: int) -> Tensor:
    return torch.bincount(labels[labels >= 0], minlength=vocab_size).double()
