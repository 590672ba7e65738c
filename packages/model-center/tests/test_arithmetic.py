"""Counted operations against PyTorch's own counter, on tiny models of all families."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model_center.engine import TorchEngine, use_engine
from model_center.model import families
from model_center.recipe.arithmetic import peak_flops, training_flops

SIZES: dict[str, Any] = {"vocab_size": 61, "dim_model": 24, "num_heads": 3, "dim_head": 10, "dim_ff": 40, "half": False}
ROWS, LENGTH, DECODER_LENGTH = 2, 7, 5
STACKS: dict[str, Any] = {"num_encoder_layers": 2, "num_decoder_layers": 3}


def inputs_of(family: str) -> dict[str, Any]:
    ids = torch.randint(61, (ROWS, LENGTH))
    lengths = torch.full((ROWS,), LENGTH)
    decoder_ids, decoder_lengths = ids[:, :DECODER_LENGTH], torch.full((ROWS,), DECODER_LENGTH)
    inputs: dict[str, dict[str, Any]] = {
        "cpm1": {"input": ids, "length": lengths, "context": ids < 0, "span": ids * 0, "return_logits": False},
        "cpm2": {
            "enc_input": ids, "enc_length": lengths, "dec_input": decoder_ids, "dec_length": decoder_lengths,
            "return_logits": False,
        },
        "t5": {"input_ids": ids, "decoder_input_ids": decoder_ids},
    }  # fmt: skip
    return inputs.get(family, {"input_ids": ids})


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"num_layers": 2}),
        ("bert", {"num_layers": 2, "tied": True, "num_heads_kv": 1}),
        ("gpt2", {"num_layers": 3, "cls_head": 4}),
        ("gpt2", {"num_layers": 3}),
        ("gptj", {"num_layers": 2, "pos_rotary_dim": 4}),
        ("cpm1", {"num_layers": 2}),
        ("t5", STACKS),
        ("t5", {**STACKS, "ffn_activate_fn": "gated_gelu"}),
        ("cpm2", STACKS),
    ],
)
def test_as_pytorch_counts(family: str, options: dict[str, Any], recomputes: bool) -> None:
    model_class = families[family]
    # Without dropout PyTorch leaves out a block's last product when it recomputes, since nothing is made of it.
    config = model_class.config_class(**{**SIZES, **options, "dropout_p": 0.1})
    with use_engine(TorchEngine(use_checkpoint=recomputes)), sdpa_kernel(SDPBackend.MATH):
        model = model_class(config)
        with FlopCounterMode(display=False) as counter:
            hidden_states = model(**inputs_of(family)).last_hidden_state[:, 1:4]
            model.logits(hidden_states).logsumexp(-1).sum().backward()
    decoder_lengths = [DECODER_LENGTH] * ROWS if "num_decoder_layers" in options else []
    found = training_flops(config, [LENGTH] * ROWS, decoder_lengths, targets=3 * ROWS, recomputes_blocks=recomputes)
    pooler = 2 * ROWS * config.dim_model**2 if family == "bert" else 0  # computed, but no part of the loss
    assert found.hardware == counter.get_total_flops() - pooler
    assert (found.recomputation > 0) == recomputes


def test_rows_count_by_their_own_lengths() -> None:
    config = families["gpt2"].config_class(**{**SIZES, "num_layers": 2})
    single = [training_flops(config, [length]).model for length in (3, 9)]
    assert training_flops(config, [3, 9]).model == sum(single)


def test_a_large_model_takes_six_operations_for_each_parameter_and_token() -> None:
    config = families["gpt2"].config_class.preset("gpt2-xl")
    block_parameters = 48 * 12 * 1600**2
    per_token = training_flops(config, [1]).model
    assert per_token == pytest.approx(6 * (block_parameters + 1600 * config.vocab_size), rel=1e-3)


def test_lengths_of_a_stack_that_is_not_there() -> None:
    config = families["t5"].config_class(**SIZES, **STACKS)
    with pytest.raises(ValueError, match=r"decoder_lengths must be 2 lengths, but is \[\]"):
        training_flops(config, [3, 4])


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
        ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        ("Tesla V100S-PCIE-32GB", torch.float16, 130),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA H200", torch.float64, None),
        ("NVIDIA H2000", torch.bfloat16, None),
        ("some accelerator", torch.bfloat16, None),
    ],
)
def test_peak_of_known_gpus(name: str, dtype: torch.dtype, tflops: float | None) -> None:
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(name, dtype) == expected


def test_peak_of_float32_where_tf32_is_allowed() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == pytest.approx(156e12)
        assert peak_flops("Tesla V100-SXM2-32GB", torch.float32) == pytest.approx(15.7e12)
    finally:
        torch.set_float32_matmul_precision(before)


def test_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None
