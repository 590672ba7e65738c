"""The README's commands and Python examples run, in order, as they stand."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_encoder import write_encoder, write_task

from model_center.recipe import read_status
from model_center.recipe.cli import main

README = Path(__file__).parents[1] / "README.md"


def run(command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "model-center"
    if arguments == ["quickstart"]:
        arguments += ["--max_steps", "1"]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    else:
        assert main(arguments) == 0


def test_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(Path("my-encoder"), position_size=512)
    write_task(Path("my-data"), train=24, dev=8)
    Path("my-text.txt").write_text("the sun is good\nis the river bad ?\n" * 40)
    # The quick start's own model and data take minutes; integration_tests runs them.
    monkeypatch.setattr("model_center.recipe.quickstart.minilm_path", lambda: Path("my-encoder"))
    monkeypatch.setattr("model_center.recipe.quickstart.sample_path", lambda: Path("my-data"))
    text = README.read_text(encoding="utf-8")
    examples = re.findall(r"^```(sh|yaml|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(examples) >= 9
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for language, example in examples:
        if language == "yaml":
            Path("run.yaml").write_text(example)
        elif language == "python":
            exec(compile(example, str(README), "exec"), vars(module))
        else:
            for command in example.splitlines():
                run(command)
    runs = ["quickstart", "boolq", "from-file", "seed-1", "boolq-again", "library", "my-text"]
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted(runs)
    assert all(read_status(Path("runs") / name)["state"] == "finished" for name in runs)
    assert module.probabilities.shape == (1, 2)


def test_the_files_of_a_run_are_those_of_the_table(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    given = ["--model.name", str(encoder), "--data.path", str(tasks), "--data.max_length", "32"]
    assert main(["finetune", *given, "--max_steps", "1", "--output", str(tmp_path / "run")]) == 0
    table = re.findall(r"^\| (`.*?) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name.rstrip("/") for cell in table for name in re.findall(r"`(.+?)`", cell)}
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert {name for name in found if name.count("/") == 0 and name != "checkpoints"} | {
        name for name in found if re.fullmatch(r"checkpoints/\w+", name)
    } == named
