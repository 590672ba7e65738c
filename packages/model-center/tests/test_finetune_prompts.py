"""Fine-tuning of the families that answer prompts, on tiny models and tasks, and against plain code row by row."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import boolq_rows, write_task
from tiny_prompts import RIDDLE, write_model, write_prompt_task

from model_center import engine
from model_center.model import load_model
from model_center.recipe import (
    DataOptions,
    FinetuneConfig,
    Job,
    ModelOptions,
    OptimizerOptions,
    evaluate_checkpoint,
    finetune,
    load_task_model,
    prepare,
)
from model_center.recipe.configuration import EngineOptions
from model_center.recipe.decoding import decode_greedily
from model_center.recipe.evaluation import make_loader
from model_center.recipe.prompting import TextWriter, WordChooser

TASKS = {"gpt2": "BoolQ", "gptj": "BoolQ", "t5": "BoolQ", "cpm1": "LCQMC", "cpm2": "LCQMC"}
FREE_TEXT = [("gpt2", "riddle.yaml"), ("gptj", "riddle.yaml"), ("t5", "SQuAD")]
MOOD = """
name: Mood
fields: [text]
labels: [false, true]
prompt: {template: "{text}{mask}.", words: ["No", "Yes"]}
flexible: text
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each family, and `data` with the tasks."""
    folder = tmp_path_factory.mktemp("prompts")
    for family in TASKS:
        write_model(folder / family, family)
    write_task(folder / "data")
    for task in ("LCQMC", "SQuAD", "Riddle"):
        write_prompt_task(folder / "data", task, train=128)
    (folder / "riddle.yaml").write_text(RIDDLE)
    return folder


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> Any:
    return partial(config, folder, tmp_path / "run")


def config(
    folder: Path,
    run: Path,
    family: str,
    task: str = "",
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **options: Any,
) -> FinetuneConfig:
    task = str(folder / task) if task.endswith(".yaml") else task or TASKS[family]
    shape: dict[str, Any] = {"path": str(folder / "data"), "task": task, "max_length": 48, "batch_size": 8}
    return FinetuneConfig(
        output=str(run),
        model=ModelOptions(**{"name": str(folder / family), **(model or {})}),
        data=DataOptions(**{**shape, **(data or {})}),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        **options,
    )


@pytest.mark.parametrize(
    ("family", "task", "epochs"),
    [("gptj", "", 2), ("t5", "", 1), ("cpm1", "", 1), ("cpm2", "", 1), ("gpt2", "riddle.yaml", 4), ("t5", "SQuAD", 3)],
)
def test_tiny_tasks_are_learnt(configure: Any, family: str, task: str, epochs: int) -> None:
    options = configure(family, task, epochs=epochs)
    result = finetune(options)
    assert result.best.score >= 0.95
    assert result.best.baseline <= 0.5
    checkpoint = result.run.checkpoint("best")
    again = evaluate_checkpoint(checkpoint, options.data.path)
    assert again.scores == result.best.scores
    assert again.loss == pytest.approx(result.best.loss, rel=1e-5)
    assert type(load_model(checkpoint)) is type(load_model(options.model.name))


def test_the_word_before_the_slot_counts(configure: Any, tmp_path: Path) -> None:
    """Only the text's last word tells the class: a position that is off by one would see nothing of it."""
    (tmp_path / "mood.yaml").write_text(MOOD)
    (tmp_path / "Mood").mkdir()
    for split, count in (("train", 128), ("val", 32)):
        rows = [{"text": f"{row['question']} {row['passage']}", "label": row["label"]} for row in boolq_rows(count, 1)]
        ends = [row["text"].replace("good", "it").replace("bad", "it") for row in rows]
        lines = [
            json.dumps({"text": f"{end} {['bad', 'good'][row['label']]}", "label": row["label"]})
            for end, row in zip(ends, rows, strict=True)
        ]
        (tmp_path / "Mood" / f"{split}.jsonl").write_text("\n".join(lines))
    data = {"path": str(tmp_path), "task": str(tmp_path / "mood.yaml")}
    assert finetune(configure("gpt2", data=data, epochs=1)).best.score == 1.0


