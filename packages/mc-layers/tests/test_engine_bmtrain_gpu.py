"""BMTrain itself behind the seam, on one GPU; `integration_tests` holds what needs several."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model_center import engine as bmt
from model_center.engine import Engine, Normal, TorchEngine, use_engine
from model_center.layer import Embedding, Encoder, Linear, Module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Small(Module):
    """Embedding (tied to the output), two blocks, a head: parameters in blocks and outside them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.embedding = Embedding(50, 32, dtype=dtype)
        self.encoder = Encoder(2, 32, 64, 4, 8, dtype=dtype, norm_bias=True, att_bias=True, ffn_bias=True)
        self.head = Linear(32, 32, dtype=dtype, bias=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.embedding.projection(self.head(self.encoder(self.embedding(ids), None)))
        return logits


@pytest.fixture(params=[(True, 3), (False, 2)], ids=["recomputed-zero3", "kept-zero2"])
def bmtrain_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    pytest.importorskip("bmtrain", reason="needs bmtrain")
    from model_center.engine.bmtrain_engine import BMTrainEngine

    use_checkpoint, zero_level = request.param
    with use_engine(BMTrainEngine(use_checkpoint=use_checkpoint, zero_level=zero_level)) as engine:
        yield engine


def build(dtype: torch.dtype) -> Small:
    torch.manual_seed(0)
    return Small(dtype)


def train(
    model: Small,
    *,
    clear_to_none: bool = True,
    clear_late: bool = False,
    saves: bool = False,
    steps: int = 5,
    micro_batches: int = 1,
) -> list[float]:
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    cross_entropy = bmt.loss.FusedCrossEntropy()
    losses = []
    for step in range(steps):
        ids = torch.randint(0, 50, (4, 10), generator=torch.Generator().manual_seed(step)).cuda()
        if not clear_late:
            optimizer.zero_grad(set_to_none=clear_to_none)
        if saves:
            bmt.current_engine().state_dict(model)
        total = 0.0
        for part in ids.chunk(micro_batches):
            loss = cross_entropy(model(part).view(-1, 50), part.reshape(-1)) / micro_batches
            if clear_late:
                optimizer.zero_grad(set_to_none=clear_to_none)
            optimizer.loss_scale(loss).backward()
            total += loss.item()
        norm = bmt.optim.clip_grad_norm(optimizer.param_groups, max_norm=1.0, scale=optimizer.scale)
        bmt.optim_step(optimizer)
        losses += [total, norm.item()]
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clear_to_none", [True, False])
def test_trains_as_plain_torch_does(bmtrain_engine: Engine, dtype: torch.dtype, clear_to_none: bool) -> None:
    # BMTrain's own block goes on adding to the old gradient when `zero_grad` has set it to None.
    losses = train(build(dtype), clear_to_none=clear_to_none)
    with use_engine(TorchEngine(use_checkpoint=False)):
        expected = train(build(dtype))
    assert losses == pytest.approx(expected, rel=1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("clear_late", [False, True])
def test_cleared_gradients_do_not_come_back(bmtrain_engine: Engine, clear_late: bool, saves: bool) -> None:
    # Whatever gathers parameters, BMTrain's block then gives them the gradient that it has kept.
    losses = train(build(torch.float32), clear_late=clear_late, saves=saves)
    with use_engine(TorchEngine(use_checkpoint=False)):
        expected = train(build(torch.float32))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_gradients_accumulate_over_micro_batches(bmtrain_engine: Engine) -> None:
    whole, parts = (train(build(torch.float32), micro_batches=number) for number in (1, 2))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_checkpoints_go_between_engines_bit_by_bit(bmtrain_engine: Engine, tmp_path: Path) -> None:
    model = build(torch.bfloat16)
    train(model)
    bmt.save(model, tmp_path / "bmtrain.pt")
    with use_engine(TorchEngine()):
        plain = build(torch.bfloat16)
        bmt.load(plain, tmp_path / "bmtrain.pt")
        bmt.save(plain, tmp_path / "torch.pt")
    saved, again = (torch.load(tmp_path / name, weights_only=True) for name in ("bmtrain.pt", "torch.pt"))
    assert list(saved) == list(again) == list(plain.state_dict())
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    fresh = build(torch.bfloat16)
    bmt.load(fresh, tmp_path / "torch.pt")
    for name, tensor in bmtrain_engine.state_dict(fresh).items():
        assert torch.equal(tensor, saved[name]), name


def test_initialises_as_plain_torch_does(bmtrain_engine: Engine) -> None:
    whole = bmtrain_engine.state_dict(build(torch.float32))
    with use_engine(TorchEngine()) as plain:
        expected = plain.state_dict(build(torch.float32))
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    again = build(torch.float32)
    torch.manual_seed(0)
    bmt.init_parameters(again)
    state = bmtrain_engine.state_dict(again)
    assert state["head.weight"].std().item() == pytest.approx(1.0, rel=0.1)
    assert not torch.equal(state["encoder.layers.0.ffn.ffn.w_out.weight"], torch.zeros(32, 64))


def test_evaluation_without_gradients(bmtrain_engine: Engine) -> None:
    ids = torch.arange(20, device="cuda").view(2, 10)
    model = build(torch.float32).eval()
    with torch.no_grad():
        logits = model(ids)
        with use_engine(TorchEngine()):
            expected = build(torch.float32).eval()(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_host_does_not_wait_at_every_block(bmtrain_engine: Engine) -> None:
    model = build(torch.bfloat16)
    x = torch.randn(4, 10, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    was_behind = []
    for _ in range(2):  # the first time compiles kernels and takes memory from the device
        bmtrain_engine.synchronize()
        torch.cuda._sleep(3_000_000_000)  # more than a second
        asleep = torch.cuda.current_stream().record_event()
        model.encoder(x, None).sum().backward()
        was_behind.append(not asleep.query())
    assert was_behind[1]
    bmtrain_engine.synchronize()


def test_gathering_copies_no_empty_tensors_from_the_host(bmtrain_engine: Engine) -> None:
    model = build(torch.bfloat16)
    x = torch.randn(4, 10, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model.encoder(x, None).sum().backward()
        bmtrain_engine.synchronize()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::set_"] > len(list(model.encoder.parameters()))
    assert counts.get("aten::_to_copy", 0) < 10


def test_gradient_of_a_view_arrives_whole(bmtrain_engine: Engine) -> None:
    layer = Linear(4, 6, dtype=torch.float32)
    weight = layer.weight
    # The gradient of a slice of a larger tensor has an offset in its storage, which BMTrain's reduction ignores.
    joined = torch.cat([torch.ones(6, 4, device="cuda"), weight])
    (joined * torch.arange(48.0, device="cuda").view(12, 4)).sum().backward()
    bmtrain_engine.before_update()
    (parameter,) = layer.parameters()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad.view(6, 4), torch.arange(24.0, 48.0, device="cuda").view(6, 4))


def test_collectives_accept_any_device_and_type(bmtrain_engine: Engine) -> None:
    flags = torch.tensor([True, False])
    assert torch.equal(bmt.gather_result(flags), flags)
    assert torch.equal(bmt.distributed.all_reduce(torch.arange(6)[2:4], "max"), torch.tensor([2, 3]))
    assert torch.equal(bmt.distributed.broadcast(torch.arange(6.0)[2:4]), torch.tensor([2.0, 3.0]))


def test_leaves_the_process_as_it_was(bmtrain_engine: Engine) -> None:
    assert torch.backends.cudnn.enabled
    assert len(os.sched_getaffinity(0)) == os.cpu_count()


def test_refusals(bmtrain_engine: Engine) -> None:
    model = build(torch.float32)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`extra.weight` is a plain torch.nn.Parameter, which BMTrain neither shards"):
        bmtrain_engine.state_shapes(model)
    with pytest.raises(ValueError, match="`int8` must be False under BMTrain"):
        Encoder(1, 32, 64, 4, 8, int8=True)
    with pytest.raises(ValueError, match="`zero_level` must be 2 or 3, but is 1"):
        type(bmtrain_engine)(zero_level=1)  # type: ignore[call-arg]


def test_large_norms_do_not_overflow(bmtrain_engine: Engine) -> None:
    gradients = [torch.full((100,), 1e18, device="cuda"), torch.full((3,), 6e4, device="cuda", dtype=torch.float16)]
    assert bmtrain_engine.total_norm(gradients, 2).item() == pytest.approx(1e19, rel=1e-5)
    assert bmtrain_engine.parameter(3, dtype=torch.float32, init=Normal()).shape == (3,)
