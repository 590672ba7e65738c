"""Configurations: JSON files of all kinds, presets of the published sizes, and what is said of wrong options."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model_center.engine import HALF, TorchEngine, use_engine
from model_center.model import Bert, BertConfig, CPM1Config, GPT2Config, GPTjConfig, T5Config, families

CONFIGS = [model.config_class for model in families.values()]
config_classes = pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)

# Parameters of the published checkpoints, without BERT's next-sentence head, with what ours have besides: GPT-2's
# padding id and GPT-J's second norms.
PUBLISHED = {
    "bert-base-uncased": 110_106_428 - 1_538,
    "bert-large-uncased": 336_226_108 - 2_050,
    "gpt2-base": 124_439_808 + 768,
    "gpt2-medium": 354_823_168 + 1024,
    "gpt2-large": 774_030_080 + 1280,
    "gpt2-xl": 1_557_611_200 + 1600,
    "gptj-6b": 6_050_882_784 + 28 * 2 * 4096,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
}


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@config_classes
def test_a_file_gives_the_same_configuration_again(cls: Any, tmp_path: Path) -> None:
    changed = {"dim_model": 20, "att_mask_value": -math.inf, "dropout_p": 0.25, "cls_head": 3, "half": True}
    for dtype in (HALF, torch.bfloat16):
        config = cls(**changed, dtype=dtype)
        config.to_json_file(tmp_path / "config.json")
        again = cls.from_json_file(tmp_path / "config.json")
        assert again == config
        assert (again.dtype is HALF) == (dtype is HALF)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["model_type"] == cls.model_type
    assert content["format_version"] == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


@config_classes
def test_legacy_files_hold_numbers_as_strings(cls: Any, tmp_path: Path) -> None:
    config = cls.from_json_file(written(tmp_path, {"att_mask_value": "-inf", "norm_eps": "1e-4", "half": False}))
    assert config.att_mask_value == -math.inf
    assert config.norm_eps == 1e-4
    assert config.dtype is torch.float32
    assert dataclasses.replace(config, att_mask_value=cls().att_mask_value, norm_eps=cls().norm_eps) == cls(half=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dim_modle": 12}, r"config\.json: BertConfig has no option `dim_modle`; the nearest one is `dim_model`"),
        ({"dim_model": "wide"}, r"config\.json: `dim_model` must be of type int, but is 'wide'"),
        ({"dim_model": 12.5}, r"`dim_model` must be of type int, but is 12\.5"),
        ({"dim_model": True}, r"`dim_model` must be of type int, but is True"),
        ({"tied": 1}, r"`tied` must be of type bool, but is 1"),
        ({"cls_head": "two"}, r"`cls_head` must be of type int or NoneType, but is 'two'"),
        ({"num_layers": 0}, r"`num_layers` must be a positive integer, but is 0"),
        ({"dropout_p": 1.0}, r"`dropout_p` must be at least 0 and less than 1, but is 1\.0"),
        ({"norm_eps": -1}, r"`norm_eps` must not be negative, but is -1"),
        ({"norm_eps": "small"}, r"config\.json: .*small"),
        ({"dtype": "float17"}, r"`dtype` must be 'half' or the name of a torch dtype, but is 'float17'"),
        ({"model_type": "gpt2"}, r"`model_type` must be 'bert' for BertConfig, but is 'gpt2'"),
        ({"huggingface_fields": {"n_embd": 3}}, r"`huggingface_fields` must be of bos_token_id, .*, but holds n_embd"),
        ({"huggingface_fields": 3}, r"`huggingface_fields` must be of type dict or NoneType, but is 3"),
        ({"format_version": 2}, r"config\.json: `format_version` must be at most 1, but is 2"),
        ({"format_version": "new"}, r"`format_version` must be at most 1, but is 'new'"),
        ("{", r"config\.json is not valid JSON"),
        ("[1]", r"config\.json must hold a JSON object, but holds a list"),
    ],
)
def test_wrong_files_are_named_with_the_key(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        BertConfig.from_json_file(written(tmp_path, content))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`num_heads` must be a positive integer, but is -1"):
        GPT2Config(num_heads=-1)
    with pytest.raises(TypeError, match="dim_modle"):
        GPT2Config(dim_modle=1)  # type: ignore[call-arg]
    config = BertConfig(num_layers=1)
    config.num_layers = 0
    with pytest.raises(ValueError, match="`num_layers` must be a positive integer"):
        Bert(config)


def test_half_and_dtype() -> None:
    assert BertConfig().dtype is HALF
    assert BertConfig(half=False).dtype is torch.float32
    assert BertConfig(half=False, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert BertConfig(dtype=torch.float16).dtype is torch.float16


def test_published_identifiers_are_the_documented_ones() -> None:
    assert {cls.model_type: list(cls.published) for cls in CONFIGS} == {
        "bert": [
            "bert-base-cased",
            "bert-base-uncased",
            "bert-large-cased",
            "bert-large-uncased",
            "bert-base-chinese",
            "bert-base-multilingual-cased",
        ],
        "gpt2": ["gpt2-base", "gpt2-medium", "gpt2-large", "gpt2-xl"],
        "gptj": ["gptj-6b"],
        "t5": ["t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b"],
        "cpm1": ["cpm1-large"],
        "cpm2": ["cpm2-large"],
    }
    repositories = {name: repository for cls in CONFIGS for name, repository in cls.repositories().items()}
    assert repositories["bert-base-chinese"] == "google-bert/bert-base-chinese"
    assert repositories["gpt2-base"] == "openai-community/gpt2"
    assert repositories["gpt2-xl"] == "openai-community/gpt2-xl"
    assert repositories["gptj-6b"] == "EleutherAI/gpt-j-6b"
    assert repositories["t5-11b"] == "google-t5/t5-11b"
    assert repositories["cpm1-large"] is repositories["cpm2-large"] is None


def test_presets_have_the_published_number_of_parameters() -> None:
    counts = {}
    with use_engine(TorchEngine(torch.device("meta"))):
        for model in families.values():
            for name in model.config_class.published.keys() & (PUBLISHED.keys() | {"cpm1-large", "cpm2-large"}):
                made = model(model.config_class.preset(name))
                counts[name] = sum(parameter.numel() for parameter in made.parameters())
    assert {name: counts[name] for name in PUBLISHED} == PUBLISHED
    assert counts["cpm1-large"] == pytest.approx(2.6e9, rel=0.05)
    assert counts["cpm2-large"] == pytest.approx(11e9, rel=0.02)


def test_presets_agree_with_the_original_configurations(shared_dir: Path) -> None:
    files = sorted(shared_dir.glob("data/modelcenter_configs/*/*/config.json"))
    compared = 0
    for path in files:
        cls = families[path.parts[-3]].config_class if path.parts[-3] in families else None
        if cls is None or path.parts[-2] not in cls.published:
            continue
        original, preset = cls.from_json_file(path), cls.preset(path.parts[-2])
        # There the vocabulary of GPT-2 is counted without its padding id; these say nothing of what is computed.
        ignored = {"vocab_size", "half", "dtype", "proj_bias", "att_mask_value", "ffn_activate_fn", "tied"}
        ignored |= {"scale_decoder_outputs", "dropout_p"}
        for field in dataclasses.fields(cls):
            if field.name not in ignored and "_init_" not in field.name:
                assert getattr(preset, field.name) == getattr(original, field.name), (path, field.name)
        compared += 1
    assert compared == 18


def test_presets_are_what_the_weights_need() -> None:
    assert T5Config.preset("t5-small").tied
    assert T5Config.preset("t5-small").scale_decoder_outputs
    assert GPT2Config.preset("gpt2-xl").ffn_activate_fn == "gelu_new"
    assert BertConfig.preset("bert-base-uncased").tied
    assert CPM1Config.preset("cpm1-large").length_scale
    with pytest.raises(ValueError, match=r"no preset 't5-smal'; did you mean 't5-small'\? Known: t5-small, t5-base"):
        T5Config.preset("t5-smal")


def huggingface_options(**changes: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": 24, "n_head": 3, "n_layer": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, r"multiple of the number of heads \(5\), but is 24"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"`scale_attn_by_inverse_layer_idx` must be False"),
        ({"model_type": "bert"}, r"`model_type` must be 'gpt2' for GPT2Config, but is 'bert'.*load_model"),
    ],
)
def test_what_transformers_configurations_cannot_mean_here(changes: Any, message: str, tmp_path: Path) -> None:
    written(tmp_path, huggingface_options(**changes))
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_pretrained(tmp_path)


def test_transformers_configuration_is_translated(tmp_path: Path) -> None:
    written(tmp_path, huggingface_options(activation_function="gelu_pytorch_tanh"))
    config = GPT2Config.from_pretrained(tmp_path, dropout_p=0.0)
    assert (config.dim_model, config.num_heads, config.dim_head, config.dim_ff) == (24, 3, 8, 96)
    assert (config.vocab_size, config.ffn_activate_fn, config.dropout_p) == (50258, "gelu_tanh", 0.0)
    assert config.to_huggingface()["activation_function"] == "gelu_pytorch_tanh"


GPT_ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
T5_ALIASES = {
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "d_kv": "head_dim",
}


@pytest.mark.parametrize(
    ("cls", "aliases"),
    [(GPT2Config, GPT_ALIASES), (GPTjConfig, GPT_ALIASES), (T5Config, T5_ALIASES)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_names_that_all_families_of_transformers_share(cls: Any, aliases: dict[str, str], tmp_path: Path) -> None:
    sizes = dict(zip(aliases, (12, 3, 5, 7), strict=True))
    theirs = {"model_type": cls.model_type, **sizes}
    written(tmp_path, theirs)
    expected = cls.from_pretrained(tmp_path)
    assert (expected.dim_model, expected.num_heads, next(iter(expected.depths.values()))) == (12, 3, 5)
    written(tmp_path, {"model_type": cls.model_type} | {alias: sizes[name] for name, alias in aliases.items()})
    assert cls.from_pretrained(tmp_path) == expected
    for name, alias in aliases.items():
        written(tmp_path, {**theirs, alias: sizes[name]})
        assert cls.from_pretrained(tmp_path) == expected
        written(tmp_path, {**theirs, alias: 9})
        with pytest.raises(ValueError, match=f"`{alias}` must be that of `{name}`, {sizes[name]}, .* but is 9; leave"):
            cls.from_pretrained(tmp_path)


def there_and_back(cls: Any, theirs: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """What export writes of a Transformers configuration that was imported, and saved and loaded here."""
    path = written(tmp_path, theirs)
    config = cls.from_pretrained(tmp_path)
    config.to_json_file(path)
    again = cls.from_pretrained(tmp_path)
    assert again == config
    exported: dict[str, Any] = again.checked_huggingface()
    written(tmp_path, exported)
    assert cls.from_pretrained(tmp_path) == config
    return exported


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (BertConfig, {"pad_token_id": 5, "bos_token_id": 6, "eos_token_id": None}),
        (GPT2Config, {"pad_token_id": 5, "bos_token_id": None, "eos_token_id": [6, 7]}),
        (GPTjConfig, {"n_positions": 4096, "eos_token_id": 5}),
        (T5Config, {"pad_token_id": 3, "decoder_start_token_id": 4, "eos_token_id": 5}),
        (T5Config, {"decoder_start_token_id": 0}),
        (T5Config, {}),
    ],
    ids=str,
)
def test_fields_that_only_transformers_uses_go_back(cls: Any, given: dict[str, Any], tmp_path: Path) -> None:
    exported = there_and_back(cls, {"model_type": cls.model_type, **given}, tmp_path)
    names = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
    if cls is GPTjConfig:
        names.add("n_positions")
    assert {name: exported[name] for name in names & exported.keys()} == {
        **({"decoder_start_token_id": 0} if cls is T5Config else {}),  # which Transformers cannot do without
        **given,
    }


def test_dropout_at_the_embedding_is_exported() -> None:
    for cls in (GPT2Config, GPTjConfig):
        assert cls(dropout_p=0.25).to_huggingface()["embd_pdrop"] == 0.25


def test_cpm_has_no_transformers_configuration(tmp_path: Path) -> None:
    written(tmp_path, huggingface_options())
    with pytest.raises(ValueError, match="is a Transformers configuration, and CPM1Config has no counterpart"):
        CPM1Config.from_pretrained(tmp_path)
