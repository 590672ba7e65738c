"""What is done in one process and in several, to be compared. As a script it is one of several processes.

    torchrun --nproc_per_node 2 fsdp_scenarios.py FOLDER

runs everything and leaves what rank 0 found in FOLDER/found.pt. What concerns single ranks is asserted on the spot.
"""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model_center import engine as bmt
from model_center.engine.fsdp_engine import FSDPEngine
from model_center.engine.launch import Place
from model_center.engine.optim import Shard
from model_center.layer import Embedding, Encoder, RelativePositionEmbedding

BATCH, STEPS = 4, 6
WORDS = 21


class Model(torch.nn.Module):
    """Blocks, parameters outside of them (one of them tied), and a layer that is not ours."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = Embedding(WORDS, 8, dtype=dtype)
        self.bias = RelativePositionEmbedding(2, 8, 16, True, dtype=dtype)
        # The dimensions are odd, so that shards differ in size, and a norm's single row lies on one process only.
        self.encoder = Encoder(
            3,
            8,
            7,
            2,
            5,
            dtype=dtype,
            pos_bias_type="relative",
            norm_bias=True,
            ffn_bias=True,
            att_init_std=0.3,
            ffn_init_std=0.3,
        )
        self.plain = torch.nn.Linear(8, 8).to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        bias = self.bias(ids.shape[1], ids.shape[1])
        hidden = self.plain(self.encoder(self.embedding(ids), None, bias))
        scores: Tensor = self.embedding.projection(hidden)
        return scores


def build(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(5)
    return Model(dtype)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bmt.current_engine().state_dict(model).items()}


def state_of_all(model: torch.nn.Module) -> list[Tensor]:
    """All parameters whole, on every process."""
    return [
        each.full_tensor() if isinstance(each, DTensor) else each for each in map(Tensor.detach, model.parameters())
    ]


def batch(step: int) -> Tensor:
    """This process's share of a step's ids."""
    ids = torch.randint(0, WORDS, (BATCH, 6), generator=torch.Generator().manual_seed(step))
    return ids.chunk(bmt.world_size())[bmt.rank()]


def train(
    make_optimizer: Callable[..., torch.optim.Optimizer] = bmt.optim.AdamOptimizer,
    dtype: torch.dtype = torch.float32,
    micro_batches: int = 1,
    load_from: Path | None = None,
    save_to: Path | None = None,
    loss_scale: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains, from a checkpoint or from the beginning, and returns everything that can be compared."""
    model = build(dtype)
    optimizer = make_optimizer(model.parameters(), lr=1e-2, **options)
    manager = bmt.optim.OptimManager(loss_scale=loss_scale)
    manager.add_optimizer(optimizer, bmt.lr_scheduler.Noam(optimizer, 3e-2, 2, -1))
    if load_from is not None:
        bmt.load(model, load_from / "model.pt")
        manager.load_state_dict(torch.load(load_from / "optimizers.pt", weights_only=True, mmap=True))
    losses, norms = [], []
    for step in range(STEPS):
        manager.zero_grad()
        total = torch.zeros(())
        for part in batch(step).chunk(micro_batches):
            loss = bmt.loss.FusedCrossEntropy()(model(part).flatten(0, 1), part.flatten()) / micro_batches
            manager.backward(loss)
            total += loss.detach()
        norms.append(manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0).item())
        assert manager.step()
        losses.append(bmt.sum_loss(total).item())
    if save_to is not None:
        save_to.mkdir(exist_ok=True)
        bmt.save(model, save_to / "model.pt")
        state = manager.state_dict()
        if bmt.rank() == 0:
            torch.save(state, save_to / "optimizers.pt")
        bmt.synchronize()
    return {"losses": losses, "norms": norms, "weights": state_of(model)}


def norms_of_all_orders() -> dict[str, Any]:
    model = build()
    part = batch(0)
    bmt.optim.OptimManager().backward(bmt.loss.FusedCrossEntropy()(model(part).flatten(0, 1), part.flatten()))
    groups = [{"params": list(model.parameters())}]
    return {str(order): bmt.optim.clip_grad_norm(groups, 1e9, order).item() for order in (1, 2, 3, "inf")}


def initialise_again() -> dict[str, Any]:
    model = build()
    first = state_of(model)
    bmt.init_parameters(model)
    return {"first": first, "second": state_of(model)}


