"""Compilation under a budget of activations: PyTorch's compiler chooses what to keep, by what computing it again costs.

Imported only where there is a budget, since the compiler takes seconds to import.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import config, partitioners
from torch._inductor.custom_graph_pass import CustomRuntimeEstimator, get_hash_for_files

_SLOWNESS_OF_ATTENTION = 3
"""How much longer attention takes than matrix products of as many operations: 230 and 650 TFLOP/s in training T5-3B on
one H200."""


def compiler_keeping(activation_budget: float) -> Callable[[Any, Any], Any]:
    """PyTorch's compiler, told of a budget only while it compiles: other compiled code of the process is not."""
    compiler = torch._dynamo.lookup_backend("inductor")
    settings = {
        "activation_memory_budget": activation_budget,
        "activation_memory_budget_runtime_estimator": _CostOfComputingAgain(),
        "is_non_builtin_to_include": True,  # otherwise our own operators count as free
    }

    def compile_block(graph: Any, inputs: Any) -> Any:
        with config.patch(settings), _all_attention_counts():
            return compiler(graph, inputs)

    return compile_block


class _CostOfComputingAgain(CustomRuntimeEstimator):
    """Operations as PyTorch counts them, those of attention weighted."""

    def __call__(self, node: torch.fx.Node) -> float:
        with config.patch(activation_memory_budget_runtime_estimator="flops"):
            operations: float = partitioners.estimate_runtime(node)
        return operations * (_SLOWNESS_OF_ATTENTION if re.search("attention|attn", str(node.target)) else 1)

    def uuid(self) -> Any:
        """What compiled code is stored under: other costs, other code."""
        return get_hash_for_files((__file__,))


@contextmanager
def _all_attention_counts() -> Iterator[None]:
    """Adds cuDNN's attention, which the compiler takes for free, to the operators that are costly to compute again."""
    default = partitioners.get_default_op_list

    def with_cudnn() -> Any:
        known = default()
        known.compute_intensive_ops.add(torch.ops.aten._scaled_dot_product_cudnn_attention)
        return known

    partitioners.get_default_op_list = with_cudnn
    try:
        yield
    finally:
        partitioners.get_default_op_list = default
