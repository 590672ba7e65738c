"""Greedy decoding with a key-value cache, and filling in of masked tokens, by our models and by Transformers'."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode_ours(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The tokens that follow a prompt (rows, length), (rows, tokens); an encoder-decoder's prompt is its input."""
    cache = model.new_cache(prompt.shape[1] + tokens)
    name, given = "input_ids", {"input_ids": prompt}
    if hasattr(model, "decoder"):
        name = "decoder_input_ids"
        given[name] = torch.zeros_like(prompt[:, :1])
    made: list[Tensor] = []
    for _ in range(tokens):
        states = model(**given, past_key_values=cache).last_hidden_state
        made.append(model.logits(states[:, -1:]).argmax(-1))
        given = {name: made[-1]}
    return torch.cat(made, 1)


@torch.no_grad()
def decode_theirs(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The same with a loop over calls of Transformers' model."""
    given: dict[str, Any] = {"logits_to_keep": 1}
    name, latest, cache = "input_ids", prompt, None
    if model.config.is_encoder_decoder:
        given = {"encoder_outputs": model.get_encoder()(prompt)}
        name, latest = "decoder_input_ids", torch.zeros_like(prompt[:, :1])
    made: list[Tensor] = []
    for _ in range(tokens):
        output = model(**given, **{name: latest}, past_key_values=cache, use_cache=True)
        cache, latest = output.past_key_values, output.logits[:, -1:].argmax(-1)
        made.append(latest)
    return torch.cat(made, 1)


@torch.no_grad()
def generate(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The same with Transformers' `generate`."""
    never_ending: dict[str, Any] = {"max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    ids: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **never_ending)
    return ids[:, -tokens:]


@torch.no_grad()
def fill_in_ours(model: Any, ids: Tensor, masked: Tensor) -> Tensor:
    """The likeliest tokens (count,) at the places of `ids` (rows, length) where `masked` is true."""
    predicted: Tensor = model.logits(model(ids).last_hidden_state[masked]).argmax(-1)
    return predicted


@torch.no_grad()
def fill_in_theirs(model: Any, ids: Tensor, masked: Tensor) -> Tensor:
    """The same with Transformers' model, which scores every position."""
    predicted: Tensor = model(ids).logits[masked].argmax(-1)
    return predicted
