"""Masters that are kept in halves: exact, whatever the numbers, and harmless when parameters are changed."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_center.engine.optim import AdamOptimizer
from model_center.engine.optim.masters import joined, remainder_of

pytestmark = pytest.mark.usefixtures("cpu_engine")
LOWER_HALVES = torch.arange(2**16, dtype=torch.int64)


def with_upper_half(upper: int) -> torch.Tensor:
    """The float32 numbers whose upper 16 bits are these."""
    return ((upper << 16) + LOWER_HALVES).to(torch.int32).view(torch.float32)


@given(upper=st.one_of(st.integers(0, 2**16 - 1), st.sampled_from([0, 1, 0x7F7F, 0x7F80, 0x8000, 0x8001, 0xFF7F])))
def test_every_master_comes_back(upper: int) -> None:
    masters = with_upper_half(upper)
    parameters = masters.bfloat16()
    back = joined(parameters, remainder_of(parameters, masters))
    numbers = ~masters.isnan()
    assert torch.equal(back[~numbers].isnan(), ~numbers[~numbers])
    assert torch.equal(back.bfloat16()[numbers], parameters[numbers])
    different = (back != masters) & numbers
    # In the middle above an even number: the difference would need a bit more.
    assert different.nonzero().flatten().tolist() == ([2**15] if upper % 2 == 0 and numbers[2**15] else [])
    assert torch.equal(back[different], torch.nextafter(masters[different], parameters[different].float()))


@pytest.mark.parametrize("model_first", [True, False])
def test_weights_and_state_may_be_loaded_in_either_order(model_first: bool) -> None:
    def trained(seed: int, steps: int) -> tuple[torch.nn.Linear, AdamOptimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Linear(30, 40).bfloat16()
        optimizer = AdamOptimizer(model.parameters(), lr=1e-2)
        for _ in range(steps):
            train(model, optimizer)
        return model, optimizer

    def train(model: torch.nn.Linear, optimizer: AdamOptimizer) -> None:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 300).view(10, 30).bfloat16()).square().sum().backward()
        optimizer.step()

    (model, optimizer), (twin, restored) = trained(0, 3), trained(1, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for part in (True, False) if model_first else (False, True):
        twin.load_state_dict(model.state_dict()) if part else restored.load_state_dict(state)
    torch.testing.assert_close(restored.state_dict(), state, rtol=0, atol=0)
    train(model, optimizer)
    train(twin, restored)
    torch.testing.assert_close(restored.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 2.0])
def test_parameters_may_be_changed_between_steps(value: float) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(1000).bfloat16())
    optimizer = AdamOptimizer([parameter], lr=1e-3)
    for _ in range(3):
        parameter.grad = torch.randn(1000).bfloat16()
        optimizer.step()
    with torch.no_grad():
        parameter.fill_(value)
    master = optimizer.state_dict()["state"][0]["master"]
    torch.testing.assert_close(master, parameter.detach().float(), rtol=2.0**-8, atol=1e-38)
    parameter.grad = torch.zeros(1000).bfloat16()
    optimizer.step()
    torch.testing.assert_close(parameter.detach().float(), torch.full((1000,), value), rtol=1e-2, atol=5e-3)


def test_ten_bytes_of_state_for_an_element() -> None:
    parameter = torch.nn.Parameter(torch.randn(500).bfloat16())
    parameter.grad = torch.ones_like(parameter)
    optimizer = AdamOptimizer([parameter])
    optimizer.step()
    assert sum(tensor.nbytes for name, tensor in optimizer.state[parameter].items() if name != "step") == 5000
