"""Starting several processes, what is said when that goes wrong, and how they fail."""

import os
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from model_center import engine as bmt
from model_center.engine import TorchEngine, current, current_engine, launch, use_engine
from model_center.engine.launch import Place

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.fixture(autouse=True)
def own_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test starts is forgotten after it."""
    for name in ("_current", "_chosen", "_default"):
        monkeypatch.setattr(current, name, None)
    with use_engine(TorchEngine(torch.device("cpu"))):
        yield


def set_environment(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name in (*TWO, "MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**TWO, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None}, "`RANK` must be set .* start them with torchrun"),
        ({"RANK": "2"}, "`RANK` must be from 0 to WORLD_SIZE - 1 = 1, but is 2"),
        ({"RANK": "first"}, "`RANK` must be a whole number, but is 'first'"),
        ({"WORLD_SIZE": "two"}, "`WORLD_SIZE` must be a whole number, but is 'two'"),
        ({"WORLD_SIZE": "0"}, "`WORLD_SIZE` must be at least 1, but is 0"),
        ({"MASTER_ADDR": None}, r"could not meet all of `WORLD_SIZE` = 2 .* \(MASTER_ADDR is not set\)"),
    ],
)
def test_a_broken_environment_is_told(
    changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, **changes)
    with pytest.raises(ValueError, match=message):
        bmt.init_distributed()


def test_a_port_in_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        set_environment(monkeypatch, MASTER_PORT=str(port := taken.getsockname()[1]))
        with pytest.raises(ValueError, match=f"`MASTER_PORT` must be a free port, .* listens at localhost:{port}"):
            bmt.init_distributed()


def test_processes_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "JOIN_TIMEOUT", timedelta(seconds=1))
    with socket.create_server(("", 0)) as probe:
        port = probe.getsockname()[1]
    set_environment(monkeypatch, MASTER_PORT=str(port))
    with pytest.raises(
        ValueError, match=r"could not meet all of `WORLD_SIZE` = 2 processes at localhost:\d+ within 1 s"
    ):
        bmt.init_distributed()


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "`WORLD_SIZE` must be the number of processes, but is 3, and ranks 1, 2 have not come within 1 s"),
        (1, "`RANK` must differ between processes, but two of them have 1"),
    ],
)
def test_a_world_size_or_rank_that_torchrun_did_not_give_is_told(
    rank: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's own store is there already, so that only the roll call tells."""
    monkeypatch.setattr(launch, "JOIN_TIMEOUT", timedelta(seconds=1))
    store = torch.distributed.TCPStore("localhost", 0, is_master=True)  # type: ignore[attr-defined] # torch exports it
    store.set("model_center/0/rank 1", "1")
    if rank == 0:
        store.delete_key("model_center/0/rank 1")
    set_environment(
        monkeypatch, MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True", WORLD_SIZE="3", RANK=str(rank)
    )
    with pytest.raises(ValueError, match=message):
        bmt.init_distributed()


def test_more_processes_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device_of(Place(5, 1, 8)) == torch.device("cuda", 1)
    with pytest.raises(
        ValueError, match=r"`LOCAL_RANK` must be below the number of GPUs, 2, but is 2: .*hide all GPUs"
    ):
        launch.device_of(Place(2, 2, 4))


def test_what_is_wrong_with_the_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`engine` must be one of torch, bmtrain, but is 'deepspeed'"):
        bmt.init_distributed(engine="deepspeed")  # type: ignore[arg-type]
    monkeypatch.setenv("MODEL_CENTER_ENGINE", "jax")
    with pytest.raises(ValueError, match="`MODEL_CENTER_ENGINE` must be one of torch, bmtrain, but is 'jax'"):
        bmt.init_distributed()
    monkeypatch.setenv("MODEL_CENTER_ENGINE", "bmtrain")
    monkeypatch.setattr(current, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"'bmtrain' needs the package bmtrain, which is not installed: .* use the engi"
    ):
        bmt.init_distributed()
    monkeypatch.setattr(current, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="the engine 'bmtrain' needs a GPU, but PyTorch finds none here"):
        bmt.init_distributed()
    bmt.init_distributed(engine="torch")
    set_environment(monkeypatch, MASTER_PORT="1")
    with pytest.raises(ValueError, match="`zero_level` must be 2 or 3, but is 1"):
        bmt.init_distributed(engine="torch", zero_level=1)  # type: ignore[arg-type]


def test_two_engines_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bmt.init_distributed()
    bmtrain = types.ModuleType("bmtrain.global_var")
    vars(bmtrain)["config"] = {"initialized": True}
    monkeypatch.setitem(sys.modules, "bmtrain.global_var", bmtrain)
    with pytest.raises(
        ValueError, match=r"bmtrain.init_distributed\(\) was called after init_distributed\(\) had chosen"
    ):
        current_engine()
    with pytest.raises(
        ValueError, match="`engine` must be 'bmtrain', which already runs in this process, but is 'torch'"
    ):
        bmt.init_distributed(engine="torch")
    with use_engine(TorchEngine(torch.device("cpu"))) as engine:  # a test may do what it likes
        assert current_engine() is engine
    bmtrain.config["initialized"] = False
    current_engine().world_size = 2
    with pytest.raises(
        ValueError, match="`engine` must be 'torch', which already runs in this process, but is 'bmtrai"
    ):
        bmt.init_distributed(engine="bmtrain")


def test_a_script_that_has_initialised_bmtrain_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Engine(TorchEngine):
        name = "bmtrain"

        def __init__(self, **settings: Any) -> None:
            super().__init__(torch.device("cpu"))
            made.append(settings)

    modules: dict[str, dict[str, Any]] = {"bmtrain.global_var": {"config": {"initialized": True}}}
    modules["model_center.engine.bmtrain_engine"] = {"BMTrainEngine": Engine}
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(current, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(current, "_current", None)
    engine = current_engine()
    assert (engine.name, engine is current_engine(), made) == ("bmtrain", True, [{"seed": 0}])
    settings: dict[str, Any] = {
        "seed": 7,
        "use_checkpoint": False,
        "zero_level": 2,
        "compile": True,
        "activation_budget": None,
        "deterministic": False,
    }
    bmt.init_distributed(**settings)
    assert (current_engine().name, made[1:]) == ("bmtrain", [settings])


@pytest.mark.parametrize(
    ("end", "expected"),
    [("raises", "ValueError: the data of rank 1 is broken"), ("is killed", "Signal 9 (SIGKILL)")],
)
def test_when_one_process_fails_all_end_and_its_error_is_told(end: str, expected: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # torchrun looks after its processes so rarely that the other one has lost its partner long before.
    launcher += ["--monitor-interval", "2"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("failing_rank.py")), end],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode != 0
    root_cause = done.stderr.split("Root Cause (first observed failure):")[-1]
    assert expected in root_cause, done.stderr
    assert "rank      : 1" in root_cause
