"""One family of each shape in two processes: the curves of plain PyTorch, and checkpoints that one process loads."""

from collections.abc import Iterator

import pytest
import torch
from training_curves import SHAPES, STEPS, TOLERANCES, Curve, Job, build, reference, train

from model_center import engine as bmt
from model_center.engine import TorchEngine, use_engine
from model_center.layer import stack


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with use_engine(TorchEngine(torch.device("cpu"))):
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(folder=str(tmp_path_factory.mktemp("curves")), families=SHAPES)


@pytest.fixture(scope="module")
def curves(job: Job) -> dict[str, dict[str, Curve]]:
    return job.launch(2, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("family", SHAPES)
def test_two_processes_follow_plain_pytorch(family: str, curves: dict[str, dict[str, Curve]]) -> None:
    found, expected = curves[family]["float32"], reference(family, "float32")
    assert len(found.losses) == STEPS
    assert expected.losses[-1] < 0.95 * expected.losses[0]
    assert max(found.differences(expected).values()) < TOLERANCES["float32"]


@pytest.mark.parametrize("family", SHAPES)
def test_the_last_checkpoint_continues_in_one_process(
    family: str, job: Job, curves: dict[str, dict[str, Curve]]
) -> None:
    assert curves
    model = build(family, "float32")
    names = list(model.state_dict())
    bmt.load(model, job.checkpoint(family, "float32"))
    saved = torch.load(job.checkpoint(family, "float32"), weights_only=True)
    assert list(saved) == names
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("family", SHAPES)
def test_padding_left_out_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs leave it out in half precision, and the curves there are compared with those of the same kernels."""
    expected = reference(family, "float32", 10)
    monkeypatch.setattr(stack, "saves_padding", lambda *_: True)
    assert max(train(family, "float32", 10).differences(expected).values()) < TOLERANCES["float32"]
