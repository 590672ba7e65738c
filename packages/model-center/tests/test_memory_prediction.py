"""Predicted memory against counts by hand, on tiny models."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model_center.engine import run_ahead
from model_center.model import families
from model_center.recipe.memory_prediction import WORKSPACE, Planner, Setting
from model_center.recipe.simulation import META, MemoryMeter, MicroBatch, meta_model, simulate

SIZES: dict[str, Any] = {"vocab_size": 64, "dim_model": 64, "num_heads": 4, "dim_head": 16, "dim_ff": 256}
SIZES |= {"dtype": torch.bfloat16}
ROWS, LENGTH = 2, 32
TOKENS = ROWS * LENGTH
BATCH = MicroBatch(rows=ROWS, length=LENGTH)
IN_BLOCK = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64
"""Parameters of a block: attention, feed-forward, norms."""
STACKS: dict[str, Any] = {"num_encoder_layers": 2, "num_decoder_layers": 3}


def gpt2(layers: int, **changes: Any) -> Any:
    return families["gpt2"].config_class(**{**SIZES, "num_layers": layers, "dropout_p": 0.0, **changes})


def kept(layers: int, *, recomputes: bool = False, **changes: Any) -> int:
    model = meta_model(families["gpt2"], gpt2(layers, **changes), recomputes=recomputes)
    return simulate(model, BATCH).kept


def kept_by_t5(encoder_layers: int) -> int:
    options: dict[str, Any] = {"num_encoder_layers": encoder_layers, "num_decoder_layers": 1, "dropout_p": 0.0}
    model = meta_model(families["t5"], families["t5"].config_class(**SIZES, **options))
    return simulate(model, replace(BATCH, decoder_length=16)).kept


def test_storages_count_as_long_as_they_live() -> None:
    given = torch.empty(1000, device=META)
    with MemoryMeter(known=[given]) as meter:
        first = given + 1  # 4000 bytes, which take 4096
        assert meter.now == 4096
        view = first.view(10, 100)
        assert meter.now == 4096
        second = given.view(10, 100) * view
        assert meter.now == 8192
        del first, view, second
        assert meter.now == 0
        assert meter.peak == 8192


def test_what_a_block_keeps_for_backward() -> None:
    wide, ff, heads = TOKENS * 64 * 2, TOKENS * 256 * 2, 4
    norms = 2 * (2 * wide + 2 * max(512, 4 * TOKENS))  # input and output, mean and deviation
    attention = 4 * wide + max(512, 4 * TOKENS * heads)  # queries, keys, values, output, log-sums
    random_state = 2 * 512
    feed_forward = 2 * ff  # before and after the activation
    assert kept(3) - kept(2) == pytest.approx(norms + attention + random_state + feed_forward, abs=1024)


def test_norms_without_mean_keep_nothing_in_float32_but_deviations() -> None:
    wide, ff, heads = TOKENS * 64 * 2, TOKENS * 256 * 2, 4
    norms = 2 * (2 * wide + max(512, 4 * TOKENS))  # input and output, deviation
    attention = 4 * wide + max(512, 4 * TOKENS * heads)  # queries, keys, values, output, log-sums
    feed_forward = ff  # after the activation, which needs no more
    assert kept_by_t5(3) - kept_by_t5(2) == pytest.approx(norms + attention + feed_forward, abs=1024)


def test_masks_of_dropout_take_a_byte_for_each_element() -> None:
    with_dropout = kept(3, dropout_p=0.1, att_dropout_p=0.0) - kept(2, dropout_p=0.1, att_dropout_p=0.0)
    assert with_dropout - (kept(3) - kept(2)) == 2 * TOKENS * 64


def test_a_block_that_is_computed_again_keeps_its_input_only() -> None:
    assert kept(3, recomputes=True) - kept(2, recomputes=True) == TOKENS * 64 * 2


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("bert", {"num_layers": 2}), ("gpt2", {"num_layers": 2}), ("gptj", {"num_layers": 2, "pos_rotary_dim": 4}),
        ("cpm1", {"num_layers": 2}), ("t5", STACKS), ("cpm2", STACKS),
    ],
)  # fmt: skip
def test_all_families(family: str, options: dict[str, Any]) -> None:
    config = families[family].config_class(**{**SIZES, **options})
    batch = replace(BATCH, rows=8, decoder_length=16 if "num_decoder_layers" in options else 0)
    all_kept, recomputed = (
        simulate(meta_model(families[family], config, recomputes=recomputes), batch) for recomputes in (False, True)
    )
    assert 0 < recomputed.kept < all_kept.kept <= all_kept.forward <= all_kept.loss
    assert recomputed.backward < all_kept.backward
    parameters = sum(each.numel() for each in meta_model(families[family], config).parameters())
    assert 2 * parameters <= all_kept.gradients <= 2.2 * parameters + 512 * 200


def test_written_out_attention_would_be_seen() -> None:
    """Scores of all pairs would take 4 * 512 * 512 * 2 bytes in each of 12 attentions."""
    config = families["t5"].config_class(**{**SIZES, "num_encoder_layers": 4, "num_decoder_layers": 4})
    batch = MicroBatch(rows=1, length=512, decoder_length=512)
    assert simulate(meta_model(families["t5"], config), batch).kept < 12 * 2 * 4 * 512 * 512 * 2


def test_processes_share_blocks_and_their_gradients() -> None:
    planner = Planner(families["gpt2"], gpt2(4))
    one, four = (planner.predict(Setting(world_size=size), BATCH) for size in (1, 4))
    outside = planner.parameters - 4 * IN_BLOCK
    assert four.parameters == 2 * (IN_BLOCK + outside)
    assert one.parameters == one.gradients == 2 * planner.parameters
    assert one.optimizer == 10 * planner.parameters
    assert four.optimizer == 10 * (IN_BLOCK + outside)
    assert one.gathered == 0
    assert four.gathered == 2 * 2 * IN_BLOCK + 2 * 2 * IN_BLOCK
    assert planner.predict(Setting(world_size=4, zero_level=2), BATCH).gathered == 2 * 4 * IN_BLOCK + 4 * IN_BLOCK


def test_bmtrain_keeps_gathered_parameters_with_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_ahead, "BYTES_AHEAD", 2 * IN_BLOCK)  # one block more than the one at work
    planner = Planner(families["gpt2"], gpt2(8))
    kept, recomputed = (
        planner.predict(Setting(engine="bmtrain", recomputes=again), BATCH).gathered for again in (False, True)
    )
    assert kept - recomputed == 2 * (8 - 2) * IN_BLOCK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_update_takes_memory_only_to_average_gradients(dtype: torch.dtype) -> None:
    planner = Planner(families["gpt2"], gpt2(4, dtype=dtype))
    outside = planner.parameters - 4 * IN_BLOCK
    for offload in (False, True):
        one, four = (planner.predict(Setting(world_size=size, offload=offload), BATCH) for size in (1, 4))
        assert one.update == 0
        assert one.updating == one.parameters + one.optimizer + one.gradients + WORKSPACE
        assert four.update == outside * dtype.itemsize
        assert four.updating == four.parameters + four.optimizer + four.gradients + four.update + WORKSPACE


def test_offloaded_states_are_the_hosts() -> None:
    planner = Planner(families["gpt2"], gpt2(4))
    here, there = (planner.predict(Setting(offload=offload), BATCH) for offload in (False, True))
    assert there.optimizer == 0
    assert there.host_optimizer == (12 + 2) * planner.parameters
    assert there.peak < here.peak


def test_accumulated_gradients_are_there_from_the_beginning() -> None:
    planner = Planner(families["gpt2"], gpt2(4))
    single, several = (planner.predict(Setting(accumulates=several), BATCH) for several in (False, True))
    assert single.computing < several.computing <= single.computing + single.gradients + 4096
    assert several.updating == single.updating


def test_a_budget_lies_between_all_and_nothing() -> None:
    planner = Planner(families["gpt2"], gpt2(4))
    settings = [Setting(), *(Setting(recomputes=False, activation_budget=budget) for budget in (0.0, 0.25, 1.0, None))]
    recomputed, none, quarter, whole, kept = (planner.predict(setting, BATCH) for setting in settings)
    assert none == recomputed
    assert whole == kept
    expected = recomputed.activations + 0.25 * (kept.activations - recomputed.activations)
    assert quarter.activations == pytest.approx(expected, abs=1)
    assert recomputed.computing < quarter.computing < kept.computing


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_largest_micro_batch_fits_and_one_row_more_does_not(recomputes: bool) -> None:
    planner = Planner(families["gpt2"], gpt2(4))
    setting = Setting(recomputes=recomputes)
    memory = planner.predict(setting, replace(BATCH, rows=37)).needed
    rows = planner.largest_rows(setting, BATCH, memory)
    assert rows == pytest.approx(37, abs=1)
    assert planner.predict(setting, replace(BATCH, rows=rows), exact=False).needed <= memory
    assert planner.predict(setting, replace(BATCH, rows=rows + 1), exact=False).needed > memory
    assert planner.largest_rows(setting, BATCH, 1000) == 0
