"""Raw text, tokens, training in several processes, checkpoint, evaluation: all packages together."""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pretraining_script
import pytest
import torch
from gpus import ENGINES, require
from tiny_encoder import WORDS, write_encoder

from model_center.engine import TorchEngine, use_engine
from model_center.model import GPT2, load_model
from model_center.tools.cli import main


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with use_engine(TorchEngine(torch.device("cpu"))):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of a language in which each word follows the one before it in the alphabet of `WORDS`."""
    folder = tmp_path_factory.mktemp("pretraining")
    with use_engine(TorchEngine(torch.device("cpu"))):
        write_encoder(folder / "tokenizer")
    generator = random.Random(0)
    for name, documents in (("train_1", 60), ("train_2", 36), ("dev_1", 15)):
        lines = []
        for _ in range(documents):
            start, length = generator.randrange(len(WORDS)), generator.randint(5, 20)
            lines.append(" ".join(WORDS[(start + offset) % len(WORDS)] for offset in range(length)))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        options = f"tokenize --layout single --output {folder}/tokens/{name} --tokenizer {folder}/tokenizer --workers 1"
        assert main([*options.split(), "--input", str(folder / f"{name}.txt")]) == 0
    return folder


def train(folder: Path, to: Path, processes: int, **environment: str) -> list[float]:
    """The losses on the dev set before training and after each epoch."""
    for part in ("tokenizer", "tokens"):
        shutil.copytree(folder / part, to / part)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, pretraining_script.__file__, str(to)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^dev loss (\S+)$", done.stdout, re.M)]


def check(losses: list[float], to: Path) -> None:
    assert len(losses) == 1 + pretraining_script.EPOCHS
    assert losses[-1] < 0.5 * losses[0]
    model = load_model(to / "model")
    assert isinstance(model, GPT2)
    again = pretraining_script.evaluate(model, pretraining_script.samples(to, "dev"))
    assert again == pytest.approx(losses[-1], rel=1e-4)


def test_from_raw_text_to_an_evaluated_checkpoint_in_two_processes(folder: Path, tmp_path: Path) -> None:
    check(train(folder, tmp_path, 2, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""), tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_on_gpus(folder: Path, tmp_path: Path, engine: str, processes: int) -> None:
    require(engine, processes)
    check(train(folder, tmp_path, processes, MODEL_CENTER_ENGINE=engine), tmp_path)
