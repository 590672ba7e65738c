"""T5 in fp16: plain weights overflow, so that they are divided or refused, never silently infinite."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparison import assert_equal, real
from tiny_families import T5_SIZES, VOCABULARY, Family

from model_center.model import T5, T5Config, load_model


def overflowing(feed_forward: str, untied: bool = False) -> Family:
    options = T5_SIZES | {"feed_forward_proj": feed_forward, "tie_word_embeddings": not untied}
    return Family(feed_forward, transformers.T5Config, options, transformers.T5ForConditionalGeneration, untied)


def make_both(family: Family, directory: Path) -> Any:
    """Weights as large as published ones make the stream: beyond what fp16 holds, but not by much."""
    theirs = family.make()
    with torch.no_grad():
        theirs.shared.weight.mul_(20_000)
        for name, parameter in theirs.named_parameters():
            if name.endswith(("wo.weight", "SelfAttention.o.weight", "EncDecAttention.o.weight")):
                parameter.mul_(20_000)
        if not family.untied:
            theirs.lm_head.weight = theirs.shared.weight
    theirs.save_pretrained(directory)
    return theirs


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs, return_logits=True) if isinstance(model, T5) else model(**inputs).logits
    scores: torch.Tensor = output[real(inputs)].float()
    return scores


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu", "gelu"])
@pytest.mark.parametrize("untied", [False, True])
def test_plain_weights_are_divided_in_fp16(feed_forward: str, untied: bool, tmp_path: Path) -> None:
    family = overflowing(feed_forward, untied)
    theirs = make_both(family, tmp_path / "theirs")
    inputs = family.inputs()
    expected = logits(theirs, inputs)
    plain = T5.from_pretrained(tmp_path / "theirs")
    assert plain.config.residual_scale is None
    assert_equal(logits(plain, inputs), expected)
    assert not torch.isfinite(logits(plain.half(), inputs)).all()
    scale = 10_000.0
    config = T5Config.from_pretrained(tmp_path / "theirs", residual_scale=scale)
    divided = T5.from_pretrained(tmp_path / "theirs", config, dtype=torch.float16)
    assert_equal(logits(divided, inputs), expected, 2e-2)
    same = T5.from_pretrained(tmp_path / "theirs", config)
    assert_equal(logits(same, inputs), expected)
    divided.save_pretrained(tmp_path / "own")
    again: Any = load_model(tmp_path / "own")
    assert again.config.residual_scale == scale
    assert torch.equal(logits(again, inputs), logits(divided, inputs))
    same.export_huggingface(tmp_path / "exported")
    assert_equal(logits(family.theirs.from_pretrained(tmp_path / "exported"), inputs), expected)


def test_the_scale_is_chosen_where_fp16_needs_it(tmp_path: Path) -> None:
    family = overflowing("relu")
    theirs = family.make()
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = family.inputs()
    half = T5.from_pretrained(tmp_path / "theirs", dtype=torch.float16)
    assert half.config.residual_scale == 100
    assert_equal(logits(half, inputs), logits(theirs, inputs), 2e-2)
    for dtype in (torch.float32, torch.bfloat16):
        assert T5.from_pretrained(tmp_path / "theirs", dtype=dtype).config.residual_scale is None
    # Our own directories: what was not trained in fp16 is plain, what was saved in fp16 is as it should be.
    T5.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "plain")
    again = T5.from_pretrained(tmp_path / "plain", dtype=torch.float16)
    assert again.config.residual_scale == 100
    assert_equal(logits(again, inputs), logits(half, inputs), 2e-3)
    again.save_pretrained(tmp_path / "half")
    assert torch.equal(logits(T5.from_pretrained(tmp_path / "half"), inputs), logits(again, inputs))
    back = T5.from_pretrained(
        tmp_path / "half", dataclasses.replace(again.config, residual_scale=1.0, dtype=torch.float32)
    )
    assert_equal(logits(back, inputs), logits(theirs, inputs), 2e-3)
    T5(dataclasses.replace(T5.from_pretrained(tmp_path / "plain").config, dtype=torch.float16)).save_pretrained(
        tmp_path / "f"
    )
    assert T5.from_pretrained(tmp_path / "f").config.residual_scale is None


def test_plain_weights_are_refused_in_fp16_if_division_is_forbidden(tmp_path: Path) -> None:
    family = overflowing("relu")
    family.make().save_pretrained(tmp_path)
    config = T5Config.from_pretrained(tmp_path, residual_scale=1.0)
    with pytest.raises(
        ValueError, match=r"`residual_scale` must not be 1 for .*model\.safetensors in float16.*use 100"
    ):
        T5.from_pretrained(tmp_path, config, dtype=torch.float16)
    assert T5.from_pretrained(tmp_path, config).config.vocab_size == VOCABULARY
