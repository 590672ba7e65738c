"""The kernel that turns scores into the gradient of their cross entropy; without a GPU in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from triton_kernels import COMPILED, DEVICE, INTERPRETED, run_interpreted, runs_kernels, starts_interpreter

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu] if COMPILED else []


@starts_interpreter
def test_interpreted() -> None:
    run_interpreted(__file__)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("classes", "padding"), [(7, 0), (4096, 0), (9000, 4200), (50304, 47)])
@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_losses_and_gradients(dtype: torch.dtype, classes: int, padding: int, scale: float) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes the bits of bfloat16 for integers")
    from model_center.layer.kernels.cross_entropy import turn_into_gradient

    generator = torch.Generator(DEVICE).manual_seed(0)
    real = classes - padding
    # The largest scores of the rows stand in the first tile, in the last one, and everywhere.
    scores = torch.randn(4, classes, generator=generator, device=DEVICE) * 5
    scores[0, 0], scores[1, real - 1], scores[2] = 60.0, 60.0, 50.0
    scores[:, real:] = float("-inf")
    scores = scores.to(dtype)
    labels = torch.tensor([real - 1, 0, real // 2, 3], device=DEVICE)
    exact = scores.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    assert exact.grad is not None
    losses = turn_into_gradient(scores, labels, scale)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(
        scores.double(), exact.grad * scale, rtol=2 ** -(8 if dtype == torch.bfloat16 else 10), atol=1e-7
    )


@runs_kernels
def test_rows_with_room_between_them() -> None:
    from model_center.layer.kernels.cross_entropy import turn_into_gradient

    room = torch.randn(3, 12, device=DEVICE).half()
    before, labels = room.clone(), torch.tensor([0, 4, 8], device=DEVICE)
    expected = F.cross_entropy(before[:, :9].double(), labels, reduction="none")
    torch.testing.assert_close(turn_into_gradient(room[:, :9], labels, 1.0).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(room[:, 9:], before[:, 9:])


@runs_kernels
def test_labels_that_are_no_classes() -> None:
    from model_center.layer.kernels.cross_entropy import turn_into_gradient

    scores = torch.randn(3, 10, device=DEVICE).half()
    losses = turn_into_gradient(scores, torch.tensor([-1, 10, 9], device=DEVICE), 1.0)
    assert losses.isnan().tolist() == [True, True, False]
    assert turn_into_gradient(scores[:0], torch.tensor([], dtype=torch.long, device=DEVICE), 1.0).shape == (0,)
