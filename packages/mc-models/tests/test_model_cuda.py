"""Models on a GPU: the original's outputs in the engine's half type, T5 in fp16, cached decoding, padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import assert_equal
from own_families import ROWS, Row, batch

from model_center.engine import TorchEngine, use_engine
from model_center.model import T5, families

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _engine() -> Any:
    with use_engine(TorchEngine(torch.device("cuda"))):
        yield


def to_cuda(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in values.items()}


@pytest.mark.parametrize("family", families)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_golden_logits(family: str, precision: str, tolerance: float, golden_model: Callable[[str], Path]) -> None:
    folder = golden_model(f"{family}_{precision}")
    record = torch.load(folder / "golden.pt", weights_only=True)
    model: Any = families[family].from_pretrained(folder)  # `half` in its configuration means fp16 here
    with torch.no_grad():
        logits = model(**to_cuda(record["inputs"]), return_logits=True)
    assert logits.dtype == (torch.float16 if precision == "fp16" else torch.float32)
    valid = record["valid"].bool()
    logits, expected = logits.float().cpu()[valid], record["logits"][valid]
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(logits), finite)
    assert_equal(logits[finite], expected[finite], tolerance)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_half_type_and_cache(row: Row) -> None:
    model = row.make(half=True)
    assert model.input_embedding.weight.dtype == torch.float16
    ids, length = batch(0, [7, 4], 7)
    with torch.no_grad():
        output = row.call(model, ids.cuda(), length.cuda(), use_cache=row.causal)
    assert output.last_hidden_state.dtype == torch.float16
    assert torch.isfinite(output.last_hidden_state).all()


def test_t5_is_divided_by_default(tmp_path: Path) -> None:
    plain = next(row for row in ROWS if row.name == "t5").make(tied=True, dtype=torch.float32)
    plain.export_huggingface(tmp_path)
    half = T5.from_pretrained(tmp_path)
    assert half.config.residual_scale == 100
    ids = torch.arange(1, 9, device="cuda")[None]
    with torch.no_grad():
        expected, logits = (model.eval()(ids, decoder_input_ids=ids, return_logits=True) for model in (plain, half))
    assert torch.isfinite(logits).all()
    assert_equal(logits.float(), expected, 2e-2)
