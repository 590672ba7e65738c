"""Arguments of forwards and options of configurations do what they say, for every family; wrong ones are named."""

from typing import Any

import pytest
import torch
from own_families import ROWS, Row, batch
from torch import Tensor
from torch.testing import assert_close

from model_center.layer import AttentionMask, KeyValueCache
from model_center.model import BaseModelOutput, Bert, BertConfig, T5Config, families

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# CPM always takes lengths.
maskable = pytest.mark.parametrize("row", [row for row in ROWS if "cpm" not in row.name], ids=lambda row: row.name)
BY_NAME = {row.name: row for row in ROWS}
IDS, LENGTH = batch(1, [7, 4], 7)


@rows
def test_class_head_projects_every_position(row: Row) -> None:
    model = row.make(cls_head=3)
    scores = row.call(model, IDS, LENGTH, return_logits=True)
    assert scores.shape == (2, 7, 3)
    states = row.call(model, IDS, LENGTH).last_hidden_state
    assert_close(scores, model.cls_projection(states))
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert not names & {"lm_head", "output_projection"}


@rows
def test_tied_models_project_with_their_embedding(row: Row) -> None:
    model = row.make(tied=True)
    states = row.call(model, IDS, LENGTH).last_hidden_state
    scores = row.call(model, IDS, LENGTH, return_logits=True)
    weight = model.input_embedding.weight
    if row.name.startswith("bert"):
        head = model.lm_head
        states = head.layer_norm(torch.nn.functional.gelu(head.dense(states)))
        expected = states @ weight.T + head.decoder.bias
    else:
        expected = states @ weight.T * (16**-0.5 if row.name == "t5" else 1)
    if row.name == "gpt2":
        assert (scores[..., -1] == -torch.inf).all()
        scores, expected = scores[..., :-1], expected[..., :-1]
    assert_close(scores, expected)
    assert not any("decoder.weight" in name or "output_projection" in name for name in model.state_dict())


@rows
def test_tuples_hold_the_present_values(row: Row) -> None:
    model = row.make()
    output = row.call(model, IDS, LENGTH, output_hidden_states=True, use_cache=row.causal)
    plain = row.call(model, IDS, LENGTH, output_hidden_states=True, use_cache=row.causal, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(output) == len(output.keys())
    assert torch.equal(plain[0], output[0])
    assert ("past_key_values" in output.keys()) == row.causal  # noqa: SIM118 - an output iterates over its values
    first, *_ = output
    assert first is output.last_hidden_state is output["last_hidden_state"] is output[0]
    assert output[-1] is output.to_tuple()[-1]
    assert output[:2] == output.to_tuple()[:2]
    with pytest.raises(KeyError, match="attentions"):
        output["attentions"]


@rows
def test_zero_head_mask_is_the_model_without_that_head(row: Row) -> None:
    model = row.make()
    sides = {"head_mask": "decoder" if row.name in ("t5", "cpm2") else "encoder"}
    if row.name in ("t5", "cpm2"):
        sides = {"head_mask": "encoder", "decoder_head_mask": "decoder", "cross_attn_head_mask": "decoder"}
    for argument, stack in sides.items():
        mask = torch.tensor([[1.0, 0.0], [0.5, 1.0]])
        masked = row.call(model, IDS, LENGTH, **{argument: mask}).last_hidden_state
        everywhere = row.call(model, IDS, LENGTH, **{argument: torch.tensor([0.0, 1.0])}).last_hidden_state
        block = "cross_att" if argument.startswith("cross") else "self_att"
        outputs = [getattr(layer, block).self_attention.attention_out for layer in getattr(model, stack).layers]
        for factors, result in ((mask, masked), (torch.tensor([[0.0, 1.0]] * 2), everywhere)):
            saved = [output.weight.detach().clone() for output in outputs]
            with torch.no_grad():
                for output, layer_factors in zip(outputs, factors, strict=True):
                    output.weight.mul_(layer_factors.repeat_interleave(8))
                expected = row.call(model, IDS, LENGTH).last_hidden_state
                for output, weight in zip(outputs, saved, strict=True):
                    output.weight.copy_(weight)
            assert_close(result, expected)


@maskable
def test_length_is_a_mask_with_padding_on_the_right(row: Row) -> None:
    model = row.make()
    expected = row.call(model, IDS, LENGTH).last_hidden_state
    prefix = "decoder_" if row.name == "t5" else ""
    real = torch.arange(7) < LENGTH[:, None]
    square = real[:, None].expand(-1, 7, -1)
    for mask in (real, real.long(), square, AttentionMask(lengths=LENGTH), AttentionMask(key_padding=~real)):
        given = {f"{prefix}attention_mask": mask, f"{prefix}length": None}
        if row.name == "t5":
            given |= {"decoder_length": None, "decoder_input_ids": IDS}
            output = model(torch.arange(6).expand(2, -1) + 1, torch.tensor([5, 5]), **given)
        else:
            output = model(IDS, **given)
        assert_close(output.last_hidden_state[real], expected[real])


@maskable
def test_nothing_is_padding_without_a_mask(row: Row) -> None:
    model, full = row.make(), torch.tensor([7, 7])
    expected = row.call(model, IDS, full).last_hidden_state
    more = {"decoder_input_ids": IDS} if row.name == "t5" else {}
    ids = torch.arange(6).expand(2, -1) + 1 if row.name == "t5" else IDS
    length = torch.tensor([5, 5]) if row.name == "t5" else None
    assert_close(model(ids, length, **more).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "cpm1", "bert-decoder"])
