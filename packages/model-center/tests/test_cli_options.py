import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from model_center.recipe.cli import build_parser, files_first, main, resuming
from model_center.recipe.configuration import OptimizerOptions
from model_center.recipe.finetune_configuration import DataOptions, FinetuneConfig, ModelOptions, QuickstartConfig

REQUIRED = ["--output", "run", "--model.name", "model", "--data.path", "data"]


def parse(*arguments: str) -> FinetuneConfig:
    parser = build_parser()
    values = parser.instantiate(parser.parse_args(["finetune", *arguments])).finetune
    del values["config"], values["preset"], values["overwrite"]
    return FinetuneConfig(**vars(values))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message that the command prints on its way out with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def option_names(config_class: Any, prefix: str = "") -> list[str]:
    names = []
    for field in fields(config_class):
        names += (
            option_names(field.type, f"{prefix}{field.name}.") if is_dataclass(field.type) else [prefix + field.name]
        )
    return names


@pytest.mark.parametrize("config_class", [FinetuneConfig, QuickstartConfig])
def test_help_shows_every_option_with_its_description(config_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = "finetune" if config_class is FinetuneConfig else "quickstart"
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in option_names(config_class):
        _, _, described = text.partition(f" --{name} ")
        words = described.split()[1:]  # after the value's placeholder
        assert words, f"--{name} is not in the help"
        assert words[0][0].isupper(), f"--{name} has no description: {' '.join(words[:8])}"


@pytest.mark.parametrize(("option", "expected"), [("--version", "model-center 0."), ("--help", "quickstart")])
def test_what_the_command_says_about_itself(option: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([option])
    assert stopped.value.code == 0
    assert expected in capsys.readouterr().out


def test_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {name: from-file, pooling: cls}\ndata: {path: data}\noptimizer: {learning_rate: 1e-3}\nseed: 4\n"
    )
    config = parse("--config", str(file), "--output", "run", "--model.pooling", "pooler", "--seed", "5")
    assert config == FinetuneConfig(
        output="run",
        seed=5,
        model=ModelOptions(name="from-file", pooling="pooler"),
        data=DataOptions(path="data"),
        optimizer=OptimizerOptions(learning_rate=1e-3),
    )


@pytest.mark.parametrize(
    "given",
    [
        "--seed 5 --preset bert-superglue --config FILE --output run",
        "--seed=5 --config=FILE --output run --preset=bert-superglue",
        "--output run --config FILE --preset bert-superglue --seed 5",
    ],
)
def test_the_command_line_wins_over_files_and_these_over_a_preset_in_any_order(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: from-file}\ndata: {path: data}\nseed: 4\nepochs: 7\n")
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *given.replace("FILE", str(file)).split(), "--print_config"])
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert [config[option] for option in ("output", "seed", "epochs", "preset")] == ["run", 5, 7, None]
    assert (config["model"]["name"], config["model"]["pooling"]) == ("from-file", "pooler")


def test_files_stand_before_all_other_words() -> None:
    words = ["verify", "checkpoint", "--json", "--config", "a.yaml", "--dtype", "float64", "--config=b.yaml"]
    assert files_first(words) == [
        *("verify", "--config=a.yaml", "--config=b.yaml", "checkpoint", "--json", "--dtype", "float64")
    ]
    for unchanged in (["report", "run", "--config"], ["report", "--", "--config", "run"], ["--version"], []):
        assert files_first(unchanged) == unchanged


def test_the_resolved_configuration_reads_back_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = parse(*REQUIRED, "--optimizer.learning_rate", "2.5e-5", "--max_steps", "7").resolved()
    assert config.model.name == str(tmp_path / "model")
    assert config.data.path == str(tmp_path / "data")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    monkeypatch.chdir("/")
    assert parse("--config", str(tmp_path / "config.yaml")).resolved() == config
    assert set(yaml.safe_load(config.to_yaml())) == {field.name for field in fields(FinetuneConfig)}


