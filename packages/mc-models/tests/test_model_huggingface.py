"""Every family against Transformers with the same weights: fp32 on the CPU, ragged batches."""

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparison import Inputs, assert_equal, real
from tiny_families import FAMILIES, VOCABULARY, Family
from torch import Tensor

from model_center.model import BaseModel, GPTj, GPTjConfig, load_model
from model_center.model.operations import Duplicate
from model_center.model.rules import expand

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
paddings = pytest.mark.parametrize("padding", ["right", "left"])


def gradients_under_their_names(model: BaseModel, known: Container[str]) -> dict[str, Tensor]:
    """Our gradients under `known` names, through the weight rules; of a tensor with several places here, the sum."""
    table = model.table(model.config)
    assert table is not None
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {}
    for row in expand(table.rules, model.config.depths):
        if all(name in ours for name in row.ours):
            tensors = [ours[name] for name in row.ours]
            for operation in reversed(row.operations):
                if isinstance(operation, Duplicate):
                    tensors = [torch.stack(tensors).sum(0)]
                elif not row.beside:  # equal norms leave a layer that reads them as it is
                    tensors = operation.to_theirs(tensors)
            gradients[next(name for name in (*row.theirs, row.fallback or "") if name in known)] = tensors[0]
    return gradients


@families
@paddings
def test_logits_and_hidden_states(family: Family, padding: str, tmp_path: Path) -> None:
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs(padding)
    valid = real(inputs)
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
        output = ours(**inputs, output_hidden_states=True)
        logits = ours(**inputs, return_logits=True)
    assert_equal(logits[valid][:, : expected.logits.shape[-1]], expected.logits[valid])
    if family.is_seq2seq:
        names = [("decoder_hidden_states", valid), ("encoder_hidden_states", inputs["attention_mask"].bool())]
    else:
        names = [("hidden_states", valid)]
    for name, where in names:
        assert len(output[name]) == len(expected[name])
        for layer, their_layer in zip(output[name], expected[name], strict=True):
            assert_equal(layer[where], their_layer[where])
        assert torch.equal(output[0], output[names[0][0]][-1])


@families
def test_gradients_of_every_parameter(family: Family, tmp_path: Path) -> None:
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs()
    valid = real(inputs)
    weights = torch.randn(int(valid.sum()), theirs.config.vocab_size, generator=torch.Generator().manual_seed(2))
    (theirs(**inputs).logits[valid] * weights).sum().backward()
    (ours(**inputs, return_logits=True)[valid][:, : weights.shape[1]] * weights).sum().backward()
    named = {ours.table(ours.config).canonical(name): value.grad for name, value in theirs.named_parameters()}
    expected = {name: gradient for name, gradient in named.items() if gradient is not None}
    gradients = gradients_under_their_names(ours, expected)
    assert {name for name in expected.keys() - gradients.keys() if expected[name].any()} == set()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients.items():
        # Keys' biases shift all scores of a query alike: their gradient is zero but for rounding.
        assert_equal(gradient, expected[name], 1e-4, max(expected[name].abs().max().item(), 1e-3 * largest))


@families
def test_exported_directory_gives_the_same_logits(family: Family, tmp_path: Path) -> None:
    _, ours = family.make_both(tmp_path / "theirs")
    inputs = family.inputs()
    ours.export_huggingface(tmp_path / "exported", max_file_bytes=20_000)
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    again, report = family.theirs.from_pretrained(
        tmp_path / "exported", attn_implementation="eager", output_loading_info=True
    )
    assert set(report["missing_keys"]) <= {"cls.predictions.bias"}  # which Transformers does not use when untied
    assert all("pooler" in name for name in report["unexpected_keys"])
    reloaded: Any = load_model(tmp_path / "exported")
    with torch.no_grad():
        logits = ours(**inputs, return_logits=True)
        assert_equal(again.eval()(**inputs).logits[real(inputs)], logits[real(inputs)][:, : again.config.vocab_size])
        assert torch.equal(reloaded(**inputs, return_logits=True), logits)
    assert reloaded.config == ours.config


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_trained_gptj_goes_back_with_one_norm_a_layer(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "gptj")
    family.make().save_pretrained(tmp_path / "theirs")
    ours: Any = family.model.from_pretrained(tmp_path / "theirs", dtype=dtype)
    inputs = family.inputs()
    ours(**inputs, return_logits=True)[real(inputs)].sum().backward()
    torch.optim.SGD(ours.parameters(), lr=0.02).step()
    with torch.no_grad():
        for layer in ours.encoder.layers:
            norms = layer.self_att.layernorm_before_attention, layer.ffn.layernorm_before_ffn
            assert not torch.equal(norms[0].weight, norms[1].weight)
            assert not torch.equal(norms[0].bias, norms[1].bias)
            for norm in norms:
                norm.weight[3] = 0  # their quotient is not defined, and not needed
        logits = ours(**inputs, return_logits=True)[real(inputs)]
        ours.export_huggingface(tmp_path / "exported", max_file_bytes=20_000)
        again = family.theirs.from_pretrained(tmp_path / "exported", attn_implementation="eager", dtype=dtype).eval()
        assert_equal(again(**inputs).logits[real(inputs)], logits, tolerance)


