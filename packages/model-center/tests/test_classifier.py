import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import write_encoder

from model_center.model import Bert, load_model
from model_center.recipe.classifier import (
    EncoderClassifier,
    HeadConfig,
    load_classifier,
)
from model_center.recipe.task_model import load_backbone
from model_center.tokenizer import load_tokenizer


def head(**changes: Any) -> HeadConfig:
    options: dict[str, Any] = {"task": "BoolQ", "num_classes": 2, "max_length": 32, "pooling": "mean", "dropout": 0.0}
    return HeadConfig(**options | changes)


def classifier(encoder: Path, **changes: Any) -> EncoderClassifier:
    torch.manual_seed(1)
    return EncoderClassifier(Bert.from_pretrained(encoder), head(**changes)).eval()


def batch_of(rows: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(5, 17, (rows, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "token_type_ids": (torch.arange(length) >= 3).long().expand(rows, length),
    }


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_pooling_row_by_row(encoder: Path, pooling: Literal["mean", "cls", "pooler"]) -> None:
    model = classifier(encoder, pooling=pooling, num_classes=3)
    batch = batch_of(4, 9)
    expected = []
    for row in range(4):
        real = int(batch["attention_mask"][row].sum())
        ids, types = (batch[name][row : row + 1, :real] for name in ("input_ids", "token_type_ids"))
        output = model.encoder(input_ids=ids, token_type_ids=types)
        vector = {
            "mean": output.last_hidden_state[0].sum(0) / real,
            "cls": output.last_hidden_state[0, 0],
            "pooler": output.pooler_output[0],
        }[pooling]
        expected.append(model.classifier.weight @ vector + model.classifier.bias)
    torch.testing.assert_close(model(batch), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_token_types_are_used(encoder: Path) -> None:
    model, batch = classifier(encoder), batch_of(2, 6)
    without = {name: value for name, value in batch.items() if name != "token_type_ids"}
    assert not torch.allclose(model(batch), model(without))


def test_a_multiple_choice_task_has_one_score_a_choice(encoder: Path) -> None:
    model = classifier(encoder, num_choices=2)
    single = EncoderClassifier(model.encoder, head(num_classes=1))
    single.classifier = model.classifier
    choices = [batch_of(3, 7, seed) for seed in (1, 2)]
    batch = {f"{name}{number}": value for number, choice in enumerate(choices) for name, value in choice.items()}
    expected = torch.cat([single(choice) for choice in choices], dim=1)
    assert expected.shape == (3, 2)
    torch.testing.assert_close(model(batch), expected)


def test_dropout_acts_in_training_only(encoder: Path) -> None:
    model, batch = classifier(write_encoder_without_dropout(encoder), dropout=0.5), batch_of(2, 6)
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


def write_encoder_without_dropout(encoder: Path) -> Path:
    directory = encoder.with_name("no-dropout")
    return directory if directory.exists() else write_encoder(directory, dropout_p=0.0, att_dropout_p=0.0)


def test_save_and_load(encoder: Path, tmp_path: Path) -> None:
    model, batch = classifier(encoder, num_classes=3, pooling="pooler"), batch_of(3, 8)
    model.save(load_tokenizer(encoder), tmp_path)
    loaded, tokenizer = load_classifier(tmp_path)
    assert not loaded.training
    assert loaded.head == model.head
    assert torch.equal(loaded(batch), model(batch))
    assert tokenizer.encode("sun is good") == load_tokenizer(encoder).encode("sun is good")
    alone = Bert.from_pretrained(tmp_path)
    assert torch.equal(alone.input_embedding.weight, model.encoder.input_embedding.weight)


def test_broken_checkpoints_are_named(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no classifier: classifier\.json cannot be read"):
        load_classifier(encoder)
    classifier(encoder).save(load_tokenizer(encoder), tmp_path)
    weights = tmp_path / "classifier.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"classifier\.safetensors cannot be read"):
        load_classifier(tmp_path)
    weights.write_bytes(whole)
    values = json.loads((tmp_path / "classifier.json").read_text())
    for changed, message in (
        ({"format_version": 9}, "format version 9; this version reads up to 1"),
        ({"pooling": "max"}, "pooling must be one of mean, cls, pooler, but is 'max'"),
        ({"num_classes": 3}, r"weight is \(2, 16\), must be \(3, 16\)"),
        ({"size": 3}, "size"),
    ):
        (tmp_path / "classifier.json").write_text(json.dumps(values | changed))
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path)


def test_nobody_hears_of_a_head_that_the_checkpoint_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_encoder(tmp_path) / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.startswith("lm_head")}, file)
    load_model(tmp_path)
    assert "no weights for lm_head" in caplog.text
    caplog.clear()
    load_backbone(tmp_path)
    assert not caplog.records
