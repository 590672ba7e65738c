"""Loading fills every parameter once: from the checkpoint, or as a fresh model does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from own_families import ROWS, Row
from safetensors.torch import load_file, save_file

from model_center.engine import Constant, Normal, uninitialized
from model_center.model import BaseModel, Bert, families


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN, or the largest number of an integer type."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def counted_fillings() -> Iterator[list[torch.Size]]:
    """The shapes of what initialisers would fill."""
    filled: list[torch.Size] = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Normal, Constant):
            patch.setattr(kind, "__call__", lambda initializer, tensor: filled.append(tensor.shape))
        yield filled


def family(row: Row) -> type[BaseModel]:
    return families[row.name.partition("-")[0]]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_is_filled_that_is_loaded(row: Row, int8: bool, tmp_path: Path) -> None:
    saved = row.make(int8=int8)
    saved.save_pretrained(tmp_path)
    generator = torch.get_rng_state()
    with counted_fillings() as filled:
        loaded = family(row).from_pretrained(tmp_path)
        assert filled == []
        assert torch.equal(torch.get_rng_state(), generator)
        family(row)(saved.config)
        assert len(filled) >= len(list(saved.parameters()))  # so that an initialiser that is called is seen
    assert_same(loaded.state_dict(), saved.state_dict())


def test_poison_is_seen() -> None:
    with uninitialized():
        model = Bert(ROWS[0].make().config)
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_a_head_that_is_absent_is_that_of_a_fresh_model(tmp_path: Path) -> None:
    saved: Bert = ROWS[0].make()
    saved.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if not name.startswith("lm_head")}, path)
    torch.manual_seed(7)
    fresh = Bert(saved.config).state_dict()
    torch.manual_seed(7)
    loaded = Bert.from_pretrained(tmp_path).state_dict()
    expected = {name: (fresh if name.startswith("lm_head") else saved.state_dict())[name] for name in loaded}
    assert sum(name.startswith("lm_head") for name in expected) > 2
    assert_same(loaded, expected)
