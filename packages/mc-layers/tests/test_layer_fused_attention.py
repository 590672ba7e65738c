"""The Triton kernels of attention against float64, forward and backward.

On a GPU they are compiled; elsewhere a child process runs this same file with Triton's interpreter, on small tiles.
"""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from triton_kernels import COMPILED, DEVICE, run_interpreted, runs_kernels, starts_interpreter

from model_center.layer import attention_kernels
from model_center.layer.attention_kernels import Packing, Scoring, attend, attend_packed_reference, attend_reference
from model_center.layer.attention_mask import AttentionMask, bounds_of_groups

pytest.importorskip("triton")
LONGEST = 300 if COMPILED else 34
# The interpreter multiplies the bits of bfloat16 as if they were integers.
TOLERANCES = {torch.float16: 2e-3} | ({torch.bfloat16: 1.5e-2} if COMPILED else {})
pytestmark = [pytest.mark.gpu] if COMPILED else []
some = settings(
    max_examples=15 if COMPILED else 6,
    deadline=None,
    phases=[Phase.generate],  # finding a smaller example takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.slow
@starts_interpreter
def test_interpreted() -> None:
    # Interpreted infinities warn where compiled ones do not.
    run_interpreted(__file__, "-W", "ignore::RuntimeWarning")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the operations; interpreted, with tiles so small that every loop runs several times."""
    from model_center.layer.kernels import fused_attention

    if not COMPILED:
        plan = fused_attention.Plan(
            forward=fused_attention.Tiles(16, 32, 4, 2),
            key_value=fused_attention.Tiles(16, 32, 4, 2),
            query=fused_attention.Tiles(32, 16, 4, 2),
            bias=fused_attention.Tiles(16, 16, 4, 2),
        )
        monkeypatch.setitem(fused_attention.PLANS, 16, plan)
        monkeypatch.setitem(fused_attention.PLANS, 32, plan)
    return fused_attention


def drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors of the shapes; the last one stays float32 if it is two-dimensional, as a bias is."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x if x.dim() == 2 else x.to(dtype)).to(DEVICE).requires_grad_() for x in tensors]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().cpu().double().requires_grad_() for x in tensors]


def assert_near(mine: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(mine, expected, strict=True):
        assert one.isfinite().all()
        error = (one.detach().cpu().double() - other.detach()).norm()
        # Gradients of scores are differences of the numbers that are rounded.
        assert error <= TOLERANCES[dtype] * (other.norm() + other.numel() ** 0.5), (
            tuple(one.shape),
            error.item(),
            other.norm().item(),
        )


def gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).sin().mul(3)
    weights = weights.mul(8).round().div(8)  # which bfloat16 holds exactly; sums of them may cancel
    return list(torch.autograd.grad(output, tensors, weights.to(output)))


def assert_attends(kernels: Any, tensors: list[Tensor], mask: AttentionMask) -> None:
    """Documents and context, given as a group for each position, mask what the written out mask does."""
    length = tensors[0].shape[1]
    score_mask = mask.resolve(length, length, torch.device("cpu"))
    assert score_mask.groups is not None
    assert score_mask.group_bounds is not None
    output = kernels.fused_attention(
        *tensors[:3],
        bias=tensors[3],
        key_lengths=None if mask.lengths is None else mask.lengths.to(DEVICE),
        groups=score_mask.groups.to(DEVICE),
        group_bounds=score_mask.group_bounds.to(DEVICE),
        is_causal=score_mask.groups_are_causal,
        scale=0.3,
    )
    reference = exact(tensors)
    q, k, v = (x.transpose(1, 2) for x in reference[:3])
    expected = attend_reference(q, k, v, score_mask, Scoring(bias=reference[3], scale=0.3))[0].transpose(1, 2)
    assert_near([output, *gradients(output, tensors)], [expected, *gradients(expected, reference)], torch.float16)


@runs_kernels
@some
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_forward_and_backward(kernels: Any, data: st.DataObject, seed: int) -> None:
    pick = data.draw
    dtype = pick(st.sampled_from(list(TOLERANCES)))
    batch, len_q, len_k = pick(st.integers(1, 2)), pick(st.integers(1, LONGEST)), pick(st.integers(1, LONGEST))
    heads, heads_kv = pick(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    dim = pick(st.sampled_from([16, 12, 32] if not COMPILED else [16, 64, 80, 128]))
    is_causal = pick(st.booleans())
    len_k = len_q if is_causal else len_k
    biased, keys = pick(st.booleans()), pick(st.sampled_from(["all", "lengths", "mask"]))
    shapes = [(batch, len_q, heads, dim), *[(batch, len_k, heads_kv, dim)] * 2, (heads, len_q + len_k - 1)]
    tensors = drawn(seed, dtype, *shapes[: 3 + biased])
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, len_k + 1, (batch,), generator=generator)
    padding = torch.rand(batch, len_k, generator=generator) < 0.4
    padding[:, 0] = False  # a query that may attend nothing is the caller's matter, with a mask
    output = kernels.fused_attention(
        *tensors[:3],
        bias=tensors[3] if biased else None,
        key_lengths=lengths.to(DEVICE) if keys == "lengths" else None,
        key_mask=~padding.to(DEVICE) if keys == "mask" else None,
        is_causal=is_causal,
        scale=dim**-0.5,
    )
    reference = exact(tensors)
    mask = AttentionMask(
        dense=torch.ones(1, len_q, len_k, dtype=torch.bool).tril() if is_causal else None,
        lengths=lengths if keys == "lengths" else None,
        key_padding=padding if keys == "mask" else None,
    ).resolve(len_q, len_k, torch.device("cpu"))
    scoring = Scoring(bias=reference[3] if biased else None, scale=dim**-0.5)
    q, k, v = (x.transpose(1, 2) for x in reference[:3])
    expected = attend_reference(q, k, v, mask, scoring)[0].transpose(1, 2)
    assert_near([output, *gradients(output, tensors)], [expected, *gradients(expected, reference)], dtype)


@runs_kernels
@some
@given(
    starts=st.lists(st.integers(1, LONGEST - 1), max_size=3, unique=True),
    ordered=st.sampled_from(["no", "causal", "context"]),
    padded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_documents_and_context(kernels: Any, starts: list[int], ordered: str, padded: bool, seed: int) -> None:
    length = LONGEST
    tensors = drawn(seed, torch.float16, *[(2, length, 1, 16)] * 3, (1, 2 * length - 1))
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.arange(length)[:, None] >= torch.tensor([0, *starts])).sum(1).expand(2, -1)
    context = torch.rand(2, length, generator=generator) < 0.3
    lengths = torch.randint(0, length + 1, (2,), generator=generator)
    mask = AttentionMask(
        documents=documents,
        causal=ordered == "causal",
        context=context if ordered == "context" else None,
        lengths=lengths if padded else None,
    )
    assert_attends(kernels, tensors, mask)


@runs_kernels
@pytest.mark.parametrize("is_split", [False, True])
def test_context_anywhere(kernels: Any, is_split: bool) -> None:
    length = LONGEST
    position = torch.arange(length)
    ranges = [(0, 0), (0, 5), (16, 19), (length - 1, length), (0, length)]
    lengths = torch.full((len(ranges),), length)
    lengths[:2] -= 13
    mask = AttentionMask(
        documents=(position >= 23).int().expand(len(ranges), -1) if is_split else None,
        context=torch.stack([(position >= begin) & (position < end) for begin, end in ranges]),
        lengths=lengths,
    )
    shape = (len(ranges), length, 1, 12)
    assert_attends(kernels, drawn(3, torch.float16, shape, shape, shape, (1, 2 * length - 1)), mask)


@runs_kernels
def test_one_row_of_documents_and_context_serves_a_batch(kernels: Any) -> None:
    position = torch.arange(LONGEST)[None]
    mask = AttentionMask(documents=(position >= LONGEST - 3).int(), context=position < LONGEST - 5)
    assert_attends(kernels, drawn(4, torch.float16, *[(3, LONGEST, 1, 16)] * 3, (1, 2 * LONGEST - 1)), mask)


@runs_kernels
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", ["a column", "one for all"])
def test_lengths_need_not_lie_side_by_side(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "fused_kernels_take", lambda *_: True)  # as on a GPU
    length = 16
    query, key, value, bias = drawn(5, torch.float16, *[(3, 1, length, 16)] * 3, (1, 2 * length - 1))
    sizes = torch.tensor([[5, 1], [length, 2], [9, 3]], device=DEVICE)
    lengths = sizes[:, 0] if form == "a column" else sizes[:1, 0]
    mask = AttentionMask(lengths=lengths).resolve(length, length, DEVICE)
    output, _ = attend(query, key, value, mask, Scoring(bias=bias))
    expected, _ = attend_reference(query, key, value, mask, Scoring(bias=bias))
    assert_near([output], [expected.cpu().double()], torch.float16)


@runs_kernels
def test_tiles_behind_the_diagonal_are_left_out(kernels: Any) -> None:
    tile = 64 if COMPILED else 32  # the longest side of one
    length = 2 * tile
    query, key, value, bias = drawn(0, torch.float16, *[(2, length, 1, 16)] * 3, (1, 2 * length - 1))
    groups = (torch.arange(length) < torch.tensor([[0], [5]])).int().to(DEVICE)
    is_late = torch.arange(length, device=DEVICE)[None, :, None, None] >= tile

    def results(*tensors: Tensor) -> list[Tensor]:
        masks = {"groups": groups, "group_bounds": bounds_of_groups(groups)}
        output = kernels.fused_attention(*tensors, bias=bias, **masks, is_causal=True)
        return [output, *gradients(output, [*tensors, bias])]

    expected = results(query, key, value)
    # What is multiplied by NaN is NaN, also with a weight of zero.
    of_keys = results(query, key.where(~is_late, torch.nan), value.where(~is_late, torch.nan))
    for mine, clean in zip(of_keys[:2], expected[:2], strict=True):  # output and gradient of queries
        assert_close(mine[:, :tile], clean[:, :tile], rtol=0, atol=0)
        assert mine[:, tile:].isnan().all()
    assert not of_keys[4][:, length - 1 + tile :].any()
    of_queries = results(query.where(is_late, torch.nan), key, value)
    for mine, clean in zip(of_queries[2:4], expected[2:4], strict=True):  # gradients of keys and values
        assert_close(mine[:, tile:], clean[:, tile:], rtol=0, atol=0)
        assert mine[:, :tile].isnan().all()


@runs_kernels
@some
@given(
    lengths=st.lists(st.integers(0, LONGEST), min_size=1, max_size=3).filter(any),
    is_causal=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_packed_sequences(kernels: Any, lengths: list[int], is_causal: bool, biased: bool, seed: int) -> None:
    total, longest = sum(lengths), max(lengths)
    shapes = [(total, 2, 16), *[(total, 1, 16)] * 2, (2, 2 * longest - 1)]
    tensors = drawn(seed, torch.float16, *shapes[: 3 + biased])
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    output = kernels.fused_attention(
        *(x[None] for x in tensors[:3]),
        bias=tensors[3] if biased else None,
        cumulative=cumulative.to(DEVICE),
        longest=longest,
        is_causal=is_causal,
        scale=0.3,
    )[0]
    reference = exact(tensors)
    packing = Packing(cumulative=cumulative, longest=longest, is_causal=is_causal)
    scoring = Scoring(bias=reference[3] if biased else None, scale=0.3)
    q, k, v = reference[:3]
    expected = attend_packed_reference(q, k, v, packing, scoring)
    assert_near([output, *gradients(output, tensors)], [expected, *gradients(expected, reference)], torch.float16)


@runs_kernels
@some
@given(len_q=st.integers(5, 40), len_k=st.integers(5, 32), seed=st.integers(0, 2**31))
def test_dropout_drops_the_same_in_both_passes(kernels: Any, len_q: int, len_k: int, seed: int) -> None:
    query, key, value, bias = drawn(
        seed, torch.float16, (2, len_q, 2, 32), *[(2, len_k, 2, 32)] * 2, (2, len_q + len_k - 1)
    )
    torch.manual_seed(seed)
    # With the unit vectors as values, the outputs are the probabilities that are left; none is too small for that.
    units = torch.eye(len_k, 32, device=DEVICE, dtype=torch.float16)[None, :, None].expand(2, -1, 2, -1)
    left = kernels.fused_attention(query, key, units, bias=bias, scale=0.05, dropout_p=0.25)
    torch.manual_seed(seed)
    output = kernels.fused_attention(query, key, value, bias=bias, scale=0.05, dropout_p=0.25)
    reference = exact([query, key, value, bias])
    q, k, v = (x.transpose(1, 2) for x in reference[:3])
    mask = AttentionMask().resolve(len_q, len_k, torch.device("cpu"))
    probabilities = attend_reference(q, k, v, mask, Scoring(bias=reference[3], scale=0.05))[1]
    kept = left.transpose(1, 2)[..., :len_k].cpu() != 0
    expected = (torch.where(kept, probabilities / 0.75, 0.0) @ v).transpose(1, 2)
    tensors = [query, key, value, bias]
    assert_near([output, *gradients(output, tensors)], [expected, *gradients(expected, reference)], torch.float16)


@runs_kernels
def test_dropout_rate_and_independence(kernels: Any) -> None:
    length = 32
    query, key = (torch.zeros(4, length, 8, 32, dtype=torch.float16, device=DEVICE) for _ in range(2))
    units = torch.eye(length, device=DEVICE, dtype=torch.float16)[None, :, None].expand(4, -1, 8, -1)
    torch.manual_seed(0)
    first, second = (kernels.fused_attention(query, key, units, dropout_p=0.25) != 0 for _ in range(2))
    for kept in (first.cpu().double(), second.cpu().double()):
        assert abs(kept.mean() - 0.75) < 0.01  # 32768 draws: four standard deviations
        centred = kept.sub(0.75).transpose(1, 2).reshape(-1, length, length) / 0.1875**0.5  # (32, query, key)
        for dim in range(3):
            rows = centred.transpose(0, dim).flatten(1)
            correlation = rows @ rows.T / length**2
            assert (correlation - correlation.diag().diag()).abs().max() < 6 / length
        neighbours = (centred[:, :, 1:] * centred[:, :, :-1]).mean(), (centred[:, 1:] * centred[:, :-1]).mean()
        assert max(map(abs, neighbours)) < 0.03
    assert (first != second).double().mean() > 0.3


@runs_kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_results_are_bit_repeatable_and_recomputable(kernels: Any, dropout_p: float) -> None:
    length = LONGEST - 7
    shape = (2, length, 2, 16)
    tensors = drawn(0, torch.float16, shape, shape, shape, (2, 2 * length - 1))

    def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        output: Tensor = kernels.fused_attention(query, key, value, bias=bias, dropout_p=dropout_p)
        return output

    runs = []
    for recomputes in (False, True, True):
        torch.manual_seed(1)
        output = checkpoint(attended, *tensors, use_reentrant=False) if recomputes else attended(*tensors)
        runs.append([output, *gradients(output, tensors)])
    for run in runs[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(run, runs[0], strict=True))


@runs_kernels
def test_the_operation_is_one_that_compilers_understand(kernels: Any) -> None:
    query, key, value, bias = drawn(0, torch.float16, *[(2, 20, 2, 16)] * 3, (2, 39))
    arguments = (query, key, value, bias, *[None] * 6, 0, True, 0.5, 0.0)
    torch.library.opcheck(kernels._attention, arguments)

    def model(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        output: Tensor = kernels.fused_attention(query * 2, key, value, bias=bias, dropout_p=0.1)
        return output + 1

    compiled = torch.compile(model, fullgraph=True, backend="inductor" if COMPILED else "aot_eager")
    outputs = compiled(query, key, value, bias), model(query, key, value, bias)
    assert outputs[0].shape == outputs[1].shape
    plain = [kernels.fused_attention(query, key, value, bias=bias)]
    plain += [torch.compile(lambda *x: kernels.fused_attention(*x[:3], bias=x[3]), backend="aot_eager")(*arguments[:4])]
    results = [[output, *gradients(output, [query, key, value, bias])] for output in plain]
    for mine, expected in zip(*results, strict=True):
        assert_close(mine, expected, rtol=0, atol=0)


@runs_kernels
def test_heads_need_not_be_neighbours(kernels: Any) -> None:
    together = drawn(0, torch.float16, (2, 20, 3, 2, 16))[0]
    query, key, value = together.unbind(2)
    expected = kernels.fused_attention(query.contiguous(), key.contiguous(), value.contiguous())
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    elementwise = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (query, key, value)]
    for tensors in ((query, key, value), by_head, elementwise):
        output = kernels.fused_attention(*tensors)
        assert_close(output, expected, rtol=0, atol=0)
    assert gradients(expected, [together])[0].any()