@pytest.mark.parametrize("pos_bias_type", ["none", "relative", "rotary"])
def test_every_kind_of_position_tells_places_apart(name: str, pos_bias_type: str) -> None:
    changes: dict[str, Any] = {"pos_bias_type": pos_bias_type, "position_size": None}
    model = BY_NAME[name].make(**changes, pos_init_std=2.0)
    # Two equal tokens in the past, in two orders: only positions can tell.
    ids, length = torch.tensor([[3, 4, 5], [4, 3, 5]]), torch.tensor([3, 3])
    last = BY_NAME[name].call(model, ids, length).last_hidden_state[:, -1]
    sees_order = not torch.allclose(last[0], last[1], atol=1e-4)
    one_layer = BY_NAME[name].make(**changes, pos_init_std=2.0, num_layers=1)
    last = BY_NAME[name].call(one_layer, ids, length).last_hidden_state[:, -1]
    assert torch.allclose(last[0], last[1], atol=1e-4) == (pos_bias_type == "none")
    assert sees_order


def test_grouped_queries_are_cached() -> None:
    model = BY_NAME["gpt2"].make(num_heads=4, dim_head=4, num_heads_kv=2)
    full = model(IDS).last_hidden_state
    cache = model.new_cache(7)
    with torch.no_grad():
        pieces = [model(IDS[:, start : start + 1], past_key_values=cache).last_hidden_state for start in range(7)]
    assert_close(torch.cat(pieces, dim=1), full)
    assert cache.length == 7
    assert tuple(model.encoder.layers[0].self_att.self_attention.project_k.weight.shape) == (8, 16)


@rows
def test_eight_bit_weights_come_close(row: Row) -> None:
    model, small = row.make(), row.make(int8=True)
    small.load_state_dict(model.state_dict())
    with torch.no_grad():
        states, near = (row.call(made, IDS, LENGTH).last_hidden_state for made in (model, small))
    assert 0 < (near - states).abs().mean() < 0.1 * states.abs().mean()
    assert any(buffer.dtype == torch.int8 for buffer in small.buffers())


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_length_scale_divides_products(name: str) -> None:
    row = BY_NAME[name]
    scaled, plain = row.make(length_scale=True), row.make()
    scaled.load_state_dict(plain.state_dict())
    for module in plain.modules():
        if hasattr(module, "dim_in") and hasattr(module, "weight"):
            module.weight.data /= module.dim_in**0.5
    with torch.no_grad():
        logits = [row.call(model, IDS, LENGTH, return_logits=True) for model in (scaled, plain)]
    assert_close(logits[0], logits[1])


@rows
def test_dropout_is_for_training_only(row: Row) -> None:
    for option in ("dropout_p", "att_dropout_p", "ffn_dropout_p"):
        model = row.make(**{"dropout_p": 0.0, "ffn_dropout_p": 0.0, option: 0.4})
        calm = [row.call(model, IDS, LENGTH).last_hidden_state for _ in range(2)]
        assert torch.equal(*calm)
        model.train()
        wild = [row.call(model, IDS, LENGTH).last_hidden_state for _ in range(2)]
        assert not torch.equal(*wild), option


@rows
def test_weights_start_as_configured(row: Row) -> None:
    model_class = families[row.name.partition("-")[0]]
    spreads = {"emb": 0.9, "att": 0.3, "ffn": 0.2, "proj": 0.7}
    options = {f"{name}_init_std": std for name, std in spreads.items()} | {"norm_init_var": 1.5, "emb_init_mean": 2.0}
    torch.manual_seed(0)
    model: Any = model_class(model_class.config_class(**{**row.options, "dim_ff": 200, "tied": False, **options}))
    parts = {
        "emb": model.input_embedding.weight,
        "att": model.encoder.layers[0].self_att.self_attention.project_q.weight,
        "ffn": model.encoder.layers[1].ffn.ffn.w_out.weight,
        "proj": model.lm_head.decoder.weight if row.name.startswith("bert") else model.output_projection.weight,
    }
    for name, weight in parts.items():
        assert weight.std().item() == pytest.approx(spreads[name], rel=0.2), name
    assert parts["emb"].mean().item() == pytest.approx(2.0, abs=0.2)
    assert (model.encoder.output_layernorm.weight == 1.5).all()


# Wrong input


