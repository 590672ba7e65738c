"""The command `model-center plan`: its tables, its proposals and what it refuses."""

import re
from pathlib import Path

import pytest

from model_center.recipe.cli import main
from model_center.recipe.memory_prediction import GIB
from model_center.recipe.planning import parse_memory


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("80G", 80 * GIB), ("1.5 GB", 3 * GIB // 2), ("512MiB", GIB // 2), ("9", 9)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


def plan(encoder: Path, *more: str) -> int:
    given = ["--output", "none", "--model.name", str(encoder), "--data.path", "none", "--data.tokenizer", str(encoder)]
    return main(["plan", *given, "--data.max_length", "32", "--batch.micro_size", "4", *more])


@pytest.mark.parametrize("preset", ["gpt2-tiny-text", "bert-tiny-text", "t5-tiny-text"])
def test_tokenizers_that_a_run_will_train(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", preset]) == 0
    rows = dict(line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line)
    assert float(rows["GPU memory needed, with CUDA and fragmentation "]) > 0.5


def test_command(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(encoder, "--memory", "2GiB", "--world_size", "2", "--model.options.num_layers", "3") == 0
    text = capsys.readouterr().out
    assert "micro-batch of 4 rows of 32 tokens; 2 GPUs" in text
    assert "What fits into 2.0 GiB" in text
    rows = re.findall(r"^ +(yes|no) │ +([23]) │ +(yes|no) │ +([\d,]+) │", text, re.MULTILINE)
    assert [row[:3] for row in rows] == [
        (recomputes, level, offload) for offload in ("no", "yes") for recomputes in ("no", "yes") for level in "23"
    ]


def test_a_budget_is_offered_beside_the_other_settings(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(encoder, "--memory", "2GiB", "--engine.compile=true", "--engine.activation_budget=0.5") == 0
    text = capsys.readouterr().out
    assert re.findall(r"^ *(no|yes|beyond 50%) │", text, re.MULTILINE) == 2 * ["no", "beyond 50%", "yes"]
    assert "planned as if they were not" in text
    plan(encoder, "--memory", "2GiB")
    assert "compiled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "memory must be a size such as 80GiB, but is 'much'"),
        (["--world_size", "0"], "world_size must be positive, but is 0"),
        (
            ["--model.name", "gpt2-xxl"],
            "model.name must be a directory or a published size, but is 'gpt2-xxl'; did you",
        ),
        (["--model.options.num_layer", "3"], "has no option `num_layer`; the nearest one is `num_layers`"),
        (["--data.max_length", "1000"], "data.max_length must be at most the model's position_size (32), but is 1000"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan(encoder, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
