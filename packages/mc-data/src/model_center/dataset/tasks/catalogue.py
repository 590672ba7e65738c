"""The tasks of SuperGLUE, LCQMC and SQuAD.

Prompts and words are those of ModelCenter 0.1.0, so that results can be compared; their English stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from .task import Prompt, Row, Task

_YES_NO = ("No", "Yes")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _entailment_prompt(*words: str) -> Prompt:
    return Prompt("Sentence 1: {premise} Sentence 2: {hypothesis} Does sentence 1 entails sentence 2?{mask}.", words)


def _multirc_answers(row: Row) -> Iterator[Row]:
    """One row for each proposed answer to each question about the passage."""
    if "paragraph" in row:  # the Hugging Face form is flat already
        place = row["idx"]
        yield {**row, "passage": row["paragraph"], "group": f"{place['paragraph']}-{place['question']}"}
        return
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "passage": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "group": f"{row['idx']}-{question['idx']}",
            } | {key: answer[key] for key in ("label",) if key in answer}


def _record_queries(row: Row) -> Iterator[Row]:
    """One row for each query about the passage; the entities of the passage are the candidates."""
    if "query" in row:  # the Hugging Face form is flat already
        yield {**row, "passage": _plain(row["passage"]), "entities": ", ".join(row["entities"])}
        return
    text = row["passage"]["text"]
    spans = row["passage"]["entities"]
    # The ends of the benchmark's spans are inclusive.
    entities = dict.fromkeys(text[span["start"] : span["end"] + 1] for span in spans)
    for query in row["qas"]:
        yield {
            "passage": _plain(text),
            "query": query["query"],
            "entities": ", ".join(entities),
        } | {key: [answer["text"] for answer in query[key]] for key in ("answers",) if key in query}


def _plain(passage: str) -> str:
    return passage.replace("\n@highlight\n", " ")


def _squad_questions(row: Row) -> Iterator[Row]:
    """One row for each question of the file's articles."""
    for article in row["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": [answer["text"] for answer in question["answers"]],
                }


BOOLQ = Task(
    name="BoolQ",
    fields=_same("passage", "question"),
    labels=(False, True),
    inputs=(("{passage}", "{question}"),),
    prompt=Prompt("{passage}. {question}?{mask}.", _YES_NO),
    flexible="passage",
)

CB = Task(
    name="CB",
    fields=_same("premise", "hypothesis"),
    labels=("contradiction", "entailment", "neutral"),
    inputs=(("{premise}", "{hypothesis}"),),
    prompt=_entailment_prompt("No", "Yes", "Maybe"),
    flexible="premise",
    metrics=("accuracy", "macro_f1"),
)

COPA = Task(
    name="COPA",
    fields=_same("premise", "choice1", "choice2", "question"),
    labels=(0, 1),
    inputs=(
        ("{choice1}", 'The {question} of "{premise}"'),
        ("{choice2}", 'The {question} of "{premise}"'),
    ),
    prompt=Prompt(
        'Choice 1: {choice1} Choice 2: {choice2} The {question} of "{premise}" was choice{mask}.', ("1", "2")
    ),
    flexible="premise",
    swap_in_training=("choice1", "choice2"),
)

RTE = Task(
    name="RTE",
    fields=_same("premise", "hypothesis"),
    labels=("not_entailment", "entailment"),
    inputs=(("{premise}", "{hypothesis}"),),
    prompt=_entailment_prompt(*_YES_NO),
    flexible="premise",
)

WIC = Task(
    name="WiC",
    fields=_same("word", "sentence1", "sentence2"),
    labels=(False, True),
    inputs=(("{sentence1}", "{sentence2}"),),
    prompt=Prompt(
        "Sentence 1: {sentence1} Sentence 2: {sentence2} "
        "Does the word {word} in sentence 1 express the same meaning as in sentence 2?{mask}.",
        _YES_NO,
    ),
    flexible="sentence1",
)

_WSC_QUESTION = "{text} Does {pronoun} refers to {noun}?"

WSC = Task(
    name="WSC",
    fields={"text": "text", "noun": "target.span1_text", "pronoun": "target.span2_text"},
    labels=(False, True),
    inputs=((_WSC_QUESTION,),),
    prompt=Prompt(_WSC_QUESTION + "{mask}.", _YES_NO),
    flexible="text",
)

MULTIRC = Task(
    name="MultiRC",
    fields={"passage": "passage", "question": "question", "answer": "answer"},
    labels=(0, 1),
    inputs=(("{passage}", "{question} {answer}"),),
    prompt=Prompt('{passage} Question: {question} Is the answer "{answer}" correct?{mask}.', _YES_NO),
    flexible="passage",
    group="group",
    unfold=_multirc_answers,
    metrics=("binary_f1", "group_exact_match"),
)

RECORD = Task(
    name="ReCoRD",
    fields=_same("passage", "query", "entities"),
    answers="answers",
    prompt=Prompt("{passage} Entities: {entities}. Query: {query} What is @placeholder?{mask}."),
    flexible="passage",
    unfold=_record_queries,
    metrics=("exact_match", "token_f1"),
)

SQUAD = Task(
    name="SQuAD",
    fields=_same("context", "question"),
    answers="answers",
    prompt=Prompt("{context} Question: {question} Answer:{mask}."),
    flexible="context",
    files=("{split}-v1.1.json",),
    unfold=_squad_questions,
    metrics=("exact_match", "token_f1"),
)

LCQMC = Task(
    name="LCQMC",
    fields=_same("text_a", "text_b"),
    labels=(0, 1),
    inputs=(("{text_a}", "{text_b}"),),
    prompts={
        "cpm1": Prompt('"{text_a}"与"{text_b}"的关系是:{mask}。', ("无关", "有关")),
        "cpm2": Prompt("“{text_a}”与“{text_b}”是否有关？{mask}", ("否", "是")),
    },
    flexible="text_a",
    files=("{split}.tsv",),
)

TASKS: Mapping[str, Task] = {
    task.name: task for task in (BOOLQ, CB, COPA, RTE, WIC, WSC, MULTIRC, RECORD, SQUAD, LCQMC)
}


class UnknownTask(KeyError, ValueError):
    """A task name that no task has. It is both a `KeyError` and a `ValueError`."""

    def __str__(self) -> str:
        return str(self.args[0])


def load_task(name_or_file: str | Path) -> Task:
    """Find a task by name, or read its definition from a YAML file.

    Raises:
        ValueError: There is no such task; the message lists the known ones.
    """
    if Path(name_or_file).suffix in (".yaml", ".yml"):
        return Task.from_yaml(name_or_file)
    return find_task(str(name_or_file), TASKS)


def find_task(name: str, tasks: Mapping[str, Task]) -> Task:
    """The task of that name.

    Raises:
        UnknownTask: There is none; the message lists the known ones.
    """
    if name not in tasks:
        near = [known for known in tasks if known.lower() == str(name).lower()]
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UnknownTask(f"no task {name!r} here: {hint}known are {', '.join(tasks)}; or give a YAML definition")
    return tasks[name]
