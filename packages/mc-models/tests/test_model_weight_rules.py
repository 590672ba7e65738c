"""Weight rules run both ways, explain every tensor, and do not change names that checkpoints already have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_families import ROWS, Row
from torch import Tensor

from model_center.model import operations
from model_center.model.operations import Duplicate, Operation, PadRows, Scale, Split, Transpose
from model_center.model.rules import Rule, expand
from model_center.model.transfer import Exported

FROZEN: dict[str, list[str]] = json.loads((Path(__file__).parent / "frozen_names.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "operations",
    [
        (Transpose(),),
        (Split(3),),
        (PadRows(2),),
        (Scale(0.25),),
        (Duplicate(2),),
        (Duplicate(2, made_up_for=True),),
        (Transpose(), Split(2)),
        (PadRows(1), Scale(4.0)),
    ],
    ids=str,
)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), vector=st.booleans())
def test_operations_are_reversible(operations: tuple[Operation, ...], rows: int, columns: int, vector: bool) -> None:
    theirs = torch.randn(12 * rows) if vector else torch.randn(12 * rows, 12 * columns)
    tensors: list[Tensor] = [theirs]
    for operation in operations:
        tensors = operation.to_ours(tensors)
    for operation in reversed(operations):
        tensors = operation.to_theirs(tensors)
    assert len(tensors) == 1
    assert torch.equal(tensors[0], theirs)


def test_what_operations_do() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    assert torch.equal(Transpose().to_ours([matrix])[0], torch.tensor([[0.0, 3], [1, 4], [2, 5]]))
    assert [part.tolist() for part in Split(2).to_ours([matrix])] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert PadRows(1).to_ours([matrix])[0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]
    assert Scale(0.5).to_ours([matrix])[0].tolist() == [[0, 0.5, 1], [1.5, 2, 2.5]]
    with pytest.raises(ValueError, match="first dimension must be a multiple of 3, but is 2"):
        Split(3).to_ours([matrix])
    with pytest.raises(ValueError, match="must be equal, because the other side has only one tensor"):
        Duplicate(2).to_theirs([matrix, matrix + 1])


def test_patterns() -> None:
    rules = [
        Rule("encoder.layers.{i}.a.*", "layer.{i}.b.*"),
        Rule("encoder.layers.{i+1}.c", "layer.{i}.d", fallback="layer.{i}.e"),
        Rule(("decoder.layers.{i}.q", "decoder.layers.{i}.k"), ("x.{last}", "y")),
    ]
    rows = [(row.ours, row.theirs, row.fallback) for row in expand(rules, {"encoder": 2, "decoder": 1})]
    assert rows == [
        (("encoder.layers.0.a.weight",), ("layer.0.b.weight",), None),
        (("encoder.layers.0.a.bias",), ("layer.0.b.bias",), None),
        (("encoder.layers.1.a.weight",), ("layer.1.b.weight",), None),
        (("encoder.layers.1.a.bias",), ("layer.1.b.bias",), None),
        (("encoder.layers.1.c",), ("layer.0.d",), "layer.0.e"),
        (("decoder.layers.0.q", "decoder.layers.0.k"), ("x.0", "y"), None),
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_names_are_those_of_existing_checkpoints(row: Row) -> None:
    names = {re.sub(r"\.layers\.\d+\.", ".layers.{i}.", name) for name in row.make(**_as_saved(row)).state_dict()}
    assert sorted(names) == FROZEN[row.name.partition("-")[0]]


def _as_saved(row: Row) -> dict[str, object]:
    """The original's golden GPT-2 has no projection of its own, the others have one."""
    return {"tied": row.name == "gpt2"}


@pytest.mark.parametrize("row", [row for row in ROWS if not row.name.startswith("cpm")], ids=lambda row: row.name)
def test_every_tensor_has_a_rule(row: Row) -> None:
    for changes in ({"tied": True}, {"tied": False, "proj_bias": row.name not in ("gpt2", "t5")}, {"cls_head": 2}):
        model = row.make(**changes)
        table = model.table(model.config)
        covered = {name for line in expand(table.rules, model.config.depths) for name in line.ours}
        unexplained = model.state_dict().keys() - covered
        if table.classifier is None:
            unexplained -= {"cls_projection.weight", "cls_projection.bias"}
        assert not unexplained