def evaluate_and_train_again() -> dict[str, Any]:
    """An evaluation between steps must not leave anything gathered that an optimizer or a checkpoint then takes."""
    model = build()
    with torch.no_grad():
        scores = bmt.gather_result(model(batch(0)))
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    bmt.loss.FusedCrossEntropy()(model(batch(0)).flatten(0, 1), batch(0).flatten()).backward()
    bmt.optim_step(optimizer)
    block = model.encoder.layers[1]
    alone = bmt.gather_result(block(torch.ones(1, 3, 8), None))[:1].detach()
    return {"scores": scores, "weights": state_of(model), "alone": alone}


def train_frozen() -> dict[str, Any]:
    """Parts that are frozen, thawed and partly frozen between steps, and an optimizer that is stepped by itself."""
    model = build()
    model.plain.requires_grad_(False)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    layers: Any = model.encoder.layers
    for step in range(6):
        if step == 2:
            model.plain.requires_grad_(True)
        if step % 2 == 0:
            layers.requires_grad_(step == 2)
        if step == 4:
            layers[1].requires_grad_(True)
        optimizer.zero_grad()
        bmt.loss.FusedCrossEntropy()(model(batch(step)).flatten(0, 1), batch(step).flatten()).backward()
        optimizer.step()
    return {"weights": state_of(model)}


def run_first_block_only() -> dict[str, Any]:
    """What it gathers for the next one must not outlive a step or a loading. PyTorch's optimizer, stepped alone."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first, probe = model.encoder.layers[0], torch.ones(1, 3, 8)
    for step in range(3):
        optimizer.zero_grad()
        bmt.loss.FusedCrossEntropy()(model(batch(step)).flatten(0, 1), batch(step).flatten()).backward()
        first(probe, None)
        optimizer.step()
    weights = state_of(model)
    outputs = []
    for change in (partial(bmt.load_state_dict, model), lambda _: bmt.init_parameters(model)):
        first(probe, None)
        names = [name for name, _ in model.named_parameters()]
        change({name: -whole for name, whole in zip(names, state_of_all(model), strict=True)})
        outputs.append(model.encoder(probe, None).detach())
    return {"weights": weights, "outputs": outputs}


def evaluate_8_bits() -> dict[str, Any]:
    torch.manual_seed(5)
    encoder = Encoder(2, 8, 7, 2, 5, int8=True)
    weights = state_of(encoder)
    with torch.no_grad():
        output = encoder(torch.linspace(-1, 1, 48).view(2, 3, 8), None)
    return {"output": output, "weights": weights}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "adam": train,
    "offload": partial(train, bmt.optim.AdamOffloadOptimizer, weight_decay=0.1),
    "torch adamw": partial(train, torch.optim.AdamW, weight_decay=0.1),
    "micro batches": partial(train, micro_batches=2),
    "bf16": partial(train, dtype=torch.bfloat16),
    "fp16": partial(train, dtype=torch.float16, loss_scale=256.0),
    "norms": norms_of_all_orders,
    "initialise again": initialise_again,
    "evaluate": evaluate_and_train_again,
    "frozen": train_frozen,
    "first block": run_first_block_only,
    "8 bits": evaluate_8_bits,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"use_checkpoint": True},
    "zero 2": {"zero_level": 2},
    "compiled": {"compile": True},
    "compiled, lean": {"compile": True, "activation_budget": 0.3},
}
# Each setting with the scenarios that it could make a difference to.
PAIRS = [("plain", name) for name in SCENARIOS]
PAIRS += [(setting, name) for setting in ("recomputed", "zero 2") for name in ("fp16", "evaluate", "first block")]
PAIRS += [(setting, "evaluate") for setting in ("compiled", "compiled, lean")]


def check_collectives() -> None:
    rank, size = bmt.rank(), bmt.world_size()
    x = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    results = {
        "sum": ([3.0, 4.0], [1.0, 1.0]),
        "avg": ([1.5, 2.0], [0.5, 0.5]),
        "max": ([2.0, 2.0], [float(rank == 1), 1.0]),
        "min": ([1.0, 2.0], [float(rank == 0), 1.0]),
        "prod": ([2.0, 4.0], [2.0 / (1 + rank), 2.0]),
    }
    op: Any
    for op, (value, gradient) in results.items():
        reduced = bmt.distributed.all_reduce(x, op)
        (found,) = torch.autograd.grad(reduced.sum(), x)
        assert (reduced.tolist(), found.tolist()) == (value, gradient), op
    gathered = bmt.distributed.all_gather(x)
    assert gathered.tolist() == [[1.0, 2.0], [2.0, 2.0]]
    (found,) = torch.autograd.grad((gathered * torch.tensor([[1.0], [10.0]])).sum(), x)
    assert found.tolist() == [10.0**rank] * 2
    sent = bmt.distributed.broadcast(x, 1)
    assert sent.tolist() == [2.0, 2.0]
    (found,) = torch.autograd.grad(sent.sum(), x)
    assert found.tolist() == ([2.0, 2.0] if rank == 1 else [0.0, 0.0])
    assert bmt.distributed.all_reduce(torch.tensor([5, 2]), "avg").tolist() == [5, 2]
    assert bmt.distributed.all_gather(torch.tensor([rank == 0])).tolist() == [[True], [False]]
    assert bmt.distributed.all_reduce(torch.tensor(4e4, dtype=torch.float16), "avg").item() == 4e4
    assert bmt.distributed.all_reduce(torch.rand(3, 4).t() * 0 + rank).tolist() == [[1.0] * 3] * 4
    assert bmt.gather_result(torch.arange(rank + 1)).tolist() == [0, 0, 1]
    assert bmt.gather_result(torch.zeros(rank, 2)).shape == (size - 1, 2)
    bmt.print_rank("printed once", rank=1)


def check_overflow() -> None:
    """An overflow on one process skips the step on all."""
    model = build(torch.float16)
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), scale=128.0)
    before = [bmt.current_engine().local(each).clone() for each in model.parameters()]
    loss = model(batch(0)).float().square().mean() * (float("inf") if bmt.rank() == 1 else 1.0)
    optimizer.loss_scale(loss).backward()
    assert not bmt.optim_step(optimizer)
    assert optimizer.scale == 64
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, bmt.current_engine().local(parameter))


def check_strayed_processes() -> None:
    """Weights outside blocks are rank 0's, also if another process drew other ones."""
    torch.manual_seed(bmt.rank())
    model = Model()
    optimizer = bmt.optim.AdamOptimizer(model.parameters())
    model(batch(0)).square().mean().backward()
    bmt.optim_step(optimizer)
    for name in ("embedding.weight", "plain.weight", "plain.bias"):
        first, second = bmt.distributed.all_gather(model.get_parameter(name).detach())
        assert torch.equal(first, second), name


