"""A few steps of fine-tuning on real rows with real vocabularies, for every family, with tiny random models."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model_center.model import families
from model_center.recipe import DataOptions, FinetuneConfig, ModelOptions, evaluate_checkpoint, finetune
from model_center.tokenizer import load_tokenizer

SIZES: dict[str, Any] = {"dim_model": 16, "num_heads": 2, "dim_head": 8, "dim_ff": 16}
ONE: dict[str, Any] = {"num_layers": 1}
BOTH: dict[str, Any] = {"num_encoder_layers": 1, "num_decoder_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert-base-uncased", {**ONE, "tied": True}),
    "gpt2": ("gpt2-base", ONE),
    "gptj": ("gptj-6b", {**ONE, "pos_rotary_dim": 4}),
    "t5": ("t5-small", {**BOTH, "tied": True}),
    "cpm1": ("cpm1-large", {**ONE, "tied": True}),
    "cpm2": ("cpm2-large", BOTH),
}
ROWS = {"train": 20, "dev": 10}


def cut(shared: Path, folder: Path) -> Path:
    """The first rows of the tasks."""
    data = shared / "data"
    for split, count in ROWS.items():
        name = {"dev": "val"}.get(split, split)
        for task in ("BoolQ", "COPA", "RTE", "WiC"):
            with (data / "superglue" / task / f"{name}.jsonl").open(encoding="utf-8") as rows:
                _write(folder / task / f"{name}.jsonl", "".join(itertools.islice(rows, count)))
        with (data / "fewglue" / "ReCoRD" / "train.jsonl").open(encoding="utf-8") as rows:
            _write(folder / "ReCoRD" / f"{name}.jsonl", "".join(itertools.islice(rows, 6)))
        with (data / "LCQMC" / "dev.tsv").open(encoding="utf-8") as rows:
            _write(folder / "LCQMC" / f"{split}.tsv", "".join(itertools.islice(rows, count + 1)))
        squad = json.loads((data / "squad" / f"{split}-v1.1.json").read_text(encoding="utf-8"))
        paragraphs = [{**squad["data"][0], "paragraphs": squad["data"][0]["paragraphs"][: count // 5]}]
        _write(folder / "SQuAD" / f"{split}-v1.1.json", json.dumps({"data": paragraphs}))
    return folder


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def data(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut(shared_dir, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("family", "tasks"),
    [
        ("bert", ["RTE"]),
        ("gpt2", ["COPA", "ReCoRD"]),
        ("gptj", ["WiC"]),
        ("t5", ["BoolQ", "SQuAD"]),
        ("cpm1", ["LCQMC"]),
        ("cpm2", ["LCQMC"]),
    ],
)
def test_real_rows(shared_dir: Path, data: Path, tmp_path: Path, family: str, tasks: list[str]) -> None:
    name, changes = MODELS[family]
    model_class, tokenizer = families[family], shared_dir / "data" / "modelcenter_configs" / family / name
    torch.manual_seed(0)
    config = model_class.config_class.from_dict({**vars_of(model_class, name), **SIZES, **changes})
    model_class(config).save_pretrained(tmp_path / "model")
    saved = tmp_path
    for task in tasks:
        options = FinetuneConfig(
            output=str(tmp_path / task),
            max_steps=2,
            model=ModelOptions(name=str(tmp_path / "model"), tokenizer=str(tokenizer)),
            data=DataOptions(path=str(data), task=task, max_length=320, batch_size=8),
        )
        result = finetune(options)
        assert result.last.step == 2
        saved = result.run.checkpoint("last")
        again = evaluate_checkpoint(saved, data)
        assert again.scores == result.last.scores
        assert again.loss == pytest.approx(result.last.loss, rel=1e-5)
    assert len(load_tokenizer(saved)) == len(load_tokenizer(tokenizer))


def vars_of(model_class: Any, name: str) -> dict[str, Any]:
    """The published configuration's vocabulary and positions."""
    preset = model_class.config_class.preset(name)
    return {key: value for key, value in vars(preset).items() if key in ("vocab_size", "position_size")}