def test_exactly_one_input() -> None:
    model = BY_NAME["bert"].make()
    embeds = torch.zeros(2, 7, 16)
    for given in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="give exactly one of `input_ids` and `inputs_embeds`"):
            model(**given)
    t5 = BY_NAME["t5"].make()
    with pytest.raises(ValueError, match="give exactly one of `decoder_input_ids` and `decoder_inputs_embeds`"):
        t5(IDS)
    with pytest.raises(ValueError, match="give exactly one of `input_ids` and `inputs_embeds`"):
        t5(decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="give `encoder_outputs` or the encoder's input, not both"):
        t5(IDS, decoder_input_ids=IDS, encoder_outputs=embeds)
    with pytest.raises(ValueError, match="`head_mask` must be None where the encoder is not run"):
        t5(decoder_input_ids=IDS, encoder_outputs=embeds, head_mask=torch.ones(2))
    cache = t5(IDS, decoder_input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`head_mask` must be None where the encoder is not run"):
        t5(decoder_input_ids=IDS, past_key_values=cache, head_mask=torch.ones(2))
    packed = AttentionMask(documents=torch.zeros_like(IDS))
    with pytest.raises(
        ValueError, match="`decoder_attention_mask` must have `documents`, because `attention_mask` has"
    ):
        t5(IDS, decoder_input_ids=IDS, attention_mask=packed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": LENGTH, "attention_mask": IDS}, "give `length` or `attention_mask`, not both"),
        ({"length": LENGTH[:1]}, r"`length` must be an integer tensor of shape \(batch,\) = \(2,\), but .*\(1,\)"),
        ({"length": LENGTH.float()}, r"`length` must be an integer tensor .* but is torch\.float32"),
        ({"attention_mask": torch.ones(2, 7)}, r"`attention_mask` must be a boolean or integer .* is torch\.float32"),
        ({"attention_mask": IDS[:, 1:]}, r"`attention_mask` must have shape \(batch, positions\) = \(2, 7\).*\(2, 6\)"),
        ({"position_ids": IDS[0]}, r"`position_ids` must have shape \(batch, seq_len\) = \(2, 7\), but has \(7,\)"),
        ({"head_mask": torch.ones(3, 2)}, r"`head_mask` must have shape \(num_layers, num_heads\) = \(2, 2\)"),
        ({"token_type_ids": IDS * 0 + 2}, r"must lie in \[0, 2\)"),
        ({"encoder_hidden_states": torch.zeros(2, 3, 16)}, "build it with `add_cross_attention=True`"),
        ({"use_cache": True}, r"`past_key_values` and `use_cache` need a causal model \(`is_decoder=True`\)"),
        ({"past_key_values": KeyValueCache(2, 7)}, "need a causal model"),
    ],
)
def test_wrong_arguments_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BY_NAME["bert"].make()(IDS, **given)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"`input_ids` must have shape \(batch, seq_len\), but has \(7,\)"),
        (IDS + 30, r"must lie in \[0, 37\), the vocabulary, but .* the first is ids"),
        (torch.zeros(1, 21, dtype=torch.long), r"at most `position_size` \(20\) positions long, but reach 21"),
    ],
)
def test_wrong_token_ids_are_named(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BY_NAME["gpt2"].make()(ids)


def test_cached_positions_count_towards_position_size() -> None:
    model = BY_NAME["gpt2"].make(position_size=9)
    cache = model.new_cache(9)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match=r"`position_size` \(9\) positions long, but reach 14"):
            model(IDS, past_key_values=cache)


def test_positions_that_would_be_ignored_are_refused() -> None:
    model = BY_NAME["cpm1"].make()
    nothing = torch.zeros_like(IDS)
    with pytest.raises(ValueError, match="`position_ids` must be None in a model without absolute or rotary positions"):
        model(IDS, LENGTH, nothing, nothing, position_ids=IDS)
    with pytest.raises(ValueError, match="`pos_bias_type` must be 'relative' or 'none' here, but is 'rotary'"):
        BY_NAME["t5"].make(pos_bias_type="rotary")


def test_heads_must_be_a_multiple_of_key_value_heads() -> None:
    with pytest.raises(ValueError, match=r"`num_heads` must be a multiple of `num_heads_kv` \(3\), but is 4"):
        Bert(BertConfig(num_heads=4, num_heads_kv=3, num_layers=1, dim_model=8, dim_head=2, dim_ff=8))
    with pytest.raises(ValueError, match=r"`activate_fn` must be one of .*'gated_relu'.*but is 'gatedrelu'"):
        BY_NAME["t5"].make(ffn_activate_fn="gatedrelu")


def test_encoder_outputs_may_be_an_output_object() -> None:
    model = BY_NAME["t5"].make()
    full = model(IDS, LENGTH, IDS, output_hidden_states=True)
    given = BaseModelOutput(full.encoder_last_hidden_state, full.encoder_hidden_states)
    output = model(length=LENGTH, decoder_input_ids=IDS, encoder_outputs=given)
    assert_close(output.last_hidden_state, full.last_hidden_state)
    assert len(output.encoder_hidden_states) == 3


def test_t5_scales_outputs_as_tied_models_do_by_default() -> None:
    assert not T5Config().scale_decoder_outputs
    assert T5Config(tied=True).scale_decoder_outputs
    assert not T5Config(tied=True, scale_decoder_outputs=False).scale_decoder_outputs