def check_shards() -> None:
    """Each process holds about half of the blocks' weights, gradients and optimizer states, and says which."""
    engine = bmt.current_engine()
    model = build()
    for parameter, whole in zip(model.parameters(), state_of_all(model), strict=True):
        held = engine.held_range(parameter)
        assert engine.whole_shape(parameter) == whole.shape
        assert torch.equal(engine.local(parameter).flatten(), whole.flatten()[held.start : held.stop])
        assert torch.equal(engine.whole(parameter, engine.part(parameter, whole)), whole)
        assert engine.replicated(parameter) == (not isinstance(parameter, DTensor))
    optimizer = bmt.optim.AdamOptimizer(model.parameters())
    model(batch(0)).sum().backward()
    bmt.optim_step(optimizer)
    total = here = 0
    for parameter in model.encoder.layers.parameters():
        total += parameter.numel()
        local = engine.local(parameter)
        here += local.numel()
        assert optimizer.state[parameter]["exp_avg"].shape == local.shape
    both = bmt.distributed.all_gather(torch.tensor(here)).tolist()
    assert sum(both) == total
    assert max(both) < 0.6 * total


class PartitionedEngine(FSDPEngine):
    """Partitions as BMTrain does in a block: parameters lie in one buffer, of which each process holds a half."""

    def hold(self, wholes: list[Tensor]) -> list[torch.nn.Parameter]:
        half = -(-sum(whole.numel() for whole in wholes) // 2)
        self.shapes, self.ranges = dict[Tensor, torch.Size](), dict[Tensor, range]()
        parameters: list[torch.nn.Parameter] = []
        offset = 0
        for whole in wholes:
            start, stop = (min(max(rank * half - offset, 0), whole.numel()) for rank in (self.rank, self.rank + 1))
            parameter = torch.nn.Parameter(whole.flatten()[start:stop].clone())
            self.shapes[parameter], self.ranges[parameter] = whole.shape, range(start, stop)
            parameters.append(parameter)
            offset += whole.numel()
        return parameters

    def held_range(self, parameter: Tensor) -> range:
        return self.ranges[parameter]

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        return self.shapes[parameter]

    def replicated(self, parameter: Tensor) -> bool:
        return False

    def adopt(self, parameters: Iterable[Tensor]) -> None:
        """Nothing to average."""


def partition_wholes(dtype: torch.dtype) -> list[Tensor]:
    """The first half ends within the second tensor; the fourth never has a gradient."""
    source = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=source).to(dtype) for shape in ((3, 4), (5, 3), (7,), (2,))]


