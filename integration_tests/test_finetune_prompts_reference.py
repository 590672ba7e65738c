"""Loss, gradients and written answers of GPT-2 and T5 against Transformers, on prompts put together by hand."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_encoder import boolq_rows, write_task
from tiny_prompts import RIDDLE, riddles, write_model, write_prompt_task
from torch.nn.functional import cross_entropy

from model_center.recipe import DataOptions, FinetuneConfig, Job, ModelOptions, prepare
from model_center.recipe.prompting import TextWriter


def prepared(folder: Path, family: str, task: str) -> tuple[Job, Any, Any]:
    """A job of four training and four dev rows, Transformers' model with the same weights, and its tokenizer."""
    write_model(folder / "model", family, **({"ffn_activate_fn": "gelu_new"} if family == "gpt2" else {"tied": True}))
    if task == "BoolQ":
        write_task(folder, task, train=4, dev=4)
    else:
        write_prompt_task(folder, "SQuAD" if family == "t5" else "Riddle", train=4, dev=4)
        (folder / "riddle.yaml").write_text(RIDDLE)
    config = FinetuneConfig(
        output=str(folder / "run"),
        model=ModelOptions(name=str(folder / "model"), precision="fp32"),
        data=DataOptions(
            path=str(folder),
            task=task,
            max_length=64,
            max_answer_length=None if task == "BoolQ" else 5,
            batch_size=4,
        ),
    )
    job = prepare(config)
    job.model.backbone.export_huggingface(folder / "theirs")
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForCausalLM
    return job, auto.from_pretrained(folder / "theirs").eval(), job.tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def written(theirs: Any, tokenizer: Any, ids: list[int], **more: Any) -> list[int]:
    """What Transformers writes by greedy search: five tokens, or fewer and the end."""
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    return list(theirs.generate(torch.tensor([ids]), pad_token_id=0, **options, **more)[0].tolist())


class Ids:
    """A tokenizer that leaves ids as they are."""

    def __init__(self, eod_id: int) -> None:
        self.eod_id = eod_id

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def answers(job: Job) -> list[list[int]]:
    """The ids that ours writes for the training rows, in their order."""
    assert isinstance(job.model, TextWriter)
    job.model.eval()
    job.model.tokenizer = Ids(job.tokenizer.eod_id)
    (batch,) = job.train_loader
    texts = [[int(number) for number in text.split()] for text in job.model.answer(batch)[1]]
    return [texts[job.train_loader.batch_indices.index(row)] for row in range(len(texts))]


def compare(job: Job, theirs: Any, losses: list[torch.Tensor], targets: int) -> None:
    """Our loss and gradients of the one batch there is, and those of the sum of `losses`."""
    (batch,) = job.train_loader
    job.model.train()
    loss = job.model.loss(batch)
    expected = torch.stack(losses).sum() / targets
    assert loss.targets == targets
    torch.testing.assert_close(loss.summed / targets, expected, rtol=1e-5, atol=1e-5)
    (loss.summed / targets).backward()
    expected.backward()
    # Through our own export: the same table of names and operations that carries weights carries gradients.
    with torch.no_grad():
        for model in (job.model.backbone, theirs):
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    folder = Path(job.config.output).parent / "gradients"
    job.model.backbone.export_huggingface(folder)
    found = type(theirs).from_pretrained(folder).state_dict()
    for name, gradient in theirs.state_dict().items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert max(gradient.abs().max().item() for gradient in theirs.state_dict().values()) > 1e-2


def test_gpt2_learns_the_word_after_the_prompt(tmp_path: Path) -> None:
    job, theirs, tokenizer = prepared(tmp_path, "gpt2", "BoolQ")
    words = [ids_of(tokenizer, word)[0] for word in (" No", " Yes")]
    losses = []
    for row in boolq_rows(4, seed=1):
        ids = ids_of(tokenizer, f"{row['passage']}. {row['question']}?")
        scores = theirs(torch.tensor([ids])).logits[0, -1, words]
        losses.append(cross_entropy(scores, torch.tensor(int(row["label"]))))
    compare(job, theirs, losses, targets=4)


def test_t5_learns_the_word_in_the_slot(tmp_path: Path) -> None:
    job, theirs, tokenizer = prepared(tmp_path, "t5", "BoolQ")
    slot = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    words = [ids_of(tokenizer, word)[0] for word in ("No", "Yes")]
    losses = []
    for row in boolq_rows(4, seed=1):
        before = ids_of(tokenizer, f"{row['passage']}. {row['question']}?")
        ids = [*before, slot, *ids_of(tokenizer, "."), tokenizer.eos_token_id]
        scores = theirs(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, slot]])).logits[0, 1, words]
        losses.append(cross_entropy(scores, torch.tensor(int(row["label"]))))
    compare(job, theirs, losses, targets=4)


def test_gpt2_learns_answers_in_free_text(tmp_path: Path) -> None:
    job, theirs, tokenizer = prepared(tmp_path, "gpt2", str(tmp_path / "riddle.yaml"))
    losses, targets, texts = [], 0, []
    for text, answer in riddles(4, seed=1):
        prompt, answered = ids_of(tokenizer, f"{text} Answer:"), ids_of(tokenizer, f" {answer}")
        texts.append(written(theirs, tokenizer, prompt)[len(prompt) :])
        answered.append(tokenizer.eos_token_id)
        labels = torch.tensor([[-100] * len(prompt) + answered])
        losses.append(theirs(torch.tensor([prompt + answered]), labels=labels).loss * len(answered))
        targets += len(answered)
    assert answers(job) == texts
    compare(job, theirs, losses, targets)


def test_t5_learns_squad(tmp_path: Path) -> None:
    job, theirs, tokenizer = prepared(tmp_path, "t5", "SQuAD")
    slot = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    losses, targets, texts = [], 0, []
    for text, answer in riddles(4, seed=1):
        ids = [*ids_of(tokenizer, f"{text} Question: what? Answer:"), slot, *ids_of(tokenizer, ".")]
        ids.append(tokenizer.eos_token_id)
        texts.append(written(theirs, tokenizer, ids, decoder_input_ids=torch.tensor([[0, slot]]))[2:])
        answered = ids_of(tokenizer, answer)
        labels = torch.tensor([[-100, *answered, tokenizer.eos_token_id]])
        start = torch.tensor([[0, slot, *answered]])
        output = theirs(input_ids=torch.tensor([ids]), decoder_input_ids=start, labels=labels)
        losses.append(output.loss * (len(answered) + 1))
        targets += len(answered) + 1
    assert answers(job) == texts
    compare(job, theirs, losses, targets)
