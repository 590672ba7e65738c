"""Gradients of a module against finite differences."""

import torch
from torch import Tensor
from torch.func import functional_call


def randomize(module: torch.nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Fill all parameters, those that start as constants too, and return them by name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2 + 0.1)
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def assert_gradients(module: torch.nn.Module, *inputs: object, fast: bool = False) -> None:
    """Compare the gradients of every parameter and of every floating-point input, all float64."""
    names = [name for name, _ in module.named_parameters()]
    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert all(parameter.dtype == torch.float64 for parameter in parameters)
    learn = [index for index, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_floating_point()]

    def call(*tensors: Tensor) -> Tensor:
        given = list(inputs)
        for index, tensor in zip(learn, tensors[len(names) :], strict=True):
            given[index] = tensor
        output: Tensor = functional_call(module, dict(zip(names, tensors, strict=False)), tuple(given))
        return output

    leaves = [
        value.detach().clone().requires_grad_()
        for value in inputs
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    assert torch.autograd.gradcheck(call, (*parameters, *leaves), fast_mode=fast)
