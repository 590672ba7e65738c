"""The engine seam: which engine runs, data types, parameters, initialisers, and collectives of one process."""

import copy
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center import engine as bmt
from model_center.engine import HALF, Constant, Normal, TorchEngine, current, current_engine, use_engine
from model_center.engine.torch_engine import InitializedParameter

pytestmark = pytest.mark.usefixtures("cpu_engine")


def test_half_equals_float16_and_can_be_told_from_it() -> None:
    engine = current_engine()
    assert HALF == torch.float16  # noqa: SIM300 - both orders must hold
    assert torch.float16 == HALF
    assert torch.float32 != HALF
    assert repr(HALF) == "torch.float16"
    assert hash(HALF) == hash(torch.float16)
    assert engine.resolve_dtype(HALF) is torch.float32
    assert engine.resolve_dtype(torch.float16) is torch.float16


def test_half_means_float16_on_cuda() -> None:
    assert TorchEngine(torch.device("cuda", 0)).resolve_dtype(HALF) is torch.float16


@pytest.mark.parametrize("copied", [copy.copy(HALF), copy.deepcopy(HALF), pickle.loads(pickle.dumps(HALF))])
def test_half_stays_the_same_object(copied: torch.dtype) -> None:
    assert copied is HALF


@pytest.mark.parametrize("dtype", [torch.int8, "float16", None, 16])
def test_a_dtype_that_is_none_is_an_error(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"`dtype` must be a floating-point torch.dtype .* but is"):
        current_engine().resolve_dtype(dtype)  # type: ignore[arg-type]


def test_use_engine_is_undone_also_after_an_error() -> None:
    outer = current_engine()
    inner = TorchEngine(torch.device("cpu"))

    def fail() -> None:
        with use_engine(inner):
            assert current_engine() is inner
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert current_engine() is outer


def test_init_distributed_seeds_every_generator() -> None:
    draws = []
    for seed in (3, 3, 4):
        bmt.init_distributed(seed=seed)
        draws.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_an_error(seed: int) -> None:
    with pytest.raises(ValueError, match=f"`seed` must be from 0 to 2.* but is {seed}"):
        bmt.init_distributed(seed=seed)


@pytest.mark.parametrize("wanted", [True, False])
def test_init_distributed_sets_recomputation(wanted: bool) -> None:
    bmt.init_distributed(use_checkpoint=wanted)
    assert current_engine().use_checkpoint is wanted


def test_recomputation_is_the_default_on_cuda_only() -> None:
    assert not TorchEngine(torch.device("cpu")).use_checkpoint
    assert TorchEngine(torch.device("cuda", 0)).use_checkpoint


@pytest.mark.parametrize("call", [bmt.rank, lambda: current_engine().parameter])
def test_one_of_several_processes_does_not_train_apart(
    call: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(current, "_current", None)
    monkeypatch.setattr(current, "_default", None)
    with pytest.raises(ValueError, match=r"init_distributed\(\) must be called .* one of 4 processes"):
        call()


def test_one_process_under_torchrun_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    bmt.init_distributed()
    assert (bmt.rank(), bmt.world_size()) == (0, 1)


def test_a_parameter_is_filled_and_remembers_how() -> None:
    torch.manual_seed(0)
    parameter = current_engine().parameter(300, 400, dtype=HALF, init=Normal(mean=2.0, std=0.5))
    assert parameter.shape == (300, 400)
    assert parameter.dtype is torch.float32
    assert parameter.requires_grad
    assert parameter.mean().item() == pytest.approx(2.0, abs=0.01)
    assert parameter.std().item() == pytest.approx(0.5, abs=0.01)
    torch.manual_seed(0)
    assert torch.equal(parameter, torch.empty(300, 400).normal_(2.0, 0.5))


def test_init_parameters_fills_again_and_spares_foreign_parameters() -> None:
    module = torch.nn.Linear(4, 3)
    module.weight = current_engine().parameter(3, 4, dtype=torch.bfloat16, init=Constant(0.5))
    bias = module.bias.detach().clone()
    twin = copy.deepcopy(module)
    for each in (module, twin):
        with torch.no_grad():
            each.weight.zero_()
        bmt.init_parameters(torch.nn.Sequential(each))
        assert torch.equal(each.weight, torch.full((3, 4), 0.5, dtype=torch.bfloat16))
        assert torch.equal(each.bias, bias)
    assert isinstance(twin.weight, InitializedParameter)
    assert twin.weight.data_ptr() != module.weight.data_ptr()


def test_uninitialized_parameters_are_filled_when_asked() -> None:
    torch.manual_seed(0)
    expected = current_engine().parameter(3, 4, dtype=torch.bfloat16, init=Normal())
    torch.manual_seed(0)
    generator = torch.get_rng_state()
    with bmt.uninitialized():
        with bmt.uninitialized():
            pass
        parameter = current_engine().parameter(3, 4, dtype=torch.bfloat16, init=Normal())
    assert torch.equal(torch.get_rng_state(), generator)
    module = torch.nn.Module()
    module.register_parameter("weight", parameter)
    bmt.init_parameters(module)
    assert torch.equal(parameter, expected)
    assert current_engine().parameter(2, dtype=torch.float32, init=Constant(3.0)).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normal(std=-1.0), "`std` must be a finite number of at least 0, but is -1.0"),
        (lambda: Normal(mean=float("nan")), "`mean` must be a finite number, but is nan"),
    ],
)
def test_initialisers_refuse_nonsense(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


shapes = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@settings(deadline=None)
@given(shape=shapes, op=st.sampled_from(["sum", "avg", "max", "min", "prod"]))
def test_collectives_of_one_process_are_identities(shape: list[int], op: bmt.base.ReduceOp) -> None:
    tensor = torch.rand(shape)
    assert torch.equal(bmt.distributed.all_reduce(tensor, op), tensor)
    assert torch.equal(bmt.distributed.broadcast(tensor, 0), tensor)
    assert torch.equal(bmt.distributed.all_gather(tensor), tensor.unsqueeze(0))
    assert torch.equal(bmt.gather_result(tensor), tensor)
    assert torch.equal(bmt.sum_loss(tensor), tensor)


def test_collectives_pass_gradients_on() -> None:
    x = torch.rand(3, requires_grad=True)
    bmt.distributed.all_gather(bmt.distributed.broadcast(bmt.distributed.all_reduce(x))).sum().backward()
    assert torch.equal(x.grad if x.grad is not None else torch.empty(0), torch.ones(3))


def test_collectives_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="`op` must be one of sum, avg, max, min, prod, but is 'mean'"):
        bmt.distributed.all_reduce(torch.ones(1), "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`root` must be from 0 to 0, but is 1"):
        bmt.distributed.broadcast(torch.ones(1), 1)
    with pytest.raises(ValueError, match="`result` must have at least one dimension"):
        bmt.gather_result(torch.tensor(1.0))


def test_print_rank_prints_on_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    bmt.print_rank("loss", 1.5, sep=": ")
    bmt.print_rank("not here", rank=1)
    assert capsys.readouterr().out == "loss: 1.5\n"
