"""Computes the gradients of one global batch in several ways, in as many processes as are launched together."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_center import engine as bmt
from model_center.dataset.indexed.objectives import Sample
from model_center.model import load_model
from model_center.recipe.pretraining import accumulate_gradients
from model_center.recipe.pretraining_batches import Batch, Collator

VOCABULARY = 17
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
LENGTHS = [(3, 4), (9, 2), (5, 6), (8, 8), (2, 1), (7, 5), (4, 9)]
"""Tokens of each sample, and on the decoder's side, if there is one: an odd number, so that processes differ."""
WAYS = [(1, 1), (4, 1), (2, 2), (1, 4)]
"""Rows of a micro-batch, and how many samples share a row; rows of one are padded."""
SEQ2SEQ = ("t5", "cpm2")


def samples(family: str) -> list[Sample]:
    """Samples of different lengths, with positions that have no label.

    The last id is left out: GPT-2 never predicts its padding.
    """
    generator = np.random.default_rng(0)
    made = []
    for length, target_length in LENGTHS:
        labelled = target_length if family in SEQ2SEQ else length
        labels = generator.integers(0, VOCABULARY - 1, labelled)
        labels[generator.random(labelled) < 0.3] = -100
        sample: Sample = {"input_ids": generator.integers(0, VOCABULARY - 1, length), "labels": labels}
        if family in SEQ2SEQ:
            sample["decoder_input_ids"] = generator.integers(0, VOCABULARY - 1, target_length)
        if family == "cpm1":
            sample["context"] = np.arange(length) < 2
        made.append(sample)
    return made


def batches_of(family: str, micro_size: int, share: int) -> Iterator[Batch]:
    """The micro-batches of this process, as many as those of the others; the last ones may have no sample."""
    takes_positions = family in ("bert", "gpt2", "gptj")
    collate = Collator(family, packed=share > 1, takes_positions=takes_positions, sides=None)
    every = samples(family)
    rows = [every[at : at + share] for at in range(0, len(every), share)]
    mine = rows[bmt.rank() :: bmt.world_size()]
    for number in range(-(-len(rows) // (bmt.world_size() * micro_size))):
        yield collate(mine[number * micro_size : (number + 1) * micro_size])


def save_gradients(folder: Path) -> None:
    """Write the gradients of a folder's models, one of each family, to the file `<processes>.safetensors` in it."""
    bmt.init_distributed(seed=0)
    found: dict[str, Tensor] = {}
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        family = directory.name
        targets = sum(int((sample["labels"] != -100).sum()) for sample in samples(family))
        for precision, dtype in PRECISIONS.items():
            model = load_model(directory, dtype=dtype)
            for micro_size, share in WAYS:
                optimizer = bmt.optim.AdamOptimizer(model.parameters())
                manager = bmt.optim.OptimManager()
                manager.add_optimizer(optimizer)
                manager.zero_grad()
                loss = accumulate_gradients(model, manager, batches_of(family, micro_size, share), targets)
                manager.clip_grad_norm(optimizer.param_groups, max_norm=1e9)  # waits for reductions, clips nothing
                way = f"{precision}/{family}/{micro_size} by {share}"
                found[f"{way}/loss"] = loss.cpu()
                engine = bmt.current_engine()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        whole = engine.whole(parameter, engine.local(parameter.grad))
                        found[f"{way}/{name}"] = whole.detach().cpu().clone()
    if bmt.rank() == 0:
        save_file(found, folder / f"{bmt.world_size()}.safetensors")
    bmt.current_engine().shutdown()
