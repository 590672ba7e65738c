import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from model_center import recipe
from model_center.recipe import PretrainConfig
from model_center.recipe.cli import main, with_preset


def config(**changes: Any) -> PretrainConfig:
    model, data = (
        recipe.PretrainModelOptions(name="gpt2-base"),
        recipe.PretrainDataOptions(path="tokens", tokenizer="words"),
    )
    options: dict[str, Any] = {"output": "run", "model": model, "data": data}
    return PretrainConfig(**options | changes)


def parse(*arguments: str) -> PretrainConfig:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PretrainConfig)
    values = parser.instantiate(parser.parse_args(list(arguments)))
    del values["config"]
    return PretrainConfig(**vars(values))


def test_options_of_the_model_by_name() -> None:
    given = ["--output", "run", "--model.name", "gpt2-base", "--data.path", "tokens", "--data.tokenizer", "words"]
    found = parse(*given, "--model.options.num_layers", "4", "--model.options.dropout_p", "0.0")
    assert found == config(
        model=recipe.PretrainModelOptions(name="gpt2-base", options={"num_layers": 4, "dropout_p": 0.0})
    )


def test_the_resolved_configuration_reads_back_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words").mkdir()
    model = recipe.PretrainModelOptions(name="t5-small", options={"num_encoder_layers": 2, "tied": True})
    data = recipe.PretrainDataOptions(path="tokens", tokenizer="words", text="book.txt")
    resolved = config(model=model, data=data, batch=recipe.BatchOptions(global_size=6)).resolved()
    assert resolved.model == model
    assert (resolved.output, resolved.data.path) == (str(tmp_path / "run"), str(tmp_path / "tokens"))
    assert (resolved.data.text, resolved.data.tokenizer) == (str(tmp_path / "book.txt"), str(tmp_path / "words"))
    Path("config.yaml").write_text(resolved.to_yaml())
    monkeypatch.chdir("/")
    assert parse("--config", str(tmp_path / "config.yaml")).resolved() == resolved
    assert set(yaml.safe_load(resolved.to_yaml())) == {field.name for field in fields(PretrainConfig)}


@pytest.mark.parametrize(
    ("text", "corpus"), [("sample:shakespeare", "shakespeare"), ("/books/austen.txt", "austen.txt"), (None, "ids")]
)
def test_the_corpus_is_called_by_its_name(text: str | None, corpus: str) -> None:
    assert replace(config().data, path="/data/ids", text=text).corpus == corpus


BAD: dict[str, Callable[[], object]] = {
    r"model\.name must be a directory or the name of a published size": lambda: recipe.PretrainModelOptions(name=""),
    r"model\.precision must be one of half, bf16, fp32, but is 'fp8'": lambda: recipe.PretrainModelOptions(
        name="gpt2-base",
        precision="fp8",  # type: ignore[arg-type]
    ),
    r"model\.options\.dtype is decided by model\.precision": lambda: recipe.PretrainModelOptions(
        name="gpt2-base", options={"dtype": "float32"}
    ),
    r"data\.objective must be one of causal, .*, but is 'magic'": lambda: replace(
        config().data,
        objective="magic",  # type: ignore[arg-type]
    ),
    r"data\.max_length must be at least 4, but is 3": lambda: replace(config().data, max_length=3),
    r"data\.max_target_length must be at least 3": lambda: replace(config().data, max_target_length=2),
    r"data\.mask_share must be above 0 and below 1": lambda: replace(config().data, mask_share=1.0),
    r"data\.mean_span must be at least 1, but is 0\.5": lambda: replace(config().data, mean_span=0.5),
    r"data\.pack must be true with data\.full_rows": lambda: replace(config().data, full_rows=True, pack=False),
    r"data\.validation_share must be above 0 and below 1, but is 1\.0": lambda: replace(
        config().data, validation_share=1.0
    ),
    r"data\.validation_name must differ from data\.name": lambda: replace(config().data, validation_name="train"),
    r"data\.path must be given": lambda: replace(config().data, path=""),
    r"batch\.global_size must be positive, but is 0": lambda: recipe.BatchOptions(global_size=0),
    r"batch\.micro_size must be positive, but is -1": lambda: recipe.BatchOptions(micro_size=-1),
    r"checkpoints\.every_steps must be positive or null, but is 0": lambda: recipe.CheckpointOptions(every_steps=0),
    r"checkpoints\.every_minutes must be positive or null": lambda: recipe.CheckpointOptions(every_minutes=-1.0),
    r"checkpoints\.keep_last must be positive": lambda: recipe.CheckpointOptions(keep_last=0),
    r"validation\.every_steps must be positive": lambda: recipe.ValidationOptions(every_steps=0),
    r"validation\.batches must be positive or null": lambda: recipe.ValidationOptions(batches=0),
    r"engine\.name must be one of torch, bmtrain": lambda: recipe.EngineOptions(name="jax"),  # type: ignore[arg-type]
    r"engine\.zero_level must be 2 or 3": lambda: recipe.EngineOptions(zero_level=1),  # type: ignore[arg-type]
    r"watch\.window must be above 1": lambda: recipe.WatchOptions(window=1),
    r"max_steps must be positive, but is 0": lambda: config(max_steps=0),
    r"seed must be zero or positive": lambda: config(seed=-1),
    r"output must be a directory": lambda: config(output=""),
    r"optimizer\.warmup_steps must be at most max_steps \(10\), but is 11": lambda: config(
        max_steps=10, optimizer=recipe.OptimizerOptions(warmup_steps=11)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.objectiv", "causal"], r"unknown option --data\.objectiv causal; did you mean '--data\.objective'"),
        (
            ["--config", "data: {mask_shar: 0.2}"],
            r"unknown option 'data\.mask_shar'; did you mean '--data\.mask_share'",
        ),
        (["--config", "wandb: {mode: sometimes}"], r"--wandb\.mode: expected one of .*offline.*, got sometimes"),
        (["--config", "data: {pack: false, full_rows: true}"], r"data\.pack must be true with data\.full_rows"),
        (["--watch.divergence", "1"], r"watch\.divergence must be above 1 or null, but is 1\.0"),
        (["--preset", "gpt2-tiny-txt"], r"there is no preset 'gpt2-tiny-txt', .*; did you mean 'gpt2-tiny-text'\?"),
    ],
)
def test_bad_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "--config":
        (tmp_path / "bad.yaml").write_text(words[1])
        words = ["--config", str(tmp_path / "bad.yaml")]
    given = ["--output", "run", "--model.name", "gpt2-base", "--data.path", "ids", "--data.tokenizer", "words"]
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", *given, *words])
    assert stopped.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search("^model-center pretrain: error: .*" + message, error), error


def test_every_option_has_a_description() -> None:
    def check(kind: Any) -> None:
        source = "".join(inspect.getsource(each) for each in kind.mro()[:-1])
        for field in fields(kind):
            described = source.partition(f"\n    {field.name}: ")[2]
            assert described.partition("\n")[2].lstrip().startswith('"""'), f"{kind.__name__}.{field.name}"
            if is_dataclass(field.type):
                check(field.type)

    check(PretrainConfig)


def test_pretrain_means_the_smallest_preset_unless_a_model_or_data_is_chosen() -> None:
    seed = ["pretrain", "--seed=1"]
    assert with_preset(seed)[2:] == ["--seed=1"]
    assert with_preset(seed)[1].endswith("gpt2-tiny-text.yaml")
    for chosen in (["--model.name", "gpt2-base"], ["--data.path=ids"], ["--config=run.yaml"], ["--help"]):
        assert with_preset([*seed, *chosen]) == [*seed, *chosen]
