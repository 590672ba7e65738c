"""A pre-training run of a tiny BERT, which tests change."""

from pathlib import Path

import numpy as np

from model_center import recipe
from model_center.dataset import make_builder
from model_center.recipe import OptimizerOptions, PretrainConfig

STEPS = 6


def tiny_run(encoder: Path, folder: Path) -> PretrainConfig:
    """A run of `STEPS` steps on tokens that are written to a folder; it lacks its output."""
    random = np.random.default_rng(0)
    with make_builder(folder / "train_1", dtype=np.uint16) as builder:
        for length in random.integers(4, 15, 40):
            builder.add_item(random.integers(5, 17, length))
            builder.end_document()
    return PretrainConfig(
        output="unset",
        max_steps=STEPS,
        model=recipe.PretrainModelOptions(name=str(encoder), from_scratch=True, precision="fp32"),
        data=recipe.PretrainDataOptions(path=str(folder), tokenizer=str(encoder), max_length=16, validation_share=0.2),
        batch=recipe.BatchOptions(global_size=4, micro_size=2),
        optimizer=OptimizerOptions(learning_rate=1e-2, schedule="constant", warmup_steps=2),
        checkpoints=recipe.CheckpointOptions(every_steps=3, every_minutes=None, asynchronous=False),
        validation=recipe.ValidationOptions(every_steps=3),
    )