def gptj_with_norms(scale: Tensor) -> Any:
    """A random GPT-J whose last norm before attention has the given scale; other norms differ as well."""
    model = next(row for row in ROWS if row.name == "gptj").make()
    with torch.no_grad():
        model.encoder.layers[1].self_att.layernorm_before_attention.weight.copy_(scale)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layers_that_read_equal_norms_are_exported_as_they_are(dtype: torch.dtype) -> None:
    model = gptj_with_norms(torch.ones(16)).to(dtype)
    with torch.no_grad():
        for layer in model.encoder.layers:
            for name, parameter in layer.ffn.layernorm_before_ffn.named_parameters():
                parameter.copy_(layer.self_att.layernorm_before_attention.get_parameter(name))
            layer.ffn.ffn.w_in.w.bias[0] = -0.0  # which adding 0 would turn into 0
    state, exported = model.state_dict(), model.exported(model.state_dict())[1]
    for number in range(2):
        for part in ("weight", "bias"):
            ours = state[f"encoder.layers.{number}.ffn.ffn.w_in.w.{part}"]
            theirs = exported[f"transformer.h.{number}.mlp.fc_in.{part}"]
            assert theirs.numpy().tobytes() == ours.numpy().tobytes()


def test_folded_layers_are_exact_where_they_are_computed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gptj_with_norms(torch.linspace(0.5, 2, 16))
    whole = dict(model.exported(model.state_dict())[1])
    monkeypatch.setattr(operations, "_PIECE_ELEMENTS", 50)  # three rows, of 24
    pieces = model.exported(model.state_dict())[1]
    name, layer = "transformer.h.1.mlp.fc_in", model.encoder.layers[1]
    ratio = layer.ffn.layernorm_before_ffn.weight.double() / torch.linspace(0.5, 2, 16).double()
    assert torch.equal(pieces[f"{name}.weight"], (layer.ffn.ffn.w_in.w.weight * ratio).float())
    assert all(torch.equal(pieces[key], tensor) for key, tensor in whole.items())


def test_tensors_that_the_other_side_cannot_hold(tmp_path: Path) -> None:
    by_name = {row.name: row for row in ROWS}
    with pytest.raises(ValueError, match="no place for these tensors: more"):
        Exported({"more": torch.zeros(1)}, [], str)
    with pytest.raises(
        ValueError,
        match=r"cannot export encoder\.layers\.1\.ffn\.ffn\.w_in\.w\.weight and .*attention\.weight and .*ffn\.weight:"
        r" .*must not be 0 where the second's is not, but is at 2 of 16 positions, the first of them 5; set",
    ):
        gptj_with_norms(torch.tensor([1.0] * 5 + [0.0, 0.0] + [1.0] * 9)).export_huggingface(tmp_path / "gptj")
    with pytest.raises(
        ValueError, match=r"w_in\.w\.weight and .*must stay within the range of torch\.float16, but does"
    ):
        gptj_with_norms(torch.full((16,), 1e-7)).half().export_huggingface(tmp_path / "gptj")
    with pytest.raises(ValueError, match="Transformers' 'gpt2' models cannot express length_scale=True"):
        by_name["gpt2"].make(length_scale=True).export_huggingface(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"cannot express .*proj_bias=True"):
        by_name["gpt2"].make(tied=False).export_huggingface(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"no T5 with a classification head \(`cls_head`\)"):
        by_name["t5"].make(cls_head=2).export_huggingface(tmp_path / "t5")
    with pytest.raises(ValueError, match="Transformers has no counterpart of CPM1"):
        by_name["cpm1"].make().export_huggingface(tmp_path / "cpm1")
    assert not list(tmp_path.iterdir())
