"""Runs that repeat bit by bit: what is set for them and put back, and that they do."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model_center import engine as bmt
from model_center.engine import TorchEngine, current_engine, use_engine
from model_center.layer import AttentionMask, Embedding, Encoder, RelativePositionEmbedding
from model_center.layer.attention_kernels import Packing, Scoring, attend_packed_reference

CPU = torch.device("cpu")
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, cpu_engine: None) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    yield
    bmt.init_distributed()


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def settings() -> tuple[Any, ...]:
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *algorithms, torch.backends.cudnn.benchmark, os.environ.get(VARIABLE)


DETERMINISTIC = (True, False, False, ":4096:8")


def test_use_engine_puts_everything_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv(VARIABLE, ":0:0")
    torch.use_deterministic_algorithms(True, warn_only=True)

    def fail() -> None:
        with use_engine(TorchEngine(CPU, deterministic=True)):
            assert settings() == DETERMINISTIC
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings() == (True, True, True, ":0:0")
    torch.use_deterministic_algorithms(False)


def test_settings_are_put_back_before_a_process_ends() -> None:
    """Later, modules are gone, and what puts settings back would fail."""
    script = """
import atexit, torch
atexit.register(lambda: print(torch.are_deterministic_algorithms_enabled()))  # runs after what is registered later
from model_center import engine
engine.init_distributed(deterministic=True)
print(torch.are_deterministic_algorithms_enabled())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\nFalse\n", "")


def test_a_repeatable_workspace_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    with use_engine(TorchEngine(CPU, deterministic=True)):
        assert os.environ[VARIABLE] == ":16:8"


def test_init_distributed_sets_it_until_it_is_called_again() -> None:
    before = settings()
    for _ in range(2):
        bmt.init_distributed(deterministic=True)
        assert settings() == DETERMINISTIC
        assert current_engine().deterministic
    bmt.init_distributed()
    assert settings() == before
    assert not current_engine().deterministic


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    with (
        use_engine(TorchEngine(CPU, deterministic=True)),
        pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"),
    ):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([2.0, 3.0]))


def step(seed: int) -> list[Tensor]:
    """Gradients that are sums over many rows: of embeddings, relative biases, packed attention; and dropout."""
    bmt.init_distributed(seed=seed, deterministic=True, use_checkpoint=True)
    embedding, bias = Embedding(7, 32), RelativePositionEmbedding(2, bidirectional=True)
    encoder = Encoder(1, 32, 64, 2, 16, pos_bias_type="relative", dropout_p=0.1)
    ids = torch.randint(7, (16, 64))
    hidden = encoder(embedding(ids), AttentionMask(lengths=torch.arange(16) + 49), bias.by_distance(64, 64))
    packing = Packing(cumulative=torch.tensor([0, 300, 700, 1024], dtype=torch.int32), longest=400)
    rows = hidden.reshape(1024, 2, 16)
    mixed = attend_packed_reference(rows, rows, rows, packing, Scoring()).reshape(1024, 32)
    loss = bmt.loss.FusedCrossEntropy()(embedding.projection(mixed), ids.flatten())
    loss.backward()
    return [loss.detach(), *(each.grad for part in (embedding, bias, encoder) for each in part.parameters())]


@pytest.mark.usefixtures("four_threads")
def test_runs_repeat_bit_by_bit_with_several_threads() -> None:
    first, second, other = step(1), step(1), step(2)
    assert len(first) > 10
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
