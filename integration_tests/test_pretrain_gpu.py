"""On GPUs, a pre-training run that is killed or stopped goes on as if nothing had happened, on either engine.

The same on the CPU, and more of it: test_pretrain_resume.py.
"""

import re
import signal
from pathlib import Path

import pytest
from gpus import ENGINES, require
from pretraining_runs import RESHARDED, STEPS, Ended, assert_resharded, assert_same_run, run, run_whole, write_inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("pretrain-gpu"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Ended:
    """A run on one GPU."""
    return run_whole(folder, "alone", *RESHARDED)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_goes_on_bit_by_bit(folder: Path, engine: str) -> None:
    require(engine, 1)
    options = (f"--engine.name={engine}", "--engine.deterministic=true", "--model.precision=bf16", "--resume=auto")
    straight = run_whole(folder, f"{engine}-straight", *options)
    assert "bfloat16 on cuda" in straight.text
    killed = run(folder, f"{engine}-killed", *options, stop=STEPS // 2 + 5, number=signal.SIGKILL)
    assert killed.codes == [-signal.SIGKILL]
    assert re.search(r"resumed after step (90|100) ", run_whole(folder, f"{engine}-killed", *options).text)
    assert_same_run(folder, f"{engine}-straight", f"{engine}-killed")


@pytest.mark.parametrize(
    "engines", [["torch"] * 4, ["bmtrain"] * 4, ["torch", "bmtrain", "torch", "bmtrain"]], ids="-".join
)
def test_other_numbers_of_gpus_and_engines_train_on_the_same_samples(
    folder: Path, engines: list[str], request: pytest.FixtureRequest
) -> None:
    for engine in engines:
        require(engine, 4)
    expected: Ended = request.getfixturevalue("alone")
    assert_resharded(folder, "alone", "-".join(engines), expected, engines)
