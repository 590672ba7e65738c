"""What a task's definition may be, in Python and in YAML."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_center.dataset.tasks import TASKS, Prompt, Task, UnknownTask, load_task
from model_center.dataset.tasks.template import Part, Template

YAML = """
name: Review
fields: {text: body.text, product: product}
labels: [negative, positive]
inputs: ["{text}", "About {product}"]
prompt:
  template: "{text} The {product} was {mask}."
  words: [bad, good]
prompts:
  cpm1: {template: "{text}{mask}。", words: [坏, 好]}
flexible: text
metrics: [accuracy, macro_f1]
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "review.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_yaml_file_says_the_same_as_the_class(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, YAML)) == Task(
        name="Review",
        fields={"text": "body.text", "product": "product"},
        labels=("negative", "positive"),
        inputs=(("{text}", "About {product}"),),
        prompt=Prompt("{text} The {product} was {mask}.", ("bad", "good")),
        prompts={"cpm1": Prompt("{text}{mask}。", ("坏", "好"))},
        flexible="text",
        metrics=("accuracy", "macro_f1"),
    )


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("{text}", (("{text}",),)),
        (["{text}", "{product}"], (("{text}", "{product}"),)),
        ([["{text}"], ["{product}", "{text}"]], (("{text}",), ("{product}", "{text}"))),
    ],
)
def test_short_forms_of_inputs(inputs: Any, expected: tuple[tuple[str, ...], ...]) -> None:
    task = Task.from_dict({"name": "T", "fields": ["text", "product"], "labels": [0, 1], "inputs": inputs})
    assert task.inputs == expected
    assert task.fields == {"text": "text", "product": "product"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("name: Review", "nam: Review", "unknown key 'nam'; a task has name, fields"),
        ("name: Review\n", "", "a task needs 'name'"),
        ("{text} The", "{title} The", r"task 'Review' uses \['title'\], but its fields are \['text', 'product'\]"),
        ("flexible: text", "flexible: body", r"uses \['body'\]"),
        ("[bad, good]", "[good]", r"one word for each label \(2\), but has \['good'\]"),
        ("[bad, good]", "[No, Yes]", "write them in quotes, since YAML reads No and Yes as booleans"),
        ("was {mask}.", "was good.", r"needs \{mask\} exactly once"),
        ("[negative, positive]", "[good, good]", "`labels` must differ"),
        ("labels: [negative, positive]\n", "", "needs either `labels` or `answers`"),
        ("macro_f1", "f2", "`metrics` has 'f2', but known are accuracy, macro_f1"),
        ('"About {product}"', '"About {product"', "expected '}' before end of string"),
        ('"About {product}"', '"About {product!r}"', "a field is a plain name in braces"),
        ('"About {product}"]', '"a", "b"]', "one or two segments"),
        ('  template: "{text} The {product} was {mask}."\n', "", "a prompt is a mapping with `template`"),
        ("name: Review", "name: [", "cannot read the task definition"),
        (YAML, "Review", "a task definition is a mapping"),
        ("name: Review", "name: 5", "`name` must be text .*, but is 5"),
        ("flexible: text", "label: 5", "`label` must be text .*, but is 5"),
        ("flexible: text", "files: [5]", r"`files` must be a list of texts, but is \[5\]"),
        ("flexible: text", "files: reviews.jsonl", "`files` must be a list of texts, but is 'reviews.jsonl'"),
        ("product: product}", "product: 5}", "`fields` must be a list of texts, or a mapping from texts to texts, but"),
        ("[negative, positive]", "negative", "`labels` must be a list .*, but is 'negative'"),
        ('"About {product}"]', "5]", "`inputs` must be a template, a list of templates"),
        ("[bad, good]", "5", r"`prompt\.words` must be a list of texts, but is 5"),
        ('"{text}{mask}。"', "5", r"`prompts\.cpm1\.template` must be text .*, but is 5"),
        ("prompts:\n  cpm1:", "prompts: x\n#", "`prompts` must be a mapping from families to prompts, but is 'x'"),
        ("macro_f1", "token_f1", "has 'token_f1', but known are accuracy, .* for a task with `labels`"),
        ("macro_f1", "group_exact_match", "group_exact_match needs `group`"),
    ],
)
def test_definitions_that_make_no_sense(tmp_path: Path, before: str, after: str, message: str) -> None:
    file = write(tmp_path, YAML.replace(before, after))
    with pytest.raises(ValueError, match=message) as raised:
        load_task(file)
    assert str(file) in str(raised.value)


def test_measures_fit_what_the_answers_are() -> None:
    written: dict[str, Any] = {"name": "T", "fields": ["text"], "answers": "answers"}
    written["prompt"] = {"template": "{text}{mask}"}
    assert Task.from_dict(written).metrics == ("exact_match", "token_f1")
    assert Task.from_dict(written | {"metrics": ["token_f1"]}).metrics == ("token_f1",)
    with pytest.raises(ValueError, match="has 'accuracy', but known are exact_match, token_f1 for a task with `answer"):
        Task.from_dict(written | {"metrics": ["accuracy"]})
    classes: dict[str, Any] = {"name": "T", "fields": ["text"], "inputs": "{text}", "labels": [0, 1, 2]}
    assert Task.from_dict(classes).metrics == ("accuracy",)
    with pytest.raises(ValueError, match=r"binary_f1 needs two labels, but there are \[0, 1, 2\]"):
        Task.from_dict(classes | {"metrics": ["binary_f1"]})


def test_a_task_needs_a_text() -> None:
    with pytest.raises(ValueError, match=r"needs `inputs` .* or a `prompt`"):
        Task(name="T", fields={"text": "text"}, labels=(0, 1))
    with pytest.raises(ValueError, match="`swap_in_training` needs two labels"):
        replace(TASKS["COPA"], labels=(0, 1, 2), prompt=None)
    with pytest.raises(ValueError, match="task 'LCQMC' has no prompt for 'gpt2'"):
        TASKS["LCQMC"].prompt_for("gpt2")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownTask, match=r"^no task 'boolq' here: did you mean 'BoolQ'\? known are BoolQ, CB, "):
        load_task("boolq")
    with pytest.raises(ValueError, match="cannot read the task definition"):
        load_task("missing.yaml")


def test_rendering_says_where_the_flexible_text_is() -> None:
    template = Template("{a}: {{{b}}} {mask} {c}")
    before, behind = template.render({"a": "x", "b": "long", "c": "end"}, flexible="b")
    assert before == Part("x: {long} ", (4, 8))
    assert before.text[slice(*before.flexible or ())] == "long"
    assert behind == Part(" end")
    assert template.fields == ("a", "b", "mask", "c")
