import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining_corpora import END, WORDS, TinyTokenizer, tiny_config, write_corpus

from model_center import engine
from model_center.dataset import DistributedMMapIndexedDataset
from model_center.dataset.indexed import SpanCorruption
from model_center.layer import AttentionMask
from model_center.model.families import families
from model_center.recipe.pretrain_configuration import ObjectiveOptions, PretrainDataOptions
from model_center.recipe.pretraining import accumulate_gradients
from model_center.recipe.pretraining_data import Batch, PretrainingData
from model_center.recipe.pretraining_objectives import OBJECTIVES, make_objective

LENGTHS = [[5, 30, 1, 12, 9, 40, 3], [17, 0, 8, 22, 2, 6]]
FAMILIES = [(model_type, name) for model_type, names in OBJECTIVES.items() for name in names]
MAX_LENGTH = 24


def objective(model_type: str = "gpt2", **options: Any) -> Any:
    chosen = ObjectiveOptions(**({"max_length": MAX_LENGTH} | options))
    return make_objective(tiny_config(model_type), TinyTokenizer(), chosen)


def open_data(folder: Path, made: Any = None, **options: Any) -> PretrainingData:
    given: dict[str, Any] = {
        "global_size": 5,
        "micro_size": 2,
        "prefetch": 0,
        "add_up": lambda number: number,
    } | options
    return PretrainingData(folder, "train", made or objective(), **given)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), LENGTHS)


