import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from model_center.dataset import DistributedMMapIndexedDataset
from model_center.model.families import families
from model_center.recipe.pretrain_configuration import PretrainConfig, PretrainDataOptions, PretrainModelOptions
from model_center.recipe.pretraining_data import PretrainingData
from model_center.recipe.pretraining_objectives import make_objective
from model_center.recipe.pretraining_text import prepare_datasets, prepare_tokenizer, text_files
from model_center.recipe.shipped import preset_names, preset_path, sample_path
from model_center.tokenizer import load_tokenizer

LINES = [
    f"the {colour} {animal} sees {count} hats\n"
    for colour in ("red", "green")
    for animal in ("cat", "dog")
    for count in "1234"
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in (1, 2):
        (tmp_path / "text" / f"book_{number}.txt").write_text("".join(LINES[number::2]))
    return tmp_path / "text"


def test_files_patterns_and_samples(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [text / "book_1.txt", text / "book_2.txt"]
    assert text_files(str(text / "*.txt")) == both
    assert text_files([str(both[1]), str(both[0])]) == both[::-1]
    monkeypatch.chdir(text)
    assert text_files("book_?.txt") == [Path("book_1.txt"), Path("book_2.txt")]
    assert text_files("sample:shakespeare") == [sample_path("shakespeare")]
    with pytest.raises(ValueError, match=r"the raw text other\*\.txt is no file, and no pattern that fits one"):
        text_files("other*.txt")
    with pytest.raises(ValueError, match=r"there is no sample 'shakespere', .* did you mean 'shakespeare'"):
        text_files("sample:shakespere")


def test_files_whose_paths_look_like_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "exp[1]"
    (folder / "runs").mkdir(parents=True)
    for name in ("data[v2].txt", "book_1.txt"):
        (folder / name).touch()
    both = sorted(folder.glob("*.txt"))
    assert text_files(str(folder / "data[v2].txt")) == [folder / "data[v2].txt"]
    monkeypatch.chdir(folder / "runs")
    named = {"../data[v2].txt": both[1:], "../book_?.txt": both[:1], "../*.txt": both, "../book_1.txt": both[:1]}
    data = PretrainDataOptions(path="ids", tokenizer="words")
    config = PretrainConfig(output="run", model=PretrainModelOptions(name="gpt2-base"), data=data)
    resolved = {name: replace(config, data=replace(data, text=name)).resolved() for name in named}
    monkeypatch.chdir("/")
    for name, files in named.items():
        text = resolved[name].data.text
        assert text is not None
        assert text_files(text) == files
        assert resolved[name].resolved() == resolved[name]


def test_the_sample_is_a_megabyte_of_plays() -> None:
    with gzip.open(sample_path("shakespeare"), "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file]
    assert 1.0e6 < sum(map(len, passages)) < 1.2e6
    assert sum(len(passage) < 2000 for passage in passages) == 1
    assert sum("ROMEO:\n" in passage for passage in passages) > 10


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "t5"])
def test_from_text_to_batches(model_type: str, text: Path, tmp_path: Path) -> None:
    inputs = text_files(str(text / "*.txt"))
    name = prepare_tokenizer("train:400", inputs, tmp_path, model_type)
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("the red dog sees 2 hats")).count("red dog sees 2 hats") == 1
    family = families[model_type].config_class
    config = family(vocab_size=500)
    objective = make_objective(config, tokenizer)
    for _ in range(2):
        prepare_datasets(inputs, tmp_path, "train", name, max_length=objective.room)
    with PretrainingData(tmp_path, "train", objective, tokenizer=tokenizer, global_size=4, micro_size=4) as data:
        assert data.total == len(LINES) - 1
        assert data.step(0).targets > 0