def forward(model: Any, family: str, item: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits (length, vocab_size) of one unpadded row, by the arguments that the document gives the models."""
    row = {name: value.unsqueeze(0) for name, value in item.items()}
    if family in ("t5", "cpm2"):
        logits = model(row["enc_input"], row["enc_length"], row["dec_input"], row["dec_length"], return_logits=True)
    elif family == "cpm1":
        logits = model(row["input_tokens"], row["input_length"], row["input_context"], row["input_span"])
    else:
        logits = model(row["input_ids"], row["input_length"], return_logits=True)
    row_logits: torch.Tensor = logits[0]
    return row_logits


@pytest.mark.parametrize("family", TASKS)
def test_classes_row_by_row(configure: Any, family: str) -> None:
    job = prepare(configure(family, data={"eval_batch_size": 7}))
    assert isinstance(job.model, WordChooser)
    job.model.eval()
    dataset = job.dev_loader.dataset
    words = dataset.task.prompt_for(family).words
    ids = [job.tokenizer.encode(f" {word}" if family.startswith("gpt") else word)[0] for word in words]
    for batch in job.dev_loader:
        loss, answers = job.model.answer(batch)
        expected, losses = [], torch.zeros(())
        for index in job.dev_loader.batch_indices:
            item = dataset[index]
            position = item["index"].tolist().index(1)
            scores = forward(job.model.backbone, family, item)[position][ids]
            losses += torch.nn.functional.cross_entropy(scores, torch.tensor(dataset.labels[index]))
            expected.append(int(scores.argmax()))
        assert answers.tolist() == expected
        assert loss.targets == len(expected)
        torch.testing.assert_close(loss.summed, losses, rtol=1e-5, atol=1e-5)


class Numbers:
    """Turns ids into their numbers."""

    eod_id = 0

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def greedy(job: Job, family: str, item: dict[str, torch.Tensor], limit: int) -> str:
    """Decode one row without padding and without a cache, as numbers."""
    assert isinstance(job.model, TextWriter)
    numbers = job.model.tokenizer
    name, length = ("dec_input", "dec_length") if family == "t5" else ("input_ids", "input_length")
    ids = item[name][: item["index"].tolist().index(1) + 1].tolist()
    written: list[int] = []
    while len(written) < limit:
        whole = {**item, name: torch.tensor(ids + written), length: torch.tensor(len(ids + written))}
        token = int(forward(job.model.backbone, family, whole)[-1].argmax())
        if token == numbers.eod_id:
            break
        written.append(token)
    return str(numbers.decode(written))


@torch.no_grad()
@pytest.mark.parametrize(("family", "task"), FREE_TEXT)
def test_texts_row_by_row(configure: Any, family: str, task: str) -> None:
    """Loss and greedy decoding of ragged rows, some of which end early."""
    job = prepare(configure(family, task, data={"max_answer_length": 6, "eval_batch_size": 5}))
    assert isinstance(job.model, TextWriter)
    job.model.eval()
    job.model.tokenizer = numbers = Numbers()
    dataset = job.dev_loader.dataset
    numbers.eod_id = int(greedy(job, family, dataset[0], limit=3).split()[-1])
    texts = []
    for batch in job.dev_loader:
        loss, answers = job.model.answer(batch)
        expected, losses, targets = [], torch.zeros(()), 0
        for index in job.dev_loader.batch_indices:
            item = dataset[index]
            places = item["index"].nonzero().flatten()
            right = item["targets"][places]
            assert right.tolist()[-1] == job.tokenizer.eod_id
            scores = forward(job.model.backbone, family, item)[places]
            losses += torch.nn.functional.cross_entropy(scores, right, reduction="sum")
            targets += len(places)
            expected.append(greedy(job, family, item, limit=6))
        assert list(answers) == expected
        texts += expected
        assert loss.targets == targets
        torch.testing.assert_close(loss.summed, losses, rtol=1e-5, atol=1e-4)
    assert len(set(texts)) > 5
    assert len({len(text.split()) for text in texts}) > 1


@pytest.mark.parametrize(("family", "task"), FREE_TEXT)
def test_training_on_texts_does_not_wait_for_the_device(configure: Any, family: str, task: str) -> None:
    """The meta device has no numbers, so that whatever asks for one of them fails."""
    job = prepare(configure(family, task, data={"max_answer_length": 6}))
    dataset = job.train_loader.dataset
    with engine.use_engine(engine.TorchEngine(torch.device("meta"))):
        model = job.model.to("meta")
        (batch, *_) = make_loader(dataset, batch_size=4)
        loss = model.loss(batch)
        loss.summed.backward()
    assert loss.summed.is_meta
    assert loss.targets == int(batch["index"].sum()) > 0


def test_decoding_stops_at_its_limits() -> None:
    class Counter:
        """A model whose next token is one more than the last."""

        calls = 0

        def begin(self) -> torch.Tensor:
            self.ids = torch.tensor([2, 5])
            return self.ids

        def go_on(self, ids: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            assert ids.tolist()[0] in (self.ids[0].item(), 4)
            self.ids = self.ids + 1
            return self.ids

        def logits(self, states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(states, 16).float()

    model: Any = Counter()
    assert decode_greedily(model, model, torch.tensor([9, 3]), end_id=4) == [[2, 3], [5, 6, 7]]
    assert model.calls == 2


def test_how_far_a_text_is_written_does_not_depend_on_the_right_answer(configure: Any, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        rows = [{"text": "stone bird " * 20, "answers": ["sun " * length]} for length in range(1, 6)]
        (tmp_path / "Riddle").mkdir(exist_ok=True)
        (tmp_path / "Riddle" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path), "max_length": 20, "max_answer_length": 6}
    job = prepare(configure("gpt2", "riddle.yaml", data=data))
    assert isinstance(job.model, TextWriter)
    (batch,) = job.dev_loader
    _, limits = job.model._continuation(batch)
    assert limits.tolist() == [6] * 5


def test_sequences_as_long_as_the_model_has_positions(configure: Any) -> None:
    """A prompt that leaves room for one token is gone on with by one token, beside others with more room."""
    job = prepare(configure("gpt2", "riddle.yaml", data={"max_length": 64, "max_answer_length": 5}))
    assert isinstance(job.model, TextWriter)
    job.model.tokenizer = Numbers()
    ids = torch.randint(0, 99, (2, 64), generator=torch.Generator().manual_seed(0))
    index = torch.zeros(2, 64, dtype=torch.long)
    index[0, 62:], index[1, 3:9] = 1, 1
    length = torch.tensor([64, 9])
    _, texts = job.model.answer({"input_ids": ids, "input_length": length, "targets": ids.roll(-1, 1), "index": index})
    assert [len(text.split()) for text in texts] == [1, 5]


def test_the_checkpoint_holds_all_that_it_takes(configure: Any) -> None:
    result = finetune(configure("cpm2", max_steps=1))
    checkpoint = result.run.checkpoint("last")
    model, tokenizer = load_task_model(checkpoint)
    assert not model.training
    assert tokenizer.convert_ids_to_tokens(model.head.words) == ["否", "是"]  # type: ignore[attr-defined]
    file = checkpoint / "prompt.json"
    values = json.loads(file.read_text())
    for changes, message in (
        ({"format_version": 2}, "format version 2; this version reads up to 1"),
        ({"words": []}, "words must be given, or max_answer_length, but is"),
        ({"size": 1}, "size"),
    ):
        file.write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=f"holds no model that answers prompts.*{message}"):
            load_task_model(checkpoint)
    file.unlink()
    with pytest.raises(ValueError, match="holds no classifier"):
        load_task_model(checkpoint)


def test_options_of_the_engine(configure: Any) -> None:
    losses = []
    for recomputes in (False, True):
        options = EngineOptions(use_checkpoint=recomputes)
        job = prepare(configure("t5", engine=options))
        assert engine.current_engine().use_checkpoint == recomputes
        job.model.train()
        losses.append(job.model.loss(next(iter(job.train_loader))).summed)
        losses[-1].backward()
    assert torch.equal(*losses)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no texts for the task": ("gpt2", {"task": "LCQMC"}, "gpt2 has no texts for LCQMC, only for BoolQ, CB, COPA"),
    "nor in another family": ("cpm1", {"task": "BoolQ"}, "cpm1 has no texts for BoolQ, only for LCQMC"),
    "nor for an encoder": ("bert", {"task": "SQuAD", "max_length": 32}, "bert has no texts for SQuAD, only for BoolQ"),
    "several tokens": (
        "t5",
        {"task": "long.yaml"},
        r"the word 'Yesterday' of task 'Riddle' is \d+ tokens",
    ),
    "one word twice": ("t5", {"task": "same.yaml"}, "words of task 'Riddle', .*, must differ"),
    "no prompt of its own": ("t5", {"task": "none.yaml"}, "task 'Riddle' has no prompt for 't5'"),
    "small vocabulary": ("small", {}, "tokenizer 'small' has 335 tokens, but .* vocabulary of only 50"),
    "positions": ("gpt2", {"max_length": 65}, "max_length must be at most the model's position_size 64, but is 65"),
    "no room": ("gpt2", {"max_length": 4}, r"train\.jsonl:1: the text is \d+ tokens too long"),
    "a foreign tokenizer": ("cpm2", {"task": "LCQMC", "tokenizer": "t5"}, "tokenizer 't5' has no <s_0>"),
    "pooling": ("t5", {"pooling": "mean"}, "model.pooling is for the classifier of an encoder, and T5 is none"),
    "dropout": ("cpm2", {"dropout": 0.0}, "model.dropout is for the classifier of an encoder, and CPM2 is none"),
    "length of a class": ("t5", {"max_answer_length": 3}, "max_answer_length is for tasks .* free text, but BoolQ has"),
    "other head": ("headed", {}, "this GPT2 has a head for 3 classes"),
    "no rows": ("t5", {"path": "nowhere"}, "there is no folder"),
    "a long warm-up": ("t5", {"warmup_steps": 99}, "warmup_steps must be at most the run's 36 steps, but is 99"),
}


@pytest.fixture(scope="module")
def bad(folder: Path, encoder: Path) -> Path:
    """What is wrong, beside what is right."""
    task = "name: Riddle\nfields: [text]\nlabels: [a, b]\nflexible: text\n"
    for name, words in (("long", "['No', 'Yesterday']"), ("same", "['No', 'No']")):
        (folder / f"{name}.yaml").write_text(task + f'prompt: {{template: "{{text}}{{mask}}", words: {words}}}\n')
    (folder / "none.yaml").write_text(task + "inputs: '{text}'\n")
    write_model(folder / "headed", "gpt2", cls_head=3)
    write_model(folder / "small", "gpt2", vocab_size=50)
    (folder / "bert").symlink_to(encoder)
    (folder / "labelled" / "Riddle").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "labelled" / "Riddle" / f"{split}.jsonl").write_text('{"text": "sun is good", "label": "a"}\n' * 8)
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, bad: Path, configure: Any, tmp_path: Path) -> None:
    family, changes, message = BAD[name]
    options = configure(family if family in TASKS else "gpt2")
    options.model.name = str(bad / family)
    for option, value in changes.items():
        part = next(each for each in (options.model, options.data, options.optimizer) if hasattr(each, option))
        if option == "task" and value.endswith(".yaml"):
            options.data.path = str(bad / "labelled")
        is_file = isinstance(value, str) and (bad / value).exists()
        setattr(part, option, str(bad / value) if is_file else value)
    with pytest.raises(ValueError, match=message):
        prepare(options)
    assert not (tmp_path / "run").exists()