def input_masks(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and what may be attended among them, whatever the family calls them."""
    inputs = batch.inputs
    ids = inputs.get("input_ids", inputs.get("input"))
    ids = inputs["enc_input"] if ids is None else ids
    mask = inputs.get("attention_mask")
    if mask is None:
        lengths = inputs.get("length", inputs.get("enc_length"))
        mask = AttentionMask(lengths=lengths, documents=inputs.get("span"))
    return ids, mask.materialize(*[ids.shape[1]] * 2).expand(ids.shape[0], -1, -1, -1)[:, 0]


def documents_of(batch: Batch) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The samples of one stack's micro-batch, found by which tokens see each other: their ids and labels."""
    ids, sees = input_masks(batch)
    for row in range(len(ids)):
        begin = 0
        real = sees[row].any(dim=0)
        while begin < ids.shape[1] and sees[row, begin, begin]:
            together = (real & (sees[row, begin] | sees[row, :, begin])).nonzero().flatten()
            end = int(together.max()) + 1
            assert not sees[row, begin:end, end:].any()
            assert not sees[row, begin:end, :begin].any(), "a document sees another"
            yield tuple(ids[row, begin:end].tolist()), tuple(batch.labels[row, begin:end].tolist())
            begin = end


@settings(max_examples=25, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    micro_size=st.integers(1, 6),
    global_size=st.integers(1, 15),
    pack=st.booleans(),
    family=st.sampled_from([("gpt2", None), ("bert", None), ("gptj", "prefix"), ("cpm1", None)]),
    seed=st.integers(0, 5),
    step=st.integers(0, 7),
)
def test_a_step_has_the_same_samples_however_it_is_divided(
    corpus: Path, world_size: int, micro_size: int, global_size: int, pack: bool, family: Any, seed: int, step: int
) -> None:
    made = objective(family[0], objective=family[1])
    found: Counter[Any] = Counter()
    targets, counts, samples = 0, set(), []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        sizes = {"global_size": global_size, "micro_size": micro_size}
        part = open_data(corpus, made, pack=pack, seed=seed, **place, **sizes).step(step)
        counts.add(len(part.batches))
        samples += part.samples
        targets += part.targets
        for batch in part.batches:
            assert len(batch.labels) <= micro_size
            found.update(documents_of(batch))
    # The order is that of the documented data set, and its epochs follow one another without a gap.
    total = sum(map(len, LENGTHS))
    expected: Counter[Any] = Counter()
    numbers, labels = [], 0
    for position in range(step * global_size, (step + 1) * global_size):
        source = DistributedMMapIndexedDataset(corpus, "train", 0, 1, seed=seed, epoch=position // total)
        numbers.append(source.sample_number(position % total))
        random = np.random.default_rng([seed, position // total, numbers[-1]])
        sample = made(made.cut(source[position % total]).astype(np.int64), random)
        labels += int((sample["labels"] != -100).sum())
        if len(sample["input_ids"]):
            expected[tuple(sample["input_ids"].tolist()), tuple(sample["labels"].tolist())] += 1
    assert found == expected
    assert sorted(samples) == sorted(numbers)
    assert targets == labels
    assert len(counts) == 1, "processes differ in their number of micro-batches"


def summed_loss(model: Any, batch: Batch) -> float:
    logits = model(**batch.inputs, return_logits=True).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="sum")
    return float(loss)


@pytest.mark.parametrize(("model_type", "name"), FAMILIES)
def test_models_see_no_difference_between_packed_and_padded(corpus: Path, model_type: str, name: Any) -> None:
    torch.manual_seed(0)
    model = families[model_type](tiny_config(model_type, dtype=torch.float64)).eval()
    losses = []
    for options in (
        {"pack": False, "micro_size": 1},
        {"pack": False, "micro_size": 3},
        {"pack": True, "micro_size": 2},
        {"pack": True, "micro_size": 4, "fixed_shape": True},
    ):
        data = open_data(corpus, objective(model_type, objective=name), global_size=13, **options)
        with torch.no_grad():
            step = data.step(0)
            losses.append(sum(summed_loss(model, batch) for batch in step.batches) / step.targets)
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-9)


def test_an_empty_micro_batch_has_a_row_without_targets(corpus: Path) -> None:
    for model_type, (name, *_) in OBJECTIVES.items():
        torch.manual_seed(0)
        model = families[model_type](tiny_config(model_type))
        made = objective(model_type, objective=name)
        part = open_data(corpus, made, global_size=1, rank=1, world_size=2).step(0)
        (batch,) = part.batches
        assert (part.samples, part.targets, batch.tokens, len(batch.labels)) == ([], 0, 0, 1)
        assert model(**batch.inputs, return_logits=True).isfinite().any()


def test_tokens_count_without_padding(corpus: Path) -> None:
    data = open_data(corpus, global_size=13, micro_size=13)
    expected = sum(min(length, MAX_LENGTH) for lengths in LENGTHS for length in lengths)
    for pack in (False, True):
        data = open_data(corpus, global_size=13, micro_size=13, pack=pack)
        assert sum(batch.tokens for batch in data.step(0).batches) == expected


def same(left: Any, right: Any) -> bool:
    return [batch.labels.tolist() for batch in left] == [batch.labels.tolist() for batch in right] and [
        input_masks(batch)[0].tolist() for batch in left
    ] == [input_masks(batch)[0].tolist() for batch in right]


def test_any_step_is_found_at_once_and_repeatably(corpus: Path) -> None:
    with open_data(corpus, objective("bert"), prefetch=2) as straight:
        steps = [straight.step(number).batches for number in range(8)]
    for number in (7, 3, 5):
        assert same(open_data(corpus, objective("bert")).step(number).batches, steps[number])
    with open_data(corpus, objective("bert"), prefetch=3) as data:
        assert all(same(data.step(number).batches, steps[number]) for number in (6, 0, 1, 1, 5))
    assert not same(steps[0], open_data(corpus, objective("bert"), seed=1).step(0).batches)


def test_another_epoch_draws_anew(corpus: Path) -> None:
    data = open_data(corpus, objective("bert"), global_size=13, micro_size=13, pack=False)
    first, second = (Counter(documents_of(data.step(number).batches[0])) for number in (0, 1))
    assert first.total() == second.total() == 13
    assert first != second


def test_validation_is_fixed_and_never_trained_on(corpus: Path) -> None:
    made = objective("bert")
    data = open_data(corpus, made, validation_share=0.3)
    assert data.total == 9
    trained = {sample for step in range(4) for sample in data.step(step).samples}
    assert trained == set(range(9))
    first, again = list(data.validation()), list(data.validation())
    assert same(first, again)
    found = Counter(document for batch in first for document in documents_of(batch))
    parts = [
        list(open_data(corpus, made, validation_share=0.3, rank=rank, world_size=2).validation()) for rank in (0, 1)
    ]
    assert len(parts[0]) == len(parts[1])
    assert Counter(document for part in parts for batch in part for document in documents_of(batch)) == found
    assert found.total() == 4


def test_validation_files(corpus: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path, [[9, 9]])
    write_corpus(tmp_path, [[4], [5, 6]], name="held", seed=7)
    data = open_data(tmp_path, validation_name="held", pack=False)
    assert data.total == 2
    assert sorted(len(ids) for batch in data.validation() for ids, _ in documents_of(batch)) == [4, 5, 6]
    assert list(open_data(corpus).validation()) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_full_rows_hold_the_whole_stream(corpus: Path, world_size: int) -> None:
    tokens = [file.tokens for file in DistributedMMapIndexedDataset(corpus, "train", 0, 1).files]
    rows = sum(-(-len(file) // MAX_LENGTH) for file in tokens)
    found, seen = [], 0
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        data = open_data(corpus, full_rows=True, global_size=rows, **place)
        assert data.total == rows
        for batch in data.step(0).batches:
            seen += batch.tokens
            found += [ids for ids, _ in documents_of(batch)]
            assert batch.inputs["position_ids"].max() < MAX_LENGTH
    assert seen == sum(map(len, tokens))
    assert sorted(token for ids in found for token in ids) == sorted(np.concatenate(tokens).tolist())


def test_the_fingerprint_tells_other_data_and_orders(corpus: Path, tmp_path: Path) -> None:
    plain = open_data(corpus).fingerprint
    assert open_data(corpus, micro_size=7, pack=False, rank=1, world_size=2).fingerprint == plain
    others = [
        open_data(corpus, seed=1),
        open_data(corpus, validation_share=0.2),
        open_data(corpus, full_rows=True),
        open_data(corpus, objective(max_length=MAX_LENGTH - 1)),
        open_data(corpus, objective(objective="prefix")),
        open_data(write_corpus(tmp_path, LENGTHS, seed=1)),
    ]
    assert len({plain, *(data.fingerprint for data in others)}) == 7
    for file in (*corpus.glob("*.bin"), *corpus.glob("*.idx")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for manifest in tmp_path.glob("*.json"):
        manifest.unlink()
    assert open_data(tmp_path).fingerprint == open_data(tmp_path).fingerprint != plain


def prepares() -> bool:
    return any(thread.name.startswith("pretraining-data") for thread in threading.enumerate())


def test_a_wrong_id_is_named_when_its_step_comes_and_the_thread_ends(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[6] * 8])
    data = np.fromfile(tmp_path / "train_1.bin", dtype=np.uint16)
    data[3 * 6 + 2] = WORDS.stop + 7
    data.tofile(tmp_path / "train_1.bin")
    with open_data(tmp_path, global_size=1, prefetch=4) as opened:
        order = [opened.samples_of(step)[0][0] for step in range(8)]
        bad = order.index(3)
        for step in range(bad):
            opened.step(step)
        with pytest.raises(ValueError, match=rf"step {bad}: .*train: sample 3 holds the id {WORDS.stop + 7}, but"):
            opened.step(bad)
        opened.step(bad + 1)
        assert prepares()
    assert not prepares()
    opened.close()


def test_gpt2_has_no_target_with_its_padding_id(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[6]])
    data = np.fromfile(tmp_path / "train_1.bin", dtype=np.uint16)
    data[1] = WORDS.stop  # the last id of the model, whose score is minus infinity
    data.tofile(tmp_path / "train_1.bin")
    with pytest.raises(ValueError, match=f"sample 0 holds the id {WORDS.stop}"):
        open_data(tmp_path).step(0)


def test_bad_input(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no data set other_1, other_2"):
        PretrainingData(corpus, "other", objective(), global_size=1, micro_size=1)
    with pytest.raises(ValueError, match=r"train: the data sets hold no samples"):
        open_data(write_corpus(tmp_path, [[]]))
    with pytest.raises(ValueError, match=r"its 13 samples leave none to train on"):
        open_data(corpus, validation_share=0.99)
    with pytest.raises(ValueError, match=r"`global_size` must be at least 1, but is 0"):
        open_data(corpus, global_size=0)
    with pytest.raises(ValueError, match=r"`rank` must lie between 0 and `world_size` - 1 \(0\), but is 1"):
        open_data(corpus, rank=1)
    with pytest.raises(ValueError, match=r"data\.full_rows belongs to the objective causal, but that is masked"):
        open_data(corpus, objective("bert"), full_rows=True)
    with pytest.raises(ValueError, match="`number` must not be negative"):
        open_data(corpus).step(-1)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    made = {"tokenizer": {"name": "old", "fingerprint": "f" * 64}}
    write_corpus(tmp_path, [[5]], provenance=made)
    with pytest.raises(ValueError, match=r"`tokenizer` must be the one that made .*train_1 \(old, .* but is tiny"):
        open_data(tmp_path, tokenizer=TinyTokenizer())


def test_objectives_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"data\.objective of a t5 must be one of spans, but is 'causal'"):
        objective("t5", objective="causal")
    with pytest.raises(ValueError, match=r"data\.max_length must be at least 4, but is 3"):
        ObjectiveOptions(max_length=3)
    with pytest.raises(ValueError, match=r"objective must be one of causal, .*, but is 'magic'"):
        ObjectiveOptions(objective="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"at most the model's position_size \(1024\), but is 1025"):
        objective(max_length=1025)
    with pytest.raises(ValueError, match=r"must be at least that of the tokenizer tiny \(180\) and 1 for padding"):
        make_objective(tiny_config("gpt2", vocab_size=180), TinyTokenizer())
    config = tiny_config("gpt2")
    vars(config)["model_type"] = "vit"
    with pytest.raises(ValueError, match="there is no objective for the model type 'vit'"):
        make_objective(config, TinyTokenizer())


class OnlyWords(TinyTokenizer):
    def get_vocab(self) -> dict[str, int]:
        return {"[CLS]": 2, "[MASK]": 3, "[SEP]": END}


def test_tokens_that_an_objective_needs() -> None:
    class Bare(TinyTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ValueError, match=r"needs a tokenizer with \[CLS\], .* tiny lacks"):
        make_objective(tiny_config("bert"), Bare())
    with pytest.raises(ValueError, match="needs a tokenizer with sentinels, but tiny has none"):
        make_objective(tiny_config("t5"), Bare())
    with pytest.raises(ValueError, match=r"data\.whole_words needs a WordPiece vocabulary"):
        make_objective(tiny_config("bert"), OnlyWords(), ObjectiveOptions(whole_words=True))


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("gpt2", {"mask_share": 0.2}, r"data\.mask_share belongs to the objective masked or spans, but that is causal"),
        ("bert", {"mean_span": 4.0}, r"data\.mean_span belongs to the objective spans, but that is masked"),
        (
            "bert",
            {"max_target_length": 9},
            r"data\.max_target_length belongs to the objective spans, but that is masked",
        ),
        ("t5", {"whole_words": True}, r"data\.whole_words belongs to the objective masked, but that is spans"),
    ],
)
def test_options_of_another_objective(model_type: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(model_type, **options)


def test_options_of_the_configuration_reach_the_objective() -> None:
    options: dict[str, Any] = {"max_length": 64, "max_target_length": 20, "mask_share": 0.3, "mean_span": 5.0}
    data = PretrainDataOptions(path="ids", tokenizer="words", **options)
    made = make_objective(tiny_config("t5"), TinyTokenizer(), data.objective_options)
    assert isinstance(made.inner, SpanCorruption)
    assert (made.inner.share, made.inner.mean_span) == (0.3, 5.0)
    assert made.sides == (64, 20)
    assert made.inner.lengths(made.room)[1] <= 20


def test_whole_words_are_masked_together(corpus: Path) -> None:
    data = open_data(corpus, objective("bert", whole_words=True, mask_share=0.4), global_size=13, pack=False)
    pieces = 0
    for batch in data.step(0).batches:
        ids = torch.where(batch.labels == -100, batch.inputs["input_ids"], batch.labels)
        masked = batch.labels != -100
        for row in range(len(ids)):
            for place in range(2, ids.shape[1]):  # the piece behind [CLS] has no word before it
                if ids[row, place] % 3 == 0 and ids[row, place] in WORDS:
                    pieces += 1
                    assert masked[row, place] == masked[row, place - 1]
    assert pieces > 20


def test_spans_fill_the_row(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[200] * 4])
    made = objective("t5", max_length=64)
    (batch,) = open_data(tmp_path, made, global_size=1, pack=False).step(0).batches
    assert made.room > 64
    assert batch.inputs["length"].item() in (63, 64)
    assert batch.labels.shape[1] <= made.sides[1]


@pytest.mark.parametrize(("model_type", "name"), [("gpt2", "causal"), ("t5", "spans")])
def test_lengths_are_those_of_the_documents_packed_or_not(model_type: str, name: str, corpus: Path) -> None:
    made = objective(model_type, objective=name)
    documents = [length for lengths in LENGTHS for length in lengths]
    sequences = [np.array([WORDS.start] * (length - 1) + [END] * min(length, 1)) for length in documents]
    expected = [made.lengths(len(made.cut(sequence))) for sequence in sequences]
    for pack in (True, False):
        batches = open_data(corpus, made, global_size=len(documents), pack=pack).step(0).batches
        for side in range(len(made.sides)):
            found = [length for batch in batches for length in batch.lengths[side]]
            assert sorted(found) == sorted(sizes[side] for sizes in expected)
        assert sum(batch.targets for batch in batches) == sum(int((batch.labels >= 0).sum()) for batch in batches)


def test_lengths_of_full_rows_are_those_of_their_pieces_of_documents(tmp_path: Path) -> None:
    write_corpus(tmp_path, [[5, 3, 10, 7]])  # rows of 8: 5 + 3, 8, 2 + 6, 1
    data = open_data(tmp_path, objective(max_length=8), global_size=4, full_rows=True)
    lengths = [length for batch in data.step(0).batches for length in batch.lengths[0]]
    assert sorted(lengths) == [1, 2, 3, 5, 6, 8]


def test_batches_move_with_their_masks(corpus: Path) -> None:
    (batch, *_) = open_data(corpus).step(0).batches
    moved = batch.to("meta")
    mask = moved.inputs["attention_mask"]
    tensors = [moved.inputs["input_ids"], moved.inputs["position_ids"], mask.documents, mask.lengths]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert torch.equal(moved.labels, batch.labels)  # on the CPU, where the loss looks for targets
    assert moved.tokens == batch.tokens


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_micro_batches_do_not_wait_for_the_device(corpus: Path, model_type: str) -> None:
    """The meta device has no numbers, so that whatever asks for one of them fails."""
    config = tiny_config(model_type, dtype=torch.float32)
    step = open_data(corpus, objective(model_type), micro_size=1, pack=False).step(0)
    with engine.use_engine(engine.TorchEngine(torch.device("meta"))):
        model = families[model_type](config).train()
        loss = accumulate_gradients(model, engine.optim.OptimManager(), step.batches, step.targets)
    assert len(step.batches) > 1
    assert loss.is_meta
    assert any(parameter.grad is not None for parameter in model.parameters())
