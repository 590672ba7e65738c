"""What a pre-training run refuses before it begins, and what is told when the disk is full."""

import errno
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_pretraining import tiny_run

from model_center import recipe
from model_center.dataset import make_builder
from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.recipe import PretrainConfig, pretrain
from model_center.recipe.cli import main
from model_center.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    return tiny_run(encoder, tmp_path_factory.mktemp("pretraining"))


def test_disks_that_are_too_small(base: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(base, output=str(tmp_path / "run"))

    def warning(free: int) -> str | None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        job = recipe.prepare_pretraining(config)
        job.data.close()
        return job.warning

    assert warning(10**9) is None
    assert "there will be up to 5 (checkpoints.keep_last, keep_best)" in str(warning(200_000))
    with pytest.raises(ValueError, match=r"no space for checkpoints: a checkpoint takes .* kB, and 50\.0 kB are free"):
        warning(50_000)
    assert not Path(config.output).exists()


def test_a_missing_wandb_is_named_before_anything_begins(
    base: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = replace(base, output=str(tmp_path / "run"), wandb=recipe.WandbOptions(mode="offline"))
    with pytest.raises(ImportError, match='extra "wandb"'):
        pretrain(config)
    assert not Path(config.output).exists()


@pytest.fixture
def bad_corpus(base: PretrainConfig, tmp_path: Path) -> PretrainConfig:
    """A corpus with an id that the model does not have."""
    with make_builder(tmp_path / "train_1", dtype=np.uint16) as builder:
        for _ in range(9):
            builder.add_item(np.array([5, 6, 99, 7]))
            builder.end_document()
    return replace(base, output=str(tmp_path / "run"), data=replace(base.data, path=str(tmp_path)))


def failure(capsys: pytest.CaptureFixture[str], config: PretrainConfig, *options: str) -> str:
    """The message of the command on its way out with code 2."""
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(config.to_yaml())
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--config", str(file), *options])
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_samples_outside_the_vocabulary(bad_corpus: PretrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, bad_corpus)
    assert "holds the id 99, but the ids of the model and its tokenizer are 0 to 16" in error
    assert error.startswith("model-center pretrain: error: step 0: ")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk(
    base: PretrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "add", fail)
    checkpoints = replace(base.checkpoints, asynchronous=asynchronous)
    error = failure(capsys, replace(base, output=str(tmp_path / "run"), checkpoints=checkpoints))
    assert error.startswith("model-center pretrain: error: cannot write model.safetensors of checkpoint ")
    assert error.endswith("No space left on device; make room there, then go on with --resume auto")


def test_another_tokenizers_corpus(base: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = {"tokenizer": {"name": "old", "fingerprint": "f" * 64}}
    with make_builder(tmp_path / "train_1", dtype=np.uint16, provenance=provenance) as builder:
        builder.add_item(np.array([5, 6, 7]))
        builder.end_document()
    config = replace(base, output=str(tmp_path / "run"), data=replace(base.data, path=str(tmp_path)))
    assert "must be the one that made" in failure(capsys, config)
    assert not Path(config.output).exists()


def test_a_vocabulary_larger_than_the_embedding(
    base: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(base, output=str(tmp_path / "run"))
    assert len(load_tokenizer(base.data.tokenizer)) == 17
    message = "`vocab_size` of the model must be at least that of the tokenizer"
    assert message in failure(capsys, config, "--model.options.vocab_size", "16")
    assert not Path(config.output).exists()


def test_misspelt_options_of_the_model(
    base: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(base, output=str(tmp_path / "run"), model=replace(base.model, options={"num_layrs": 3}))
    error = failure(capsys, config)
    assert "num_layrs" in error
    assert "num_layers" in error
