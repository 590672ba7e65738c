"""PyTorch in two processes does what it does in one: weights, training, checkpoints, collectives."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp_scenarios
import pytest
import torch
from fsdp_scenarios import PAIRS, SCENARIOS, build, partition_gradients, partition_wholes, state_of, train

from model_center import engine as bmt
from model_center.engine import TorchEngine, use_engine

TOLERANCES = {"bf16": 2e-2, "bfloat16": 2e-2, "fp16": 2e-3}
pytestmark = pytest.mark.usefixtures("cpu_engine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has saved checkpoints, and then two have found everything."""
    folder = tmp_path_factory.mktemp("fsdp")
    with use_engine(TorchEngine(torch.device("cpu"))):
        for dtype in ("float32", "bfloat16"):
            train(dtype=getattr(torch, dtype), save_to=folder / f"one {dtype}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, fsdp_scenarios.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("printed once") == 1
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    assert (found["engine"], found["world_size"]) == ("torch", 2)
    return found


def compare(found: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("setting", "name"), PAIRS)
def test_two_processes_do_what_one_does(found: dict[str, Any], setting: str, name: str) -> None:
    compare(found[f"{setting}: {name}"], SCENARIOS[name](), TOLERANCES.get(name, 1e-5))


def test_fresh_weights_are_those_of_one_process_bit_for_bit(found: dict[str, Any]) -> None:
    weights = found["plain: initialise again"]
    model = build()
    compare(weights["first"], state_of(model), 0)
    bmt.init_parameters(model)
    compare(weights["second"], state_of(model), 0)
    assert not torch.equal(weights["first"]["embedding.weight"], weights["second"]["embedding.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_move_between_one_and_two_processes(found: dict[str, Any], folder: Path, dtype: str) -> None:
    saved_by_one = torch.load(folder / f"one {dtype}" / "model.pt", weights_only=True)
    compare(found[f"loaded {dtype}"], saved_by_one, 0)
    model = build(getattr(torch, dtype))
    bmt.load(model, folder / f"two {dtype}" / "model.pt")
    compare(state_of(model), found[f"resumed {dtype}"]["weights"], 0)
    assert list(found[f"loaded {dtype}"]) == list(model.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_with_another_number_of_processes(found: dict[str, Any], folder: Path, dtype: str) -> None:
    resumed = train(dtype=getattr(torch, dtype), load_from=folder / f"one {dtype}")
    compare(found[f"resumed {dtype}"], resumed, TOLERANCES.get(dtype, 1e-5))
    # And back: the masters and moments that two processes saved are whole, and their sequel is as close.
    state = torch.load(folder / f"two {dtype}" / "optimizers.pt", weights_only=True)["optimizers"][0]["state"]
    shapes = [tuple(parameter.shape) for parameter in build().parameters()]
    assert [tuple(state[index]["exp_avg"].shape) for index in range(len(shapes))] == shapes
    again = train(dtype=getattr(torch, dtype), load_from=folder / f"two {dtype}")
    assert again["losses"][-1] < resumed["losses"][-1] < train(dtype=getattr(torch, dtype))["losses"][-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partitions_that_cut_parameters_anywhere_have_the_state_of_one_process(
    found: dict[str, Any], dtype: torch.dtype
) -> None:
    parameters = [torch.nn.Parameter(whole) for whole in partition_wholes(dtype)]
    optimizer = bmt.optim.AdamOptimizer(parameters, lr=1e-2)
    for step in range(2):
        for parameter, gradient in zip(parameters, partition_gradients(dtype, step), strict=False):
            parameter.grad = gradient
        optimizer.step()
    partitioned = found["partitions"][str(dtype)]
    expected = optimizer.state_dict()
    for state in (partitioned["state"], partitioned["again"]):
        assert state["param_groups"] == expected["param_groups"]
        compare(state["state"], expected["state"], 1e-6)
    compare(partitioned["weights"], [parameter.detach() for parameter in parameters], 1e-6)
