"""Where checkpoints come from, and what is said of those that are wrong: no network, small models."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from comparison import assert_equal
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_center.model import GPT2, T5, Bert, BertConfig, GPT2Config, T5Config, load_model
from model_center.model.source import resolve

TINY: dict[str, Any] = {"dim_model": 12, "num_heads": 2, "dim_head": 6, "dim_ff": 20, "vocab_size": 17}
STACK = TINY | {"num_layers": 2, "position_size": 9}
State = dict[str, Tensor]


def tiny_bert(**changes: Any) -> Bert:
    torch.manual_seed(3)
    return Bert(BertConfig(**{**STACK, "tied": True, **changes})).eval()


def pooled(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(torch.tensor([[1, 2, 3]])).pooler_output
    return output


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(torch.tensor([[1, 2, 3]]), return_logits=True)
    return output


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A directory in Hugging Face's layout."""
    tiny_bert().export_huggingface(tmp_path / "exported")
    return tmp_path / "exported"


def rewrite(directory: Path, change: Callable[[State], State]) -> None:
    state = change(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


# The Hugging Face hub's cache


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: Path) -> Path:
    """A hub cache that holds bert-base-uncased in two revisions, on a machine without a network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--google-bert--bert-base-uncased"
    (repository / "refs").mkdir(parents=True)
    for revision, commit in {"main": "a" * 40, "old": "b" * 40}.items():
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in exported.iterdir():
            (snapshot / path.name).write_bytes(path.read_bytes())
        if revision == "old":
            rewrite(snapshot, lambda state: {name: tensor * 2 for name, tensor in state.items()})
    return cache


@pytest.mark.usefixtures("hub")
def test_identifier_is_read_from_the_hub_cache() -> None:
    model = Bert.from_pretrained("bert-base-uncased")
    assert_equal(pooled(model), pooled(tiny_bert()))
    assert not model.training
    assert BertConfig.from_pretrained("bert-base-uncased", cls_head=4).cls_head == 4
    assert BertConfig.from_pretrained("bert-base-uncased", local_files_only=True) == model.config
    by_name = load_model("google-bert/bert-base-uncased", local_files_only=True)
    assert torch.equal(pooled(by_name), pooled(model))


@pytest.mark.usefixtures("hub")
def test_revision_is_honoured() -> None:
    main, old, commit = (
        Bert.from_pretrained("bert-base-uncased", revision=name).pooler.dense.weight
        for name in ("main", "old", "b" * 40)
    )
    assert torch.equal(old, commit)
    assert torch.equal(old, 2 * main)
    with pytest.raises(FileNotFoundError, match=r"google-bert/bert-base-uncased \(revision gone\) has no config\.json"):
        Bert.from_pretrained("bert-base-uncased", revision="gone")


@pytest.mark.usefixtures("hub")
def test_identifier_that_is_not_in_the_cache() -> None:
    with pytest.raises(FileNotFoundError, match=r"google-bert/bert-large-cased.*has no config\.json; if .*offline"):
        Bert.from_pretrained("bert-large-cased")
    with pytest.raises(FileNotFoundError, match="somebody/something"):
        Bert.from_pretrained("somebody/something")
    with pytest.raises(FileNotFoundError, match="cannot find Hugging Face repository some body/some thing"):
        Bert.from_pretrained("some body/some thing")


@pytest.mark.usefixtures("hub")
def test_cached_repository_without_weights(hub: Path) -> None:
    (hub / "models--google-bert--bert-base-uncased" / "snapshots" / ("a" * 40) / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"holds no weights; looked for model\.safetensors, .*pytorch_model\.pt"
    ):
        Bert.from_pretrained("bert-base-uncased")


# Names and directories


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "bert-base-uncase",
            r"'bert-base-uncase' is neither a directory nor a known identifier; did you mean bert-base-unc",
        ),
        ("./bert-base-uncased", "neither a directory nor a known identifier"),
        ("nonsense", "Known identifiers: bert-base-cased, bert-base-uncased"),
    ],
)
def test_misspelt_identifier(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        Bert.from_pretrained(name)


def test_cpm_directories_must_be_local() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"cpm1-large are in no Hugging Face repository: pass a local directory"
    ):
        load_model("cpm1-large")


def test_file_in_place_of_a_directory(exported: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file; give the directory"):
        Bert.from_pretrained(exported / "model.safetensors")


def test_directory_without_weights_or_configuration(exported: Path, tmp_path: Path) -> None:
    (exported / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"exported holds no weights; looked for model\.safetensors, model\.safe"
    ):
        Bert.from_pretrained(exported)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no config\.json"):
        Bert.from_pretrained(tmp_path / "empty")


def test_identifier_of_a_directory_wins(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    exported.rename("bert-base-cased")
    assert resolve("bert-base-cased", BertConfig.repositories()).description == "directory bert-base-cased"


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_file_is_named(damage: str, name: str, exported: Path) -> None:
    state = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    path = exported / name
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    content = {"truncated": path.read_bytes()[:-100], "foreign": b"not tensors at all" * 10, "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name):
        Bert.from_pretrained(exported)


class Foreign:
    """Something that a file of tensors must not hold."""


@pytest.mark.parametrize("content", [{"a": Foreign()}, [torch.zeros(1)], {"a": 1}])
def test_nothing_but_tensors_is_unpickled(content: Any, exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    torch.save(content, exported / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*dictionary of tensors"):
        Bert.from_pretrained(exported)


@pytest.mark.parametrize("kind", ["bin", "old-bin", "pt", "sharded-bin", "sharded-safetensors"])
def test_all_kinds_of_files(kind: str, exported: Path) -> None:
    expected = logits(Bert.from_pretrained(exported))
    state = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    if kind in ("bin", "old-bin"):
        torch.save(state, exported / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    elif kind == "pt":
        torch.save(state, exported / "pytorch_model.pt")
    else:
        stem, ending = ("pytorch_model", "bin") if "bin" in kind else ("model", "safetensors")
        shards: dict[str, State] = {f"{stem}-1.{ending}": {}, f"{stem}-2.{ending}": {}}
        weight_map = {name: f"{stem}-{1 + number % 2}.{ending}" for number, name in enumerate(state)}
        for name, file_name in weight_map.items():
            shards[file_name][name] = state[name]
        for file_name, part in shards.items():
            torch.save(part, exported / file_name) if "bin" in kind else save_file(part, exported / file_name)
        (exported / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(Bert.from_pretrained(exported)), expected)


@pytest.mark.parametrize("problem", ["missing file", "missing tensor", "no map"])
def test_index_that_promises_too_much(problem: str, exported: Path) -> None:
    tiny_bert().export_huggingface(exported, max_file_bytes=2000)
    index = exported / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if problem == "missing file":
        (exported / content["weight_map"]["bert.pooler.dense.bias"]).unlink()
        message = r"index\.json names files that are missing from directory .*model-0000"
    elif problem == "missing tensor":
        content["weight_map"]["bert.more"] = content["weight_map"]["bert.pooler.dense.bias"]
        message = r"index\.json names tensors that its files do not hold: \['bert\.more'\]"
    else:
        del content["weight_map"]
        message = r"index\.json must hold a `weight_map`"
    index.write_text(json.dumps(content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Bert.from_pretrained(exported)


# Names in the checkpoint


def test_names_of_older_checkpoints(exported: Path) -> None:
    expected = logits(Bert.from_pretrained(exported))

    def as_old(state: State) -> State:
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in state.items()
        }
        decoder = state["bert.embeddings.word_embeddings.weight"].clone()
        return old | {"bert.embeddings.position_ids": torch.arange(9)[None], "cls.predictions.decoder.weight": decoder}

    rewrite(exported, as_old)
    assert torch.equal(logits(Bert.from_pretrained(exported)), expected)


def test_buffers_and_copies_of_published_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2(GPT2Config(**STACK)).eval()
    gpt2.export_huggingface(tmp_path / "gpt2")

    def as_published(state: State) -> State:
        base = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        return base | {"h.1.attn.bias": torch.ones(1, 1, 9, 9), "h.0.attn.masked_bias": torch.tensor(-1e4)}

    rewrite(tmp_path / "gpt2", as_published)
    assert torch.equal(logits(GPT2.from_pretrained(tmp_path / "gpt2"))[..., :-1], logits(gpt2)[..., :-1])

    directory = t5_with(tmp_path / "t5", {})
    shared = load_file(directory / "model.safetensors")["shared.weight"]
    copies = {f"{stack}.embed_tokens.weight": shared.clone() for stack in ("encoder", "decoder")}
    bias = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 2)}
    rewrite(directory, lambda state: state | copies | bias)
    assert torch.equal(T5.from_pretrained(directory).input_embedding.weight, shared)


def test_two_names_for_the_same_tensor(exported: Path) -> None:
    rewrite(exported, lambda state: state | {"pooler.dense.bias": torch.zeros(12)})
    with pytest.raises(ValueError, match=r"1 unexpected in the checkpoint:\n  (bert\.)?pooler\.dense\.bias$"):
        Bert.from_pretrained(exported)


def test_configuration_of_another_family(exported: Path) -> None:
    with pytest.raises(ValueError, match="`config` must be a BertConfig, but is a GPT2Config"):
        Bert.from_pretrained(exported, GPT2Config(**STACK))


def test_heads_may_be_absent_or_left_over_but_are_named(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "model_center.model")
    expected = pooled(Bert.from_pretrained(exported))
    assert not caplog.messages

    def as_base(state: State) -> State:
        return {name.removeprefix("bert."): tensor for name, tensor in state.items() if name.startswith("bert.")}

    rewrite(exported, as_base)
    assert torch.equal(pooled(Bert.from_pretrained(exported)), expected)
    assert len(caplog.messages) == 1
    assert "has no weights for lm_head; it is newly initialised" in caplog.messages[0]
    rewrite(exported, lambda state: {name: tensor for name, tensor in state.items() if "pooler" not in name})
    Bert.from_pretrained(exported)
    assert "has no weights for lm_head, pooler" in caplog.messages[1]


def test_language_model_head_gives_way_to_classes(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(exported, lambda state: state | {"cls.seq_relationship.weight": torch.zeros(2, 12)})
    model = Bert.from_pretrained(exported, BertConfig.from_pretrained(exported, cls_head=3))
    assert logits(model).shape == (1, 3, 3)
    assert torch.equal(pooled(model), pooled(Bert.from_pretrained(exported)))
    assert "no weights for cls_projection" in caplog.messages[0]
    assert "no use for" in caplog.messages[1]
    assert "cls.predictions.transform.dense.weight" in caplog.messages[1]
    assert "cls.seq_relationship.weight" in caplog.messages[1]


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertForMultipleChoice"])
def test_classifier_of_pooled_states_is_no_head_over_every_position(
    architecture: str, exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(exported, lambda state: state | {"classifier.weight": torch.ones(3, 12), "classifier.bias": torch.ones(3)})
    options = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(options | {"architectures": [architecture]}))
    config = BertConfig.from_pretrained(exported, cls_head=3)
    with pytest.raises(
        ValueError,
        match=rf"`cls_head` must be None for {architecture} in directory .*, .* but is 3; .*`save_pretrained`",
    ):
        Bert.from_pretrained(exported, config)
    caplog.clear()
    body = Bert.from_pretrained(exported)
    assert "no use for: ['classifier.bias', 'classifier.weight']" in caplog.messages[0]
    body.save_pretrained(tmp_path / "ours")  # as the message says
    assert Bert.from_pretrained(tmp_path / "ours", config).cls_projection.weight.shape == (3, 12)
    (exported / "config.json").write_text(json.dumps(options | {"architectures": ["BertForTokenClassification"]}))
    assert (Bert.from_pretrained(exported, config).cls_projection.weight == 1).all()


def test_part_of_a_head_is_an_error(exported: Path) -> None:
    rewrite(
        exported, lambda state: {name: tensor for name, tensor in state.items() if "transform.dense.weight" not in name}
    )
    with pytest.raises(ValueError, match=r"1 missing from the checkpoint:\n  lm_head\.dense\.weight$"):
        Bert.from_pretrained(exported)


def test_copies_that_differ_are_an_error(exported: Path) -> None:
    tiny_bert(tied=True).export_huggingface(exported)
    rewrite(exported, lambda state: state | {"cls.predictions.decoder.weight": torch.ones(17, 12)})
    assert not Bert.from_pretrained(exported).config.tied  # an output projection of its own
    with pytest.raises(ValueError, match=r"copies that differ:\n.*encoder\.embed_tokens\.weight and shared\.weight"):
        T5.from_pretrained(t5_with(exported.parent / "t5", {"encoder.embed_tokens.weight": torch.ones(17, 12)}))


def t5_with(directory: Path, more: State) -> Path:
    torch.manual_seed(0)
    T5(T5Config(**TINY, num_encoder_layers=1, num_decoder_layers=1, tied=True)).export_huggingface(directory)
    rewrite(directory, lambda state: state | more)
    return directory


def test_every_problem_is_told_at_once(exported: Path) -> None:
    def damage(state: State) -> State:
        del state["bert.encoder.layer.1.attention.self.query.weight"], state["bert.embeddings.LayerNorm.bias"]
        state["bert.pooler.dense.weight"] = torch.zeros(3, 4)
        return state | {"bert.encoder.layer.2.output.dense.weight": torch.zeros(1), "surprise": torch.zeros(1)}

    rewrite(exported, damage)
    with pytest.raises(ValueError, match="cannot load") as caught:
        Bert.from_pretrained(exported)
    told = str(caught.value).splitlines()
    assert told[0] == f"cannot load {exported / 'model.safetensors'} into Bert:"
    assert told[1:] == [
        "2 missing from the checkpoint:",
        "  encoder.layers.0.self_att.layernorm_before_attention.bias",
        "  encoder.layers.1.self_att.self_attention.project_q.weight",
        "2 unexpected in the checkpoint:",
        "  bert.encoder.layer.2.output.dense.weight",
        "  surprise",
        "1 of the wrong shape:",
        "  pooler.dense.weight is (3, 4) (from bert.pooler.dense.weight (3, 4)), must be (12, 12)",
    ]


def test_t5_checkpoint_in_gpt2(tmp_path: Path) -> None:
    directory = t5_with(tmp_path / "t5", {})
    with pytest.raises(ValueError, match=r"`model_type` must be 'gpt2' for GPT2Config, but is 't5'"):
        GPT2.from_pretrained(directory)
    T5.from_pretrained(directory).save_pretrained(tmp_path / "own")
    config = GPT2Config(**STACK)
    for source in (directory, tmp_path / "own"):
        with pytest.raises(ValueError, match="into GPT2") as caught:
            GPT2.from_pretrained(source, config)
        told = str(caught.value)
        assert "encoder.layers.1.ffn.ffn.w_out.weight" in told
        assert "position_embedding.weight" in told
        assert "decoder" in told
        assert "unexpected" in told


def test_half_a_checkpoint(exported: Path) -> None:
    names = [name for name in load_file(exported / "model.safetensors") if "layer.1." in name]
    rewrite(exported, lambda state: {name: tensor for name, tensor in state.items() if name not in names})
    with pytest.raises(ValueError, match=f"{len(names)} missing"):
        Bert.from_pretrained(exported)


def test_load_model_needs_a_known_type(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    for model_type, message in (("nonsense", "but is 'nonsense'"), (None, "is missing, as in legacy directories")):
        config["model_type"] = model_type
        (exported / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
        with pytest.raises(ValueError, match=rf"`model_type` must be one of bert, .*{message}"):
            load_model(exported)


def test_transformers_file_with_an_unknown_activation(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    with pytest.raises(ValueError, match="`activate_fn` must be one of"):
        Bert.from_pretrained(exported)
