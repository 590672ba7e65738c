"""Both engines on 1, 2 and 4 GPUs: curves, checkpoints, failures and the documented script. `run_gpu.py` runs it."""

import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from gpus import ENGINES, require
from tiny_encoder import write_encoder, write_task
from training_curves import FAMILIES, SHAPES, TOLERANCES, Curve, Job, reference

from model_center.engine import TorchEngine, use_engine

pytestmark = pytest.mark.gpu

PROCESSES = (1, 2, 4)
VARIANTS = {
    "kept activations, ZeRO 2": {"options": {"use_checkpoint": False, "zero_level": 2}},
    "recomputed": {"options": {"use_checkpoint": True}},
    "offload": {"offload": True},
}
QUICK_START = Path(__file__).with_name("quickstart_script.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@cache
def expected(family: str, dtype: str) -> Curve:
    with use_engine(TorchEngine(torch.device("cuda", 0), use_checkpoint=False)):
        return reference(family, dtype)


@cache
def trained(folder: Path, engine: str, processes: int) -> tuple[Job, dict[str, dict[str, Curve]]]:
    """One launch trains all models in all types."""
    job = Job(folder=str(folder / f"{engine}-{processes}"), engine=engine, dtypes=tuple(TOLERANCES))
    return job, job.launch(processes)


def launch_group(engine: str, processes: int) -> pytest.MarkDecorator:
    """Tests of one launch run in one worker of pytest-xdist, so that it is made once."""
    return pytest.mark.xdist_group(f"{engine} {processes}")


LAUNCHES = [
    pytest.param(engine, processes, marks=launch_group(engine, processes))
    for engine in ENGINES
    for processes in PROCESSES
]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("engine", "processes"), LAUNCHES)
def test_curves_follow_plain_pytorch(folder: Path, engine: str, processes: int, family: str, dtype: str) -> None:
    require(engine, processes)
    _, curves = trained(folder, engine, processes)
    differences = curves[family][dtype].differences(expected(family, dtype))
    assert max(differences.values()) < TOLERANCES[dtype], differences


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_settings_do_not_change_the_curves(folder: Path, engine: str, variant: str) -> None:
    require(engine, 2)
    job = Job(
        folder=str(folder / f"{engine} {variant}"),
        engine=engine,
        families=SHAPES,
        dtypes=("float32", "float16"),
        **VARIANTS[variant],  # type: ignore[arg-type]
    )
    for family, by_dtype in job.launch(2).items():
        for dtype, curve in by_dtype.items():
            differences = curve.differences(expected(family, dtype))
            assert max(differences.values()) < TOLERANCES[dtype], (family, dtype, differences)


@pytest.mark.parametrize("reader", [(engine, processes) for engine in ENGINES for processes in (1, 4)], ids=str)
@pytest.mark.parametrize(
    "writer",
    [pytest.param((engine, 2), marks=launch_group(engine, 2), id=f"{engine}-2") for engine in ENGINES],
)
def test_any_engine_loads_the_checkpoints_of_any_other(
    folder: Path, writer: tuple[str, int], reader: tuple[str, int]
) -> None:
    require(*writer)
    require(*reader)
    written, _ = trained(folder, *writer)
    name = f"{writer[0]}-{writer[1]} read by {reader[0]}-{reader[1]}"
    again = Job(folder=str(folder / name), engine=reader[0], dtypes=written.dtypes, steps=0, start=written.folder)
    again.launch(reader[1])
    for family in FAMILIES:
        for dtype in again.dtypes:
            before, after = (torch.load(job.checkpoint(family, dtype), weights_only=True) for job in (written, again))
            assert before.keys() == after.keys()
            assert all(torch.equal(after[key], tensor) for key, tensor in before.items()), (family, dtype)


@pytest.mark.parametrize(
    ("end", "told"), [("raises", "ValueError: the data of rank 1 is broken"), ("is killed", "Signal 9 (SIGKILL)")]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_when_one_process_fails_all_end_and_its_error_is_told(engine: str, end: str, told: str) -> None:
    require(engine, 2)
    script = Path(__file__).with_name("failing_process.py")
    done = torchrun(2, script, engine, end, timeout=180)
    assert done.returncode != 0
    root_cause = done.stderr.split("Root Cause (first observed failure):")[-1]
    assert told in root_cause, done.stderr
    assert "rank      : 1" in root_cause


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_documented_script(engine: str, processes: int, tmp_path: Path) -> None:
    require(engine, processes)
    model = write_encoder(tmp_path / "model", position_size=512, half=True)
    data = write_task(tmp_path / "data", train=64 * processes * 3, dev=33)
    done = torchrun(processes, QUICK_START, str(model), str(data), engine=engine)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^loss: \d+\.\d{4} \|", done.stdout, re.M)) == 5 * 3
    assert len(re.findall(r"^accuracy: \d+\.\d\d$", done.stdout, re.M)) == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_bmtrain_and_torch_are_not_mixed(engine: str) -> None:
    require("bmtrain", 1)
    script = (
        "import bmtrain\nfrom model_center import engine\n"
        "bmtrain.init_distributed()\n"
        "engine.init_distributed(engine='ENGINE')\nprint(engine.current_engine().name)"
    )
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script.replace("ENGINE", engine)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())},
    )
    if engine == "bmtrain":
        assert done.stdout.endswith("bmtrain\n"), done.stderr
    else:
        assert "`engine` must be 'bmtrain', which already runs in this process, but is 'torch'" in done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
    return port


def torchrun(
    processes: int, script: Path, *arguments: str, engine: str = "torch", timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "MODEL_CENTER_ENGINE": engine},
    )
