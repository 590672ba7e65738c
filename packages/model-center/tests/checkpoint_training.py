"""A tiny model in training, whose checkpoints are tested, and processes that train it or are killed while they do."""

import contextlib
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from model_center import engine
from model_center.engine.lr_scheduler import Linear
from model_center.engine.optim import AdamOptimizer, OptimManager
from model_center.model import GPT2, GPT2Config
from model_center.recipe.checkpoints import CheckpointStore, TrainingState, find_newest

WORDS, LENGTH, ROWS = 19, 6, 4

# Processes are forked from one that has imported everything and has no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["model_center.engine.fsdp_engine", "model_center.recipe.pretraining", "torch._dynamo"]
)


def make_state(dtype: torch.dtype = torch.float32, **changes: Any) -> TrainingState:
    """A fresh model of odd sizes, so that shards differ, with two parameter groups."""
    sizes = {"vocab_size": WORDS, "dim_model": 10, "num_heads": 2, "dim_head": 5, "dim_ff": 14, "num_layers": 2}
    spread = {"emb_init_std": 0.5, "att_init_std": 0.3, "ffn_init_std": 0.3, "pos_init_std": 0.1}
    torch.manual_seed(1)
    model = GPT2(GPT2Config(**{**sizes, **spread, "position_size": 8, "dropout_p": 0.1, "dtype": dtype, **changes}))
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
    optimizer = AdamOptimizer(groups, lr=1e-2)
    manager = OptimManager(loss_scale=8.0, loss_scale_steps=3, max_loss_scale=2.0**16)
    manager.add_optimizer(optimizer, Linear(optimizer, 1e-2, 2, 5000, num_iter=1))
    return TrainingState(model, None, manager)


def train(state: TrainingState, steps: int) -> list[float]:
    """Train on ids that all three random generators have a part in."""
    losses = []
    state.model.train()
    for _ in range(steps):
        shift = random.randrange(WORDS) + int(np.random.randint(WORDS))  # noqa: NPY002 - what data code shares
        ids = (torch.randint(0, WORDS, (ROWS, LENGTH)) + shift) % WORDS
        ids = ids.to(engine.current_engine().device)
        state.manager.zero_grad()
        logits = state.model(ids, attention_mask=torch.ones_like(ids), return_logits=True)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        state.manager.backward(loss)
        state.manager.step()
        losses.append(loss.item())
    return losses


def contents(state: TrainingState) -> dict[str, torch.Tensor]:
    """Every weight and every tensor of the optimizer, whole, on the first process, in the host's memory."""
    held = {f"model {name}": tensor for name, tensor in engine.current_engine().state_dict(state.model).items()}
    for index, states in state.optimizers[0].state_dict()["state"].items():
        held |= {f"{index} {name}": tensor for name, tensor in states.items()}
    return {name: tensor.to("cpu", copy=True) for name, tensor in held.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def seed() -> None:
    """Seed all random generators."""
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - what data code shares
    random.seed(3)


def save_until_killed(directory: Path, asynchronous: bool, told: Connection) -> None:
    """Go on from the newest checkpoint, save after every step, and let the first process tell when and what."""

    def tell(what: str) -> None:
        if engine.rank() == 0:
            told.send((what, step, time.monotonic()))

    torch.set_num_threads(1)
    state = make_state()
    seed()
    store = CheckpointStore(directory, keep_last=2, keep_best=True, asynchronous=asynchronous)
    newest = store.newest(verify=True)
    assert not newest.damaged, newest
    step = 0 if newest.path is None else store.load(newest.path, state)["step"]
    tell("complete")
    while True:
        train(state, 1)
        step += 1
        state.progress = {"step": step}
        tell("saving")
        store.save(state, step=step, config="x: 1\n", score=1 / (1 + step % 7))
        if not asynchronous or step % 3 == 0:
            store.wait()
            tell("complete")


def kill_savers(
    directory: Path, kills: int, *, asynchronous: bool, world_size: int = 1, number: int = 0
) -> dict[str, int]:
    """Kill processes that save, at random moments, and check after each what is there.

    Returns:
        How many were killed, the newest step, and how many kills left something unfinished behind.
    """
    chance = random.Random(number)
    unfinished = step = 0
    duration = 0.05
    for _ in range(kills):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        arguments = (directory, asynchronous, sender)
        processes = start_processes(_with_engine, world_size, "torch", save_until_killed, arguments)
        sender.close()
        _, told, _ = receiver.recv()
        assert told == step, f"went on from step {told} where {step} was the newest"
        saves, began = chance.randint(1, 4), 0.0
        while saves:
            what, number, moment = receiver.recv()
            if what == "saving":
                saves, began = saves - 1, moment
            else:
                told, duration = number, moment - began
        time.sleep(chance.uniform(0, 1.5 * duration))
        chance.shuffle(processes)
        for process in processes:
            process.kill()  # which may have ended by itself when its partner did
            time.sleep(chance.choice([0, 0, 0.02, 0.3]))
        for process in processes:
            process.join()
        with contextlib.suppress(EOFError):
            while receiver.poll():
                what, number, _ = receiver.recv()
                told = number if what == "complete" else told
        found = find_newest(directory, verify=True)
        assert not found.damaged, found
        step = 0 if found.path is None else int(found.path.name.removeprefix("step-"))
        assert step >= told, f"step {told} was complete, but the newest is {step}"
        unfinished += directory.exists() and any(directory.glob(".step-*"))
    state, straight = make_state(), make_state()
    store = CheckpointStore(directory, keep_last=2, keep_best=True, asynchronous=False)
    newest = store.newest(verify=True).path
    assert newest is not None
    assert store.load(newest, state) == {"step": step}
    if world_size == 1:
        seed()
        train(straight, step)
        assert_equal(contents(state), contents(straight))
    assert not any(directory.glob(".step-*"))
    return {"kills": kills, "newest step": step, "unfinished": unfinished}


def run_processes(
    work: Callable[..., None], world_size: int, *args: Any, name: Literal["torch", "bmtrain"] = "torch"
) -> None:
    """Run a function in several processes that are each other's partners under an engine."""
    assert exit_codes(start_processes(_with_engine, world_size, name, work, args)) == [0] * world_size


def start_processes(work: Callable[..., None], world_size: int, *args: Any) -> list[ForkServerProcess]:
    """Call a function in several processes whose environment is that of a launcher."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    processes = [
        PROCESSES.Process(target=_launched, args=(work, rank, world_size, port, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def exit_codes(processes: list[ForkServerProcess]) -> list[int | None]:
    """Wait for processes to end, and kill those that don't, whose code is None."""
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _launched(work: Callable[..., None], rank: int, world_size: int, port: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(number) for name, number in places.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    work(*args)


def _with_engine(name: Literal["torch", "bmtrain"], work: Callable[..., None], args: tuple[Any, ...]) -> None:
    engine.init_distributed(seed=3, engine=name)
    random.seed(engine.rank())
    np.random.seed(engine.rank())  # noqa: NPY002 - what data code shares
    work(*args)
    engine.synchronize()
