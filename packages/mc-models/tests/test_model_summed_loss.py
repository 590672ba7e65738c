"""The summed loss against the plain cross entropy of all logits, in all families."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_families import ROWS, Row, batch
from torch import Tensor

from model_center.model import output_projection

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((row.name, {}) for row in ROWS),
    *((name, {"tied": not tied}) for name, tied in {"bert": True, "gpt2": True, "t5": False, "cpm1": False}.items()),
    ("bert", {"proj_bias": False}),
    ("bert", {"cls_head": 5}),
    ("gptj", {"cls_head": 5}),
    ("gpt2", {"length_scale": True}),
    ("cpm2", {"length_scale": True, "proj_bias": True}),
    ("t5", {"tied": True, "residual_scale": 10.0}),
]


def case(name: str, changes: dict[str, Any], labelled: float) -> tuple[Any, Tensor, Tensor]:
    """A float64 model, its hidden states and labels for a part of the positions."""
    row: Row = next(row for row in ROWS if row.name == name)
    model = row.make(dtype=torch.float64, **changes)
    ids, length = batch(0, [7, 4, 6], 7)
    hidden = row.call(model, ids, length).last_hidden_state
    labels = ids % (changes.get("cls_head") or 36)
    generator = torch.Generator().manual_seed(1)
    return model, hidden, labels.masked_fill(torch.rand(ids.shape, generator=generator) >= labelled, -100)


def gradients(loss: Tensor, model: Any, hidden: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss * 3, [hidden, *parameters], retain_graph=True, allow_unused=True)
    # Typed by autograd as never None, which unused parameters' gradients are.
    received: list[tuple[str, Tensor | None]] = list(zip(("hidden", *names), found, strict=True))
    return {name: gradient for name, gradient in received if gradient is not None}


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_loss_and_gradients(name: str, changes: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden, labels = case(name, changes, labelled=0.6)
    logits = model.logits(hidden)
    monkeypatch.setattr(output_projection, "PIECE_SCORES", rows * logits.shape[-1])
    monkeypatch.setattr(output_projection, "_EXACT_SCORES", 3 * logits.shape[-1])
    # One of the cases is computed as on tensor cores, with more padding ids.
    monkeypatch.setattr(output_projection, "_runs_on_tensor_cores", lambda weight: rows == 4)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    found = model.summed_loss(hidden, labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    ours, theirs = gradients(found, model, hidden), gradients(expected, model, hidden)
    assert ours.keys() == theirs.keys()
    for name_ in theirs:
        torch.testing.assert_close(ours[name_], theirs[name_])
    with torch.no_grad():
        torch.testing.assert_close(model.summed_loss(hidden, labels), expected)


def test_all_and_no_positions_are_labelled() -> None:
    model, hidden, labels = case("bert", {}, labelled=1.0)
    expected = F.cross_entropy(model.logits(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model.summed_loss(hidden, labels), expected)
    nothing = model.summed_loss(hidden, torch.full_like(labels, -100))
    assert nothing.item() == 0
    assert all(not gradient.any() for gradient in gradients(nothing, model, hidden).values())
    labels[1:] = labels[0, 1:] = -100
    expected = F.cross_entropy(model.logits(hidden[0, :1]), labels[0, :1])
    torch.testing.assert_close(model.summed_loss(hidden, labels), expected)


def test_going_back_twice_through_the_same_loss() -> None:
    model, hidden, labels = case("gpt2", {}, labelled=0.6)
    loss = model.summed_loss(hidden, labels)
    once, twice = gradients(loss, model, hidden), gradients(loss, model, hidden)
    kept = {name: gradient.clone() for name, gradient in once.items()}
    for gradient in twice.values():
        gradient.zero_()  # the first ones' memory is not theirs
    again = gradients(loss, model, hidden)
    for name, gradient in once.items():
        assert torch.equal(gradient, kept[name])
        assert gradient.any()
        assert torch.equal(gradient, again[name])


def test_scores_exist_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden, labels = case("gpt2", {}, labelled=0.6)
    seen = []
    scores = output_projection._scores

    def recorded(*arguments: Any) -> Tensor:
        result = scores(*arguments)
        seen.append(len(result))
        return result

    monkeypatch.setattr(output_projection, "_scores", recorded)
    monkeypatch.setattr(output_projection, "PIECE_SCORES", 37 * 5)
    model.summed_loss(hidden, labels).backward()
    targets = int((labels != -100).sum())
    assert sum(seen) == targets
    assert max(seen) == 5 < targets


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_probabilities(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(40, 8, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(3000, 8, generator=generator) * 0.1).to(dtype).requires_grad_()
    labels = torch.randint(3000, (40,), generator=generator)
    wide = [tensor.detach().double().requires_grad_() for tensor in (states, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum")
    found = output_projection.OutputProjection(states, weight).summed_loss(labels)
    assert found.dtype == torch.float32
    (found * 2).backward()
    (expected * 2).backward()
    tolerance = 4 * torch.finfo(dtype).eps
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, theirs in zip((states, weight), wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(
            ours.grad.double(), theirs.grad, rtol=0, atol=tolerance * float(theirs.grad.abs().max())
        )
        # Rows that are no label's have gradients of about 1/3000 each.
        quiet = theirs.grad.abs() < 1e-2
        torch.testing.assert_close(ours.grad.double()[quiet], theirs.grad[quiet], rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("rows", range(9))
@pytest.mark.parametrize("biased", [False, True])
def test_float32_scores_of_few_rows(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 1, 8), (30, 8), (30,)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes[: 2 + biased]]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    bias = inputs[2] if biased else None
    found = output_projection.OutputProjection(inputs[0], inputs[1], bias, padding_ids=2).scores()
    expected = wide[0] @ wide[1].T + (wide[2] if biased else 0)
    assert found.is_contiguous()
    assert (found[..., -2:] == float("-inf")).all()
    torch.testing.assert_close(found[..., :-2].double(), expected[..., :-2], rtol=1e-5, atol=1e-5)
    weights = torch.randn(rows, 1, 28, generator=generator)
    (found[..., :-2] * weights).sum().backward()
    (expected[..., :-2] * weights).sum().backward()
    for ours, theirs in zip(inputs, wide, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_wrong_labels() -> None:
    model, hidden, labels = case("bert", {}, labelled=1.0)
    with pytest.raises(ValueError, match=r"`labels` must have the shape .* \(3, 7\), but has \(3, 6\)"):
        model.summed_loss(hidden, labels[:, 1:])
    with pytest.raises(ValueError, match="but holds 37"):
        model.summed_loss(hidden, torch.full_like(labels, 37))