def partition_gradients(dtype: torch.dtype, step: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=source).to(dtype) for shape in ((3, 4), (5, 3), (7,))]


def train_partitions() -> dict[str, Any]:
    """Steps, and the state both ways: gathered on rank 0 and loaded again, and moved shard by shard."""
    engine = PartitionedEngine(Place(bmt.rank(), bmt.rank(), bmt.world_size()))
    found = {}
    with bmt.use_engine(engine):
        for dtype in (torch.float32, torch.bfloat16):
            parameters = engine.hold(partition_wholes(dtype))
            optimizer = bmt.optim.AdamOptimizer(parameters, lr=1e-2)
            for step in range(2):
                for parameter, whole in zip(parameters, partition_gradients(dtype, step), strict=False):
                    # As under BMTrain, where nothing is held there is no gradient.
                    parameter.grad = engine.part(parameter, whole).clone() if parameter.numel() else None
                optimizer.step()
            state: dict[str, Any] = optimizer.state_dict()
            assert bool(state["state"]) == (engine.rank == 0)
            box = [state]
            torch.distributed.broadcast_object_list(box, 0)
            state = box[0]
            gathered, sharded = (bmt.optim.AdamOptimizer(parameters) for _ in range(2))
            gathered.load_state_dict(state)
            held = {(shard.index, shard.name): shard for shard in optimizer.shards()}
            sharded.load_shards(optimizer.options(), partial(held_part, held))
            assert {shard.index for shard in optimizer.shards()} == ({0, 1} if engine.rank == 0 else {1, 2})
            for restored in (gathered, sharded):
                again = {(shard.index, shard.name): shard for shard in restored.shards()}
                assert again.keys() == held.keys()
                for key, shard in held.items():
                    assert (again[key].start, again[key].shape) == (shard.start, shard.shape)
                    assert torch.equal(again[key].read(), shard.read()), key
            found[str(dtype)] = {
                "state": state,
                "weights": [engine.whole(parameter, parameter.detach()) for parameter in parameters],
                "again": gathered.state_dict(),
            }
    return found


def held_part(shards: dict[tuple[int, str], Shard], index: int, name: str, part: range) -> Tensor | None:
    if (shard := shards.get((index, name))) is None:
        return None
    assert (shard.start, shard.size) == (part.start, len(part))
    return shard.read()


def main(folder: Path) -> None:
    # Without the minutes of a C++ compiler; the second divides graphs as the compiler does.
    torch.compile = partial(torch.compile, backend="aot_eager")
    divide = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    torch._dynamo.lookup_backend = lambda compiler_fn: divide
    bmt.init_distributed(seed=0)
    found: dict[str, Any] = {"engine": bmt.current_engine().name, "world_size": bmt.world_size()}
    for check in (check_collectives, check_overflow, check_strayed_processes, check_shards):
        check()
    for setting, name in PAIRS:
        bmt.init_distributed(seed=0, **SETTINGS[setting])
        found[f"{setting}: {name}"] = SCENARIOS[name]()
    bmt.init_distributed(seed=0)
    found["partitions"] = train_partitions()
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with bmt.uninitialized():
            model = build(dtype)
        bmt.load(model, folder / f"one {name}" / "model.pt")
        found[f"loaded {name}"] = state_of(model)
        found[f"resumed {name}"] = train(dtype=dtype, load_from=folder / f"one {name}", save_to=folder / f"two {name}")
    if bmt.rank() == 0:
        torch.save(found, folder / "found.pt")
    bmt.current_engine().shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
