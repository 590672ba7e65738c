"""What a run reads lies outside the directory that it writes, so that nothing of it is ever deleted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_center.recipe import (
    DataOptions,
    FinetuneConfig,
    ModelOptions,
    PretrainConfig,
    PretrainDataOptions,
    PretrainModelOptions,
    pretraining_resume,
)
from model_center.recipe.checkpoints import Found
from model_center.recipe.pretraining_resume import find_start

HOWS = {"begin": (False, False), "resume": (True, False), "overwrite": (False, True)}
"""Whether a run is to be resumed, and whether it may be overwritten."""


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    """A run whose output directory holds what an earlier one left before its first checkpoint."""
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / "status.json").write_text('{"format_version": 1}')
    (tmp_path / "text.txt").touch()
    return PretrainConfig(
        output=str(run),
        model=PretrainModelOptions(name="gpt2-base"),
        data=PretrainDataOptions(path=str(tmp_path / "ids"), text=str(tmp_path / "*.txt"), tokenizer="train:300"),
    )


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("option", ["model.name", "data.path", "data.text", "data.tokenizer"])
def test_inputs_of_pretraining(option: str, how: str, config: PretrainConfig) -> None:
    own = Path(config.output) / "tensorboard"
    (own / "lines.txt").touch()
    if option == "model.name":
        config = replace(config, model=replace(config.model, name=str(own)))
    else:
        # The pattern also fits files elsewhere.
        place = str(own.parents[1] / "**" / "*.txt") if option == "data.text" else str(own)
        changed: dict[str, Any] = {option.partition(".")[2]: place}
        config = replace(config, data=replace(config.data, **changed))
    resume, overwrite = HOWS[how]
    with pytest.raises(
        ValueError, match=rf"^{option} must lie outside the output directory '.*run', .*but is '.*board"
    ):
        find_start(config.resolved(), resume=resume, overwrite=overwrite)


def test_a_folder_that_tokenizing_would_make_in_the_output(config: PretrainConfig, tmp_path: Path) -> None:
    inside = replace(
        config, output=str(tmp_path / "new"), data=replace(config.data, path=str(tmp_path / "new" / "ids"))
    )
    with pytest.raises(ValueError, match=r"^data\.path must lie outside the output directory '.*new', .* is '.*ids'"):
        find_start(inside.resolved(), resume=False, overwrite=False)


def test_a_run_that_has_a_checkpoint_goes_on_with_what_lies_beside_it(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(config.output)
    found = Found(output / "checkpoints" / "step-00000001")
    monkeypatch.setattr(pretraining_resume, "find_newest", lambda *_, **__: found)
    inside = replace(config, data=replace(config.data, path=str(output / "ids")))
    assert find_start(inside.resolved(), resume=True, overwrite=False) == (found, False)


@pytest.mark.parametrize("option", ["model.name", "model.tokenizer", "data.path", "data.task"])
def test_inputs_of_finetuning(option: str, tmp_path: Path) -> None:
    best = tmp_path / "run" / "checkpoints" / "best.yaml"
    best.mkdir(parents=True)
    group, _, name = option.partition(".")
    options: dict[str, dict[str, Any]] = {"model": {"name": "bert-base-uncased"}, "data": {"path": "tasks"}}
    options[group][name] = str(best)
    model, data = ModelOptions(**options["model"]), DataOptions(**options["data"])
    with pytest.raises(ValueError, match=rf"^{option} must lie outside the output directory '.*run', .*but is '.*best"):
        FinetuneConfig(output=str(tmp_path / "run"), model=model, data=data).resolved()
