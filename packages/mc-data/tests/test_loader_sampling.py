"""Properties of the batch plan: disjoint, complete, deterministic, resumable at every step."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.dataset.sampling import BatchPlan

counts = st.integers(4, 70)
batch_sizes = st.integers(1, 7)
world_sizes = st.sampled_from([1, 2, 4])
seeds = st.integers(0, 10)


def plans(count: int, batch_size: int, world_size: int, *, bucketed: bool = False, **options: Any) -> list[BatchPlan]:
    lengths = (np.arange(count) * 37) % 23 if bucketed else None
    settings = {"shuffle": True, "seed": 0, "drop_last": False, "lengths": lengths, **options}
    return [BatchPlan(count, batch_size, rank, world_size, **settings) for rank in range(world_size)]


def epoch(ranks: list[BatchPlan]) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in plan.remaining()[0]] for plan in ranks]


def rows(batches: list[list[list[int]]]) -> list[int]:
    return sorted(row for rank in batches for batch in rank for row in batch)


@settings(deadline=None)
@given(counts, batch_sizes, world_sizes, seeds, st.booleans(), st.booleans())
def test_each_row_goes_to_one_process_once_in_as_many_steps(
    count: int, batch_size: int, world_size: int, seed: int, shuffle: bool, bucketed: bool
) -> None:
    ranks = plans(count, batch_size, world_size, seed=seed, shuffle=shuffle, bucketed=bucketed)
    batches = epoch(ranks)
    assert rows(batches) == list(range(count))
    assert {len(rank) for rank in batches} == {ranks[0].steps}
    for step in zip(*batches, strict=True):
        sizes = {len(batch) for batch in step}
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        assert max(sizes) <= batch_size + 1
    full = [rank[:-1] for rank in batches]
    assert all(len(batch) == batch_size for rank in full for batch in rank)


@settings(deadline=None)
@given(counts, batch_sizes, world_sizes)
def test_drop_last_leaves_out_less_than_a_step(count: int, batch_size: int, world_size: int) -> None:
    if count < batch_size * world_size:
        with pytest.raises(ValueError, match="a full step of all processes needs"):
            plans(count, batch_size, world_size, drop_last=True)
        return
    batches = epoch(plans(count, batch_size, world_size, drop_last=True))
    assert all(len(batch) == batch_size for rank in batches for batch in rank)
    kept = rows(batches)
    assert len(kept) == len(set(kept)) == count - count % (batch_size * world_size)


@settings(deadline=None)
@given(counts, seeds, st.booleans())
def test_orders_depend_on_seed_and_epoch_alone(count: int, seed: int, bucketed: bool) -> None:
    one, again = (plans(count, 2, 1, seed=seed, bucketed=bucketed)[0] for _ in range(2))
    assert epoch([one]) == epoch([again])
    # Two random orders of a few rows may well be equal, ten in a row are not.
    orders = []
    for number in range(10):
        one.start_epoch(number)
        orders.append(str(epoch([one])))
    assert len(set(orders)) > 1
    other = plans(count, 2, 1, seed=seed + 1, bucketed=bucketed)[0]
    others = []
    for number in range(10):
        other.start_epoch(number)
        others.append(str(epoch([other])))
    assert orders != others


@settings(deadline=None)
@given(
    counts,
    st.lists(st.tuples(batch_sizes, world_sizes, st.integers(0, 5)), min_size=1, max_size=4),
    st.booleans(),
    seeds,
)
def test_an_epoch_goes_on_with_any_batch_size_and_number_of_processes(
    count: int, stretches: list[tuple[int, int, int]], bucketed: bool, seed: int
) -> None:
    seen: list[int] = []
    state: dict[str, Any] | None = None
    for batch_size, world_size, steps in [*stretches, (3, 1, count)]:
        ranks = plans(count, batch_size, world_size, seed=seed, bucketed=bucketed)
        for plan in ranks:
            if state is not None:
                plan.restore(state)
            batches, ends = plan.remaining()
            for batch, end in list(zip(batches, ends, strict=True))[:steps]:
                seen += batch.tolist()
                plan.consumed = end
        # Only where fewer rows than processes are left do processes differ in what they have seen.
        state = max((plan.state() for plan in ranks), key=lambda state: sum(stage[2] for stage in state["stages"]))
    assert sorted(seen) == list(range(count))


@settings(deadline=None)
@given(counts, batch_sizes, world_sizes, st.booleans(), st.data())
def test_resuming_alike_repeats_the_batches_that_were_to_come(
    count: int, batch_size: int, world_size: int, bucketed: bool, data: st.DataObject
) -> None:
    for plan, resumed in zip(*(plans(count, batch_size, world_size, bucketed=bucketed) for _ in range(2)), strict=True):
        batches, ends = plan.remaining()
        step = data.draw(st.integers(0, len(batches)))
        plan.consumed = ends[step - 1] if step else 0
        resumed.restore(plan.state())
        assert epoch([resumed])[0] == [batch.tolist() for batch in batches[step:]]


def test_buckets_hold_similar_lengths_and_stay_random() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 4000)
    plan = BatchPlan(4000, 8, 0, 1, shuffle=True, seed=0, drop_last=False, lengths=lengths)

    def padding(plan: BatchPlan) -> float:
        batches = plan.remaining()[0]
        padded = sum(lengths[batch].max() * len(batch) for batch in batches)
        return float(padded / lengths.sum())

    assert padding(plan) < 1.05
    assert padding(BatchPlan(4000, 8, 0, 1, shuffle=True, seed=0, drop_last=False, lengths=None)) > 1.5
    means = [lengths[batch].mean() for batch in plan.remaining()[0]]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be positive, but is 0"),
        ({"rank": 2}, r"`rank` must be in \[0, world_size = 2\), but is 2"),
        ({"seed": -1}, "`seed` must not be negative"),
        ({"count": 1}, "the data set has 1 rows, but one row for each process needs 2"),
        ({"lengths": np.ones(5)}, "5 lengths for the data set's 9 rows"),
    ],
)
def test_settings_that_cannot_work(change: dict[str, Any], message: str) -> None:
    settings = {"count": 9, "batch_size": 2, "rank": 0, "world_size": 2, "shuffle": False, "seed": 0}
    with pytest.raises(ValueError, match=message):
        BatchPlan(**{**settings, "drop_last": False, "lengths": None, **change})


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("shuffle", False), ("count", 10)])
def test_a_state_of_other_rows_or_another_order_is_refused(name: str, value: int) -> None:
    state = plans(9, 2, 1)[0].state()
    settings: dict[str, Any] = {"count": 9, "shuffle": True, "seed": 0, name: value}
    other = BatchPlan(batch_size=2, rank=0, world_size=1, drop_last=False, lengths=None, **settings)
    with pytest.raises(ValueError, match=f"saved with {name} "):
        other.restore(state)
    with pytest.raises(ValueError, match="version 2, but known is 1"):
        other.restore({**state, "version": 2})
