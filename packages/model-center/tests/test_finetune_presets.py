"""The presets of fine-tuning: whole but for what they ask for, and of models and tasks that there are."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_encoder import write_encoder, write_task

from model_center.model import families
from model_center.recipe.cli import build_parser, main
from model_center.recipe.finetune_configuration import FinetuneConfig
from model_center.recipe.shipped import preset_names, preset_path
from model_center.recipe.task_input import TASK_INPUTS

PUBLISHED = {name: family for family in families.values() for name in family.config_class.published}
NAMES = preset_names("finetune")


def preset(name: str) -> FinetuneConfig:
    """The configuration of a preset, with what it asks for."""
    file = preset_path("finetune", name)
    arguments = ["finetune", "--config", str(file), "--output", "run", "--data.path", "data"]
    if "name" not in yaml.safe_load(file.read_text())["model"]:
        arguments += ["--model.name", "weights"]
    parser = build_parser()
    values: dict[str, Any] = vars(parser.instantiate(parser.parse_args(arguments)).finetune)
    return FinetuneConfig(**{key: values[key] for key in FinetuneConfig.__dataclass_fields__})


def test_there_is_one_for_every_documented_example() -> None:
    superglue = {f"{family}-superglue" for family in ("bert", "gpt2", "gptj", "t5")}
    assert {*superglue, "t5-squad", "cpm1-lcqmc", "cpm2-lcqmc"} == set(NAMES)
    with pytest.raises(ValueError, match=r"no preset 't5-squat', only .*; did you mean 't5-squad'"):
        preset_path("finetune", "t5-squat")


@pytest.mark.parametrize("name", NAMES)
def test_models_and_tasks_exist(name: str) -> None:
    config = preset(name)
    family = families[config.model.family] if config.model.family else PUBLISHED[config.model.name]
    model_type = family.config_class.model_type
    assert name.startswith(model_type)
    assert config.data.task in TASK_INPUTS[model_type].tasks
    if config.model.name in PUBLISHED:
        size = getattr(family.config_class.preset(config.model.name), "position_size", None)
        assert config.data.max_length <= (size or 512)


def test_the_quick_start_of_the_document() -> None:
    """Noam with start_lr 1e-5 and 100 steps of warm-up is highest at 1e-5 / sqrt(100)."""
    config = preset("bert-superglue")
    assert (config.epochs, config.data.batch_size, config.data.max_length) == (5, 64, 512)
    assert (config.optimizer.schedule, config.optimizer.warmup_steps) == ("noam", 100)
    assert config.optimizer.learning_rate == pytest.approx(1e-5 / 100**0.5)
    assert config.optimizer.max_gradient_norm == 10.0
    assert (config.model.pooling, config.model.dropout) == ("pooler", 0.0)


def test_a_preset_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(Path("model"), position_size=512)
    write_task(Path("data"), train=8, dev=4)
    given = ["--model.name", "model", "--data.path", "data", "--optimizer.warmup_steps", "0", "--output", "run"]
    assert main(["finetune", "--preset", "bert-superglue", *given, "--max_steps", "1"]) == 0
    resolved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (resolved["optimizer"]["max_gradient_norm"], resolved["data"]["batch_size"]) == (10.0, 64)
