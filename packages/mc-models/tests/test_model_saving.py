"""Directories of `save_pretrained`: the same model again, complete or not at all, also when the process is killed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from own_families import ROWS, Row, batch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from model_center.model import families, load_model
from model_center.model.checkpoint import Checkpoint, write_checkpoint
from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.model.source import LocalDirectory

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_model_again(row: Row, dtype: torch.dtype, tmp_path: Path) -> None:
    model = row.make(dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    again: Any = load_model(tmp_path / "saved")
    assert type(again) is type(model)
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == again.state_dict()[name].dtype == dtype
        assert torch.equal(tensor, again.state_dict()[name])
    ids, length = batch(0, [5, 3], 5)
    with torch.no_grad():
        outputs = [row.call(made, ids, length).last_hidden_state for made in (model, again)]
    assert torch.equal(*outputs)


def test_what_is_written(tmp_path: Path) -> None:
    model = ROWS[0].make()
    model.save_pretrained(tmp_path / "new" / "saved")
    assert sorted(path.name for path in (tmp_path / "new" / "saved").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "new" / "saved" / "config.json").read_text())
    assert (config["model_type"], config["format_version"], config["dim_model"]) == ("bert", 1, 16)
    with safe_open(tmp_path / "new" / "saved" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == model.state_dict().keys()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]


def test_legacy_directory_of_every_family(tmp_path: Path) -> None:
    """As ModelCenter wrote them: pytorch_model.pt with our names, and a configuration without a type."""
    for row in ROWS:
        model = row.make()
        directory = tmp_path / row.name
        directory.mkdir()
        torch.save(model.state_dict(), directory / "pytorch_model.pt")
        config = {
            key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "format_version")
        }
        (directory / "config.json").write_text(json.dumps(config))
        again = families[row.name.partition("-")[0]].from_pretrained(directory)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_other_files_stay_and_old_weights_go(tmp_path: Path) -> None:
    model = ROWS[0].make()
    (tmp_path / "vocab.txt").write_text("words")
    for size in (10**9, 4000, 3000, 10**9):
        with torch.no_grad():
            model.pooler.dense.bias.fill_(size)
        model.save_pretrained(tmp_path, max_file_bytes=size)
        loaded: Any = load_model(tmp_path)
        assert (loaded.pooler.dense.bias == size).all()
        names = {path.name for path in tmp_path.iterdir()}
        assert {"vocab.txt", "config.json"} <= names
        index = tmp_path / "model.safetensors.index.json"
        weights = {path.name for path in tmp_path.glob("*.safetensors")}
        if size == 10**9:
            assert weights == {"model.safetensors"}
            assert not index.exists()
        else:
            assert weights == set(json.loads(index.read_text())["weight_map"].values())
            assert len(weights) > 2
            for name in weights:
                sizes = [tensor.nbytes for tensor in load_file(tmp_path / name).values()]
                assert sum(sizes) <= size or len(sizes) == 1


class Failing(dict[str, Tensor]):
    """Tensors of which the last cannot be had."""

    def __getitem__(self, name: str) -> Tensor:
        if name == list(self)[-1]:
            raise RuntimeError("the disk is full")
        return super().__getitem__(name)


def test_a_failure_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(30), "b": torch.zeros(30)}
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_checkpoint(tmp_path / "new", {}, Failing(tensors), max_file_bytes=150)
    assert not list(tmp_path.iterdir())
    write_checkpoint(tmp_path / "old", {"x": 1}, tensors)
    with pytest.raises(RuntimeError, match="the disk is full"):
        write_checkpoint(tmp_path / "old", {"x": 2}, Failing({"a": torch.ones(30), "b": torch.ones(30)}))
    assert torch.equal(Checkpoint(LocalDirectory(tmp_path / "old")).read("a"), tensors["a"])
    assert json.loads((tmp_path / "old" / "config.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`directory` must be a directory, but .*file is a file"):
        ROWS[0].make().save_pretrained(tmp_path / "file")


WRITER = """
import sys, torch
from pathlib import Path
from model_center.model.checkpoint import write_checkpoint
print("ready", flush=True)
number = 0
while True:
    number += 1
    tensors = {f"t{index}": torch.full((2000,), float(number)) for index in range(8)}
    write_checkpoint(Path(sys.argv[1]), {"number": number}, tensors, 20_000 if number % 3 else 10**9)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    generator = random.Random(0)
    for attempt in range(2):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "saved")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(generator.uniform(0.2, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        checkpoint = Checkpoint(LocalDirectory(tmp_path / "saved"))
        values = {value for name in checkpoint.names() for value in checkpoint.read(name).unique().tolist()}
        assert len(checkpoint.names()) == 8, attempt
        assert len(values) == 1, attempt
        number = json.loads((tmp_path / "saved" / "config.json").read_text())["number"]
        assert values <= {number, number + 1}  # the configuration is replaced last


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_written_files_are_those_that_safetensors_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(7, 5).to(dtype),
        "transposed": torch.randn(4, 6).to(dtype).T,
        "view": torch.randn(100).to(dtype)[::3],
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.ones(0, 3, dtype=dtype),
        'names "of any" kind ü': torch.ones(2, dtype=dtype),
    }
    with SafetensorsWriter(tmp_path / "file", tensors) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
    with pytest.raises(ValueError, match=r"tensor 'x' must be of a type that safetensors has, but is torch\.complex64"):
        SafetensorsWriter(tmp_path / "other", ["x"]).add("x", torch.ones(1, dtype=torch.complex64))


def test_a_file_that_was_not_completed_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"), SafetensorsWriter(tmp_path / "file", ["a"]) as file:
        file.add("a", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "file")
