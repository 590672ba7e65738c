"""A tiny model in training, whose checkpoints are tested; as a script, one of several processes, or one to be killed.

python checkpoint_training.py DIRECTORY sync|async      saves every step until it is killed
torchrun --nproc_per_node N checkpoint_training.py FOLDER WHAT
"""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_center import engine
from model_center.engine.lr_scheduler import Linear
from model_center.engine.optim import AdamOptimizer, OptimManager
from model_center.model import GPT2, GPT2Config
from model_center.recipe.checkpoints import CheckpointStore, TrainingState

WORDS, LENGTH, ROWS = 19, 6, 4


def make_state(**changes: Any) -> TrainingState:
    """A fresh model of odd sizes, so that shards differ, with two parameter groups."""
    sizes = {"vocab_size": WORDS, "dim_model": 10, "num_heads": 2, "dim_head": 5, "dim_ff": 14, "num_layers": 2}
    spread = {"emb_init_std": 0.5, "att_init_std": 0.3, "ffn_init_std": 0.3, "pos_init_std": 0.1}
    torch.manual_seed(1)
    model = GPT2(GPT2Config(**{**sizes, **spread, "position_size": 8, "dropout_p": 0.1, **changes}))
    parameters = list(model.parameters())
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
    optimizer = AdamOptimizer(groups, lr=1e-2)
    manager = OptimManager(loss_scale=8.0, loss_scale_steps=3)
    manager.add_optimizer(optimizer, Linear(optimizer, 1e-2, 2, 50, num_iter=1))
    return TrainingState(model, None, manager)


def train(state: TrainingState, steps: int) -> list[float]:
    """Train on random ids that all three generators have a part in; the same rows on every process."""
    losses = []
    state.model.train()
    for _ in range(steps):
        shift = random.randrange(WORDS) + int(np.random.randint(WORDS))  # noqa: NPY002 - what data code shares
        ids = (torch.randint(0, WORDS, (ROWS, LENGTH)) + shift) % WORDS
        state.manager.zero_grad()
        logits = state.model(ids, attention_mask=torch.ones_like(ids), return_logits=True)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        state.manager.backward(loss)
        state.manager.step()
        losses.append(loss.item())
    return losses


def contents(state: TrainingState) -> dict[str, torch.Tensor]:
    """Every weight and every tensor of the optimizer, whole, on rank 0."""
    held = {f"model {name}": tensor.clone() for name, tensor in engine.current_engine().state_dict(state.model).items()}
    for index, states in state.optimizers[0].state_dict()["state"].items():
        held |= {f"{index} {name}": tensor.clone() for name, tensor in states.items()}
    return held


def save_until_killed(directory: Path, *, asynchronous: bool) -> None:
    state = make_state()
    with CheckpointStore(directory, keep_last=2, keep_best=True, asynchronous=asynchronous) as store:
        newest = store.newest(verify=True).path
        step = 0 if newest is None else store.load(newest, state)["step"]
        while True:
            train(state, 1)
            step += 1
            state.progress = {"step": step}
            store.save(state, step=step, config="x: 1\n", score=1 / (1 + step % 7))
            if not asynchronous or step % 3 == 0:
                store.wait()
                sys.stdout.write(f"{step}\n")  # complete from here on
                sys.stdout.flush()


if __name__ == "__main__":
    save_until_killed(Path(sys.argv[1]), asynchronous=sys.argv[2] == "async")