def test_what_is_there_is_used_again_and_nothing_else(text: Path, tmp_path: Path) -> None:
    inputs = text_files(str(text / "*.txt"))
    name = prepare_tokenizer("train:300", inputs, tmp_path, "gpt2")
    prepare_datasets(inputs, tmp_path, "train", name, max_length=8)
    kept = {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
    prepare_tokenizer("train:300", inputs, tmp_path, "gpt2")
    prepare_datasets(inputs, tmp_path, "train", name, max_length=8)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == kept
    with pytest.raises(ValueError, match=r"train_1 and 1 more exists; .*another folder with --data\.path"):
        prepare_datasets(inputs, tmp_path, "train", name, max_length=9)
    for file in DistributedMMapIndexedDataset(tmp_path, "train", 0, 1).files:
        assert max(file.sizes) <= 8
    inputs[0].write_text("another text\n")
    with pytest.raises(ValueError, match=r"tokenizing raw text: .*train_1 and 1 more exists"):
        prepare_datasets(inputs, tmp_path, "train", name, max_length=8)


def test_a_tokenizer_that_is_there_stays(text: Path, tmp_path: Path) -> None:
    inputs = text_files(str(text / "*.txt"))
    folder = Path(prepare_tokenizer("train:400", inputs, tmp_path, "bert"))
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    inputs[0].write_text("zebras quarrel over quinces\n" * 50)
    for name, model_type in (("train:400", "bert"), ("train:300", "bert"), ("train:400", "gpt2")):
        with pytest.raises(ValueError, match=r"holds a tokenizer of another text.*--data\.path, or delete it"):
            prepare_tokenizer(name, inputs, tmp_path, model_type)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_tokenizers_that_cannot_be_trained(text: Path, tmp_path: Path) -> None:
    inputs = text_files(str(text / "*.txt"))
    assert prepare_tokenizer("bert-base-uncased", [], tmp_path, "bert") == "bert-base-uncased"
    for name, model_type, message in (
        ("train:many", "gpt2", "must be named train:SIZE, as in train:4000, but is 'train:many'"),
        ("train:10", "gpt2", "must lie from 300 to .*, but is 10"),
        ("train:400", "cpm1", "can be trained for gpt2, bert, t5, not for cpm1"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_tokenizer(name, inputs, tmp_path, model_type)
    with pytest.raises(ValueError, match="needs raw text to be trained on"):
        prepare_tokenizer("train:400", [], tmp_path, "gpt2")
    assert not (tmp_path / "tokenizer").exists()


def test_presets_are_found() -> None:
    assert {"gpt2-tiny-text", "bert-tiny-text", "t5-tiny-text"} <= set(preset_names("pretrain"))
    with pytest.raises(ValueError, match=r"there is no preset 'gpt2-tiny', .* did you mean 'gpt2-tiny-text'"):
        preset_path("pretrain", "gpt2-tiny")


@pytest.mark.parametrize("name", preset_names("pretrain"))
def test_presets_are_configurations_of_models_that_exist(name: str) -> None:
    preset = yaml.safe_load(preset_path("pretrain", name).read_text())
    given = {"output": "run", "data.path": "data", "data.tokenizer": "tokenizer"}
    missing = [option for option in given if option not in preset and option[5:] not in preset["data"]]
    arguments = [word for option in missing for word in (f"--{option}", given[option])]
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PretrainConfig)
    parsed = parser.instantiate(parser.parse_args(["--config", str(preset_path("pretrain", name)), *arguments]))
    published = {known: family for family in families.values() for known in family.config_class.published}
    family = published[parsed.model.name].config_class
    config = replace(family.preset(parsed.model.name), **parsed.model.options)
    assert parsed.data.max_length <= (getattr(config, "position_size", None) or 512)
    if parsed.data.tokenizer.startswith("train:"):
        assert config.vocab_size == int(parsed.data.tokenizer[6:]) + family.padding_ids


@pytest.mark.parametrize("name", [name for name in preset_names("pretrain") if "-tiny-" in name])
def test_small_presets_are_a_matter_of_minutes_and_can_be_killed(name: str) -> None:
    preset = yaml.safe_load(preset_path("pretrain", name).read_text())
    family = next(family for family in families.values() if preset["model"]["name"] in family.config_class.published)
    config = replace(family.config_class.preset(preset["model"]["name"]), **preset["model"]["options"])
    parameters = sum(parameter.numel() for parameter in family(config).parameters())
    # Two cores do about 1e11 operations a second, of which training takes six for each parameter and token.
    tokens = preset["max_steps"] * preset["batch"]["global_size"] * preset["data"]["max_length"]
    assert 6 * parameters * tokens < 240 * 1e11
    assert preset["checkpoints"]["every_steps"] <= preset["max_steps"] / 5
    assert preset["max_steps"] % preset["validation"]["every_steps"] == 0
    assert preset["data"]["text"] == "sample:shakespeare"