def test_bias_of_a_tied_gptj_is_loaded_or_refused(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "gptj")
    theirs = family.make(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = family.inputs()
    with pytest.raises(
        ValueError, match=r"`lm_head\.bias` of .* must be 0 in a tied GPTj, .* but is not; .*tied=False"
    ):
        load_model(tmp_path / "theirs")
    untied = GPTjConfig.from_pretrained(tmp_path / "theirs", tied=False)
    with torch.no_grad():
        logits = GPTj.from_pretrained(tmp_path / "theirs", untied)(**inputs, return_logits=True)
        assert_equal(logits[real(inputs)], theirs(**inputs).logits[real(inputs)])
    classifier = GPTj.from_pretrained(tmp_path / "theirs", dataclasses.replace(untied, tied=True, cls_head=2))
    assert torch.equal(classifier.input_embedding.weight, theirs.transformer.wte.weight)  # without that head

    with torch.no_grad():
        theirs.lm_head.bias.zero_()
    theirs.save_pretrained(tmp_path / "unbiased")
    ours: Any = load_model(tmp_path / "unbiased")
    assert ours.config.tied
    ours.export_huggingface(tmp_path / "exported")
    again = family.theirs.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(**inputs).logits[real(inputs)]
        assert_equal(ours(**inputs, return_logits=True)[real(inputs)], expected)
        assert_equal(again(**inputs).logits[real(inputs)], expected)


def test_exported_gptj_takes_as_many_positions(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "gptj")
    theirs, ours = family.make_both(tmp_path / "theirs", n_positions=2100)
    ours.export_huggingface(tmp_path / "exported")
    again = family.theirs.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    ids = torch.arange(2100)[None] % VOCABULARY
    with torch.no_grad():
        assert_equal(again(ids).logits, theirs(ids).logits)


def test_exported_t5_makes_the_same_decoder_inputs_of_labels(tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == "t5")
    theirs, ours = family.make_both(tmp_path / "theirs", pad_token_id=3, decoder_start_token_id=4, eos_token_id=5)
    ours.export_huggingface(tmp_path / "exported")
    again = family.theirs.from_pretrained(tmp_path / "exported").eval()
    ids, labels = torch.tensor([[8, 9, 10]]), torch.tensor([[6, 7, 5, -100]])
    with torch.no_grad():
        assert_equal(again(input_ids=ids, labels=labels).loss, theirs(input_ids=ids, labels=labels).loss)


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_exported_decoders_without_dropout_have_none(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    theirs, ours = family.make_both(tmp_path / "theirs", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ours.export_huggingface(tmp_path / "exported")
    again = family.theirs.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    inputs = family.inputs()
    with torch.no_grad():
        assert_equal(again.train()(**inputs).logits, theirs.train()(**inputs).logits)


def test_automatic_classes_load_what_is_exported(tmp_path: Path) -> None:
    automatic = {
        "bert": transformers.AutoModelForMaskedLM,
        "gpt2": transformers.AutoModelForCausalLM,
        "gptj": transformers.AutoModelForCausalLM,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }
    for family in FAMILIES:
        if family.name in automatic:
            _, ours = family.make_both(tmp_path / "theirs" / family.name)
            ours.export_huggingface(tmp_path / family.name)
            loaded = automatic[family.name].from_pretrained(tmp_path / family.name)
            assert isinstance(loaded, family.theirs)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_class_head_is_a_token_classifier_there(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    _, body = family.make_both(tmp_path / "theirs")
    body.save_pretrained(tmp_path / "own")
    config = dataclasses.replace(body.config, cls_head=5)
    ours = family.model.from_pretrained(tmp_path / "own", config)
    ours.export_huggingface(tmp_path / "exported")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "exported")
    inputs = family.inputs()
    with torch.no_grad():
        logits = ours(**inputs, return_logits=True)
        assert_equal(logits[real(inputs)], theirs(**inputs).logits[real(inputs)])
    assert logits.shape[-1] == 5
    assert load_model(tmp_path / "exported").config == ours.config


@families
@paddings
def test_attentions(family: Family, padding: str, tmp_path: Path) -> None:
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs(padding)
    valid = real(inputs)
    with torch.no_grad():
        expected = theirs(**inputs, output_attentions=True)
        output = ours(**inputs, output_attentions=True)
    names = {"attentions": valid}
    if family.is_seq2seq:
        names = {"decoder_attentions": valid, "encoder_attentions": inputs["attention_mask"].bool()}
    if family.is_seq2seq or family.crossed:
        names["cross_attentions"] = valid
    for name, where in names.items():
        assert len(output[name]) == len(expected[name])
        for layer, their_layer in zip(output[name], expected[name], strict=True):
            assert_equal(layer.transpose(1, 2)[where], their_layer.transpose(1, 2)[where])


@families
def test_embeddings_in_place_of_ids(family: Family, tmp_path: Path) -> None:
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs()
    expected = ours(**inputs, return_logits=True)
    for prefix in ["", "decoder_"] if family.is_seq2seq else [""]:
        inputs[f"{prefix}inputs_embeds"] = ours.input_embedding(inputs.pop(f"{prefix}input_ids"))
    output = ours(**inputs, return_logits=True)
    assert torch.equal(output, expected)
    assert_equal(output[real(inputs)][:, : theirs.config.vocab_size], theirs(**inputs).logits[real(inputs)])


@pytest.mark.parametrize("name", ["bert", "gpt2", "gptj"])
def test_position_ids_and_token_types(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs("left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    types = torch.arange(11).expand(3, -1) % 2
    for more in ({"position_ids": positions}, {"token_type_ids": types}):
        with torch.no_grad():
            plain, output = ours(**inputs).last_hidden_state, ours(**inputs, **more).last_hidden_state
            expected = theirs(**inputs, **more, output_hidden_states=True).hidden_states[-1]
        assert_equal(output[real(inputs)], expected[real(inputs)])
        assert not torch.allclose(output[real(inputs)], plain[real(inputs)])


@pytest.mark.parametrize("name", ["t5", "t5-v1.1"])
def test_encoder_outputs_in_place_of_input(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs()
    full = ours(**inputs, output_hidden_states=True, output_attentions=True)
    del inputs["input_ids"]
    states = full.encoder_last_hidden_state
    expected = theirs(**inputs, encoder_outputs=(states,)).logits[real(inputs)]
    for given in (states, (states,)):
        assert_equal(ours(**inputs, encoder_outputs=given, return_logits=True)[real(inputs)], expected)


def half_of(inputs: Inputs, family: Family, where: slice, total: int) -> Inputs:
    """Part of the input along the sequence; masks cover everything up to `total`."""
    prefix = "decoder_" if family.is_seq2seq else ""
    ids, mask = f"{prefix}input_ids", f"{prefix}attention_mask"
    return {**inputs, ids: inputs[ids][:, where], mask: inputs[mask][:, :total]}


@pytest.mark.parametrize(
    "family", [row for row in FAMILIES if row.name != "bert" and "bert-u" not in row.name], ids=lambda f: f.name
)
@paddings
def test_cache_continues_as_the_full_pass(family: Family, padding: str, tmp_path: Path) -> None:
    theirs, ours = family.make_both(tmp_path)
    inputs = family.inputs(padding)
    valid, total = real(inputs), real(inputs).shape[1]
    with torch.no_grad():
        expected = theirs(**inputs, use_cache=False).logits
        full = ours(**inputs, return_logits=True)
        cache = ours.new_cache(total)
        pieces = [slice(0, 4), slice(4, 5), slice(5, 6), slice(6, total)]
        logits = torch.cat(
            [
                ours(**half_of(inputs, family, piece, piece.stop), past_key_values=cache, return_logits=True)
                for piece in pieces
            ],
            dim=1,
        )
        first = ours(**half_of(inputs, family, pieces[0], 4), use_cache=True)
        rest = half_of(inputs, family, slice(4, total), total)
        second = ours(**rest, past_key_values=first.past_key_values)
    assert cache.length == first.past_key_values.length == total
    assert second.past_key_values is first.past_key_values
    finite = torch.isfinite(full[valid])
    assert_equal(logits[valid][finite], full[valid][finite])
    assert_equal(logits[valid][:, : expected.shape[-1]], expected[valid])
    after = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)
    assert_equal(after[valid], ours(**inputs).last_hidden_state[valid])


def test_cached_encoder_states_need_not_be_given_again(tmp_path: Path) -> None:
    for family in FAMILIES:
        if not (family.is_seq2seq or family.crossed):
            continue
        _, ours = family.make_both(tmp_path / family.name)
        inputs = family.inputs()
        total = real(inputs).shape[1]
        with torch.no_grad():
            full = ours(**inputs).last_hidden_state
            cache = ours(**half_of(inputs, family, slice(0, 5), 5), use_cache=True).past_key_values
            rest = half_of(inputs, family, slice(5, total), total)
            del rest["input_ids" if family.is_seq2seq else "encoder_hidden_states"]
            output = ours(**rest, past_key_values=cache)
        assert_equal(output.last_hidden_state[real(inputs)[:, 5:]], full[:, 5:][real(inputs)[:, 5:]])
