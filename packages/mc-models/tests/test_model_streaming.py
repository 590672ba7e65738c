"""Checkpoints tensor by tensor: what is read, made and written only when it is asked for."""

from pathlib import Path

import pytest
import torch
from own_families import ROWS, Row

from model_center.engine import TorchEngine, use_engine
from model_center.model.base import Stored
from model_center.model.checkpoint import Checkpoint, write_checkpoint
from model_center.model.source import LocalDirectory, read_config
from model_center.model.transfer import Imported


def imported(row: Row, directory: Path) -> Imported:
    """A directory's tensors for a model that has shapes only."""
    model = row.make()
    source = LocalDirectory(directory)
    stored = Stored(Checkpoint(source), read_config(source)[0])
    with use_engine(TorchEngine(torch.device("meta"))):
        tensors: Imported = type(model)(model.config).import_of(stored).plan()
    return tensors


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_tensors_of_a_checkpoint_by_our_names(row: Row, tmp_path: Path) -> None:
    model = row.make()
    model.save_pretrained(tmp_path / "ours")
    places = [tmp_path / "ours"]
    if not row.name.startswith(("cpm", "gptj")):  # GPT-J has one norm where these random weights have two
        model.export_huggingface(tmp_path / "theirs", max_file_bytes=5000)
        places.append(tmp_path / "theirs")
    for place in places:
        tensors = imported(row, place)
        assert tensors.keys() == model.state_dict().keys()
        assert tensors.sources.keys() == tensors.rows.keys() == tensors.keys()
        assert set(tensors.sources.values()) <= set(Checkpoint(LocalDirectory(place)).names())
        for name, tensor in model.state_dict().items():
            padding = int(row.name == "gpt2" and place.name == "theirs" and name == "input_embedding.weight")
            assert torch.equal(tensors[name][: len(tensor) - padding], tensor[: len(tensor) - padding])


def test_problems_are_collected_without_an_error(tmp_path: Path) -> None:
    row = ROWS[0]
    state = row.make().state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    del state["encoder.output_layernorm.bias"]
    state["position_embedding.weight"] = torch.ones(3, 16)
    write_checkpoint(tmp_path, row.make().config.to_dict(), state | {"stray": torch.ones(1)})
    tensors = imported(row, tmp_path)
    assert tensors.absent == ["pooler"]
    assert tensors.problems.missing == ["encoder.output_layernorm.bias"]
    assert tensors.problems.unexpected == ["stray"]
    assert len(tensors.problems.misshaped) == 1
    assert "position_embedding.weight is (3, 16)" in tensors.problems.misshaped[0]


def test_export_without_a_head_names_no_class_that_has_one(tmp_path: Path) -> None:
    model = ROWS[0].make()
    config, tensors = model.exported(model.state_dict())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert "cls.predictions.transform.dense.weight" in tensors
    body = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head.")}
    config, tensors = model.exported(body)
    assert "architectures" not in config
    assert not any(name.startswith("cls.") for name in tensors)


def test_files_that_torch_has_saved_are_read_in_any_order(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(10 * number, 3) for number in range(1, 8)}
    torch.save(tensors, tmp_path / "pytorch_model.pt")
    checkpoint = Checkpoint(LocalDirectory(tmp_path))
    assert checkpoint.paths == [tmp_path / "pytorch_model.pt"]
    held = {name: checkpoint.read(name) for name in (*tensors, *reversed(tensors))}
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())


def test_other_files_are_part_of_what_appears_at_once(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("words")
    write_checkpoint(tmp_path / "new", {}, {"a": torch.ones(9), "b": torch.ones(9)}, 40, [tmp_path / "vocab.txt"])
    assert (tmp_path / "new" / "vocab.txt").read_text() == "words"
    paths = Checkpoint(LocalDirectory(tmp_path / "new")).paths
    assert [path.name for path in paths] == [
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError):
        write_checkpoint(tmp_path / "other", {}, {"a": torch.ones(9)}, others=[tmp_path / "absent"])
    assert not (tmp_path / "other").exists()
