"""FusedCrossEntropy against torch's cross entropy in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.engine import loss as loss_module
from model_center.engine.loss import FusedCrossEntropy

REDUCTIONS = ["none", "mean", "sum"]


def case(seed: int, rows: int, classes: int, ignored: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=source, dtype=torch.float64) * 3
    target = torch.randint(0, classes, (rows,), generator=source)
    if ignored:
        target[torch.rand(rows, generator=source) < 0.4] = -100
        target[0] = 0
    return logits, target, torch.rand(classes, generator=source, dtype=torch.float64) + 0.1


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    classes=st.integers(1, 9),
    ignored=st.booleans(),
    weighted=st.booleans(),
    reduction=st.sampled_from(REDUCTIONS),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    piece=st.sampled_from([1, 20, 2**24]),
)
def test_loss_and_gradient_are_torchs_in_float64(
    seed: int, rows: int, classes: int, ignored: bool, weighted: bool, reduction: Any, smoothing: float, piece: int
) -> None:
    logits, target, weight = case(seed, rows, classes, ignored)
    options: dict[str, Any] = {"weight": weight if weighted else None, "label_smoothing": smoothing}
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "PIECE_ELEMENTS", piece)
        found = FusedCrossEntropy(reduction=reduction, **options)(ours, target)
        expected = F.cross_entropy(theirs, target, reduction=reduction, **options)
        upstream = torch.rand(expected.shape, dtype=torch.float64)
        found.backward(upstream)
        expected.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradcheck() -> None:
    logits, target, weight = case(1, 5, 4, True)
    logits[:, 3] = -math.inf
    target[target == 3] = 1
    loss = FusedCrossEntropy(weight=weight, label_smoothing=0.2)
    # Minus infinity has no finite differences: only the reachable classes vary.
    reachable = logits[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(torch.cat([x, logits[:, 3:]], 1), target), (reachable,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_half_precision_is_as_exact_as_its_logits(dtype: torch.dtype, smoothing: float) -> None:
    logits, target, _ = case(2, 50, 300, True)
    ours = logits.to(dtype).requires_grad_()
    theirs = logits.to(dtype).double().requires_grad_()
    found = FusedCrossEntropy(label_smoothing=smoothing)(ours, target)
    expected = F.cross_entropy(theirs, target, label_smoothing=smoothing)
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (found * 1024).backward()
    (expected * 1024).backward()
    assert ours.grad is not None
    assert ours.grad.dtype is dtype
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_float16_does_not_overflow() -> None:
    logits = torch.full((4096, 2), 60000.0, dtype=torch.float16)
    logits[:, 1] = -60000
    logits.requires_grad_()
    target = torch.ones(4096, dtype=torch.long)
    found = FusedCrossEntropy(reduction="sum")(logits, target)
    assert found.item() == 120000 * 4096
    found.backward()
    assert logits.grad is not None
    assert logits.grad.tolist()[0] == [1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classes_that_cannot_be_reached_change_nothing(dtype: torch.dtype, smoothing: float) -> None:
    logits, target, _ = case(3, 6, 5, True)
    plain = logits.to(dtype).requires_grad_()
    padded = torch.cat([logits.to(dtype), torch.full((6, 2), -math.inf, dtype=dtype)], 1).requires_grad_()
    loss = FusedCrossEntropy(label_smoothing=smoothing)
    found, expected = loss(padded, target), loss(plain, target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    assert padded.grad is not None
    assert not padded.grad[:, 5:].any()
    torch.testing.assert_close(padded.grad[:, :5], plain.grad)


def test_a_target_that_cannot_be_reached_costs_infinity_as_in_torch() -> None:
    logits = torch.tensor([[0.0, -math.inf], [1.0, 2.0]], requires_grad=True)
    target = torch.tensor([1, 1])
    found = FusedCrossEntropy(reduction="none")(logits, target)
    assert torch.equal(found.isinf(), torch.tensor([True, False]))
    twin = logits.detach().clone().requires_grad_()
    found.sum().backward()
    F.cross_entropy(twin, target, reduction="sum").backward()
    torch.testing.assert_close(logits.grad, twin.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan, -math.inf])
def test_ignored_rows_count_nothing_whatever_they_hold(reduction: Any, bad: float) -> None:
    logits = torch.full((3, 4), bad, requires_grad=True)
    loss = FusedCrossEntropy(reduction=reduction, ignore_index=7, label_smoothing=0.1)
    found = loss(logits, torch.full((3,), 7))
    assert not found.any()
    found.sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_no_rows_cost_nothing() -> None:
    logits = torch.empty(0, 4, requires_grad=True)
    found = FusedCrossEntropy()(logits, torch.empty(0, dtype=torch.long))
    found.backward()
    assert found.item() == 0


def test_integer_targets_of_any_size_and_strided_logits() -> None:
    logits, target, _ = case(4, 6, 5, False)
    expected = F.cross_entropy(logits, target)
    assert FusedCrossEntropy()(logits, target.int()).item() == pytest.approx(expected.item())
    assert FusedCrossEntropy()(logits.t().contiguous().t(), target.to(torch.uint8)).item() == pytest.approx(
        expected.item()
    )
    weight = torch.arange(1, 1 + logits.shape[1]).to(logits)
    expected = F.cross_entropy(logits, target, weight)
    for dtype in (torch.uint8, torch.int16):
        assert FusedCrossEntropy(weight=weight)(logits, target.to(dtype)).item() == pytest.approx(expected.item())


def test_forward_keeps_no_float32_copy_of_the_logits() -> None:
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    logits = torch.randn(64, 1000).to(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        FusedCrossEntropy()(logits, torch.zeros(64, dtype=torch.long))
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FusedCrossEntropy(reduction="average"),  # type: ignore[arg-type]
            "`reduction` must be one of none, mean, sum, but is 'average'",
        ),
        (
            lambda: FusedCrossEntropy(weight=torch.ones(2))(torch.ones(2, 3), torch.tensor([0, 1])),
            "`weight` must have one entry for each of 3 classes, but has 2",
        ),
    ],
)
def test_input_that_does_not_fit_is_an_error(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