def test_an_identifier_is_left_as_it_is() -> None:
    assert parse("--output", "run", "--model.name", "bert-base-uncased", "--data.path", "x").resolved().model.name == (
        "bert-base-uncased"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.learning_rte", "1"], r"--optimizer\.learning_rte.*did you mean '--optimizer\.learning_rate'"),
        (["--epochs", "1.5"], r"--epochs: expected int, got 1\.5"),
        (["--max_steps", "all"], "--max_steps: expected int, got all"),
        (["--model.precision", "fp8"], r"--model\.precision: expected one of \['half', 'bf16', 'fp32'\], got fp8"),
        (["--config", "missing.yaml"], r"File does not exist: '.*missing\.yaml'"),
        (["--epochs", "0"], "epochs must be positive, but is 0"),
        (["--max_steps", "0"], "max_steps must be positive, but is 0"),
        (["--log_every", "0"], "log_every must be positive, but is 0"),
        (["--seed", "-1"], "seed must be zero or positive, but is -1"),
        (["--output", ""], "output must be a directory, but is ''"),
        (["--data.batch_size", "0"], r"data\.batch_size must be positive, but is 0"),
        (["--data.max_length", "-3"], r"data\.max_length must be positive, but is -3"),
        (["--model.dropout", "1"], r"model\.dropout must be at least 0 and below 1, but is 1\.0"),
        (["--optimizer.learning_rate", "-1"], r"optimizer\.learning_rate must be positive and at most 1, but is -1\.0"),
        (["--optimizer.learning_rate", "3"], r"optimizer\.learning_rate must be positive and at most 1, but is 3\.0"),
        (["--optimizer.warmup_steps", "-1"], r"optimizer\.warmup_steps must be zero or positive, but is -1"),
        (["--optimizer.warmup_ratio", "2"], r"optimizer\.warmup_ratio must be between 0 and 1, but is 2\.0"),
        (["--optimizer.weight_decay", "-1"], r"optimizer\.weight_decay must be zero or positive"),
        (["--optimizer.beta1", "1"], r"optimizer\.beta1 must be at least 0 and below 1"),
        (["--optimizer.max_gradient_norm", "0"], r"optimizer\.max_gradient_norm must be positive"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "finetune", *REQUIRED, *arguments)
    assert re.search("^model-center finetune: error: .*" + message, error), error


def test_choices_are_checked_without_the_command_too() -> None:
    with pytest.raises(ValueError, match=r"model\.precision must be one of half, bf16, fp32, but is 'fp8'"):
        ModelOptions(name="model", precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.pooling must be one of mean, cls, pooler"):
        ModelOptions(name="model", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer\.schedule must be one of linear, cosine, noam, constant"):
        OptimizerOptions(schedule="step")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epocs: 3", "unknown option 'epocs'; did you mean '--epochs'"),
        ("model: {nme: 3}", r"unknown option 'model\.nme'; did you mean '--model\.name'"),
        ("epochs: many", r"bad\.yaml: --epochs: expected int, got many"),
        ("- 1", r"bad\.yaml: "),
        ("model: [", r"bad\.yaml: "),
    ],
)
def test_bad_configuration_files(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    error = failure(capsys, "finetune", *REQUIRED, "--config", str(tmp_path / "bad.yaml"))
    assert re.search("^model-center finetune: error: .*" + message, error), error


def test_one_preset_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "finetune", *REQUIRED, "--preset=bert-superglue", "--preset", "t5-squad")
    assert error.endswith("error: --preset must be given once, but is 'bert-superglue, t5-squad'")
    (tmp_path / "run.yaml").write_text("preset: t5-squad")
    error = failure(capsys, "finetune", "--output", "run", "--config", str(tmp_path / "run.yaml"))
    assert re.search(r"run\.yaml: preset must be given on the command line, as --preset t5-squad; leave it out", error)
    (tmp_path / "run.yaml").write_text("preset: null")  # as --print_config writes it
    assert parse(*REQUIRED, "--config", str(tmp_path / "run.yaml")).output == "run"


def test_missing_and_misspelt_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "following options are required: model.name, data.path" in failure(capsys, "finetune", "--output", "run")
    assert "unknown command 'finetun'" in (error := failure(capsys, "finetun"))
    assert "did you mean 'finetune'" in error
    assert "finetune,quickstart" in failure(capsys)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--resume auto"),
        ("--config run.yaml --resume auto", "--config run.yaml --resume auto"),
        ("--overwrite --resume=never --output 'my run'", "--output 'my run' --resume auto"),
    ],
)
def test_the_command_that_goes_on_after_an_interruption(
    given: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["pretrain", *shlex.split(given)]
    assert resuming(words) == f"model-center pretrain {expected}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resuming(words) == f"torchrun ... -m model_center.recipe pretrain {expected}"
