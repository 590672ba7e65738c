"""The engine on one GPU: half means float16 there, and offloading goes through pinned memory."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model_center import engine as bmt
from model_center.engine import HALF, Normal, TorchEngine, use_engine
from model_center.engine.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager
from model_center.engine.optim import adam as adam_module
from model_center.layer import Encoder, Linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def gpu_engine() -> Iterator[TorchEngine]:
    engine = TorchEngine()
    assert engine.device.type == "cuda"
    with use_engine(engine):
        yield engine


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    shapes = [(70, 50), (30,), (20, 30, 40), (0,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=source).to("cuda", dtype)) for shape in shapes]


def give_gradients(targets: list[torch.nn.Parameter], step: int) -> None:
    source = torch.Generator().manual_seed(100 + step)
    for target in targets:
        target.grad = torch.randn(target.shape, generator=source).to(target)


def test_half_is_float16_on_the_gpu(gpu_engine: TorchEngine) -> None:
    parameter = gpu_engine.parameter(100, 100, dtype=HALF, init=Normal(0.0, 0.5))
    assert parameter.dtype is torch.float16
    assert parameter.device == gpu_engine.device
    assert parameter.float().std().item() == pytest.approx(0.5, rel=0.05)
    assert gpu_engine.use_checkpoint


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("buckets", [2**24, 64])
def test_both_optimizers_follow_torchs_adamw(dtype: torch.dtype, buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam_module, "BUCKET_ELEMENTS", buckets)
    monkeypatch.setattr(adam_module, "HOST_PIECE_ELEMENTS", buckets // 2)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    ours, offloaded = parameters(dtype), parameters(dtype)
    masters = [torch.nn.Parameter(target.detach().float().clone()) for target in ours]
    on_gpu, on_host = AdamOptimizer(ours, **options), AdamOffloadOptimizer(offloaded, **options)
    reference = torch.optim.AdamW(masters, **options, fused=True)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(offloaded, step)
        for target, master in zip(ours, masters, strict=True):
            assert target.grad is not None
            master.grad = target.grad.float() / 8
        on_gpu.step(scale=8)
        on_host.step(scale=8)
        reference.step()
    saved = on_gpu.state_dict()["state"]
    for index, (one, other, master) in enumerate(zip(ours, offloaded, masters, strict=True)):
        own = saved[index].get("master", one.detach()).cuda()
        torch.testing.assert_close(own, master.detach(), rtol=2e-6, atol=1e-6)
        assert torch.equal(one, own.to(dtype))
        # The host's kernel orders its operations otherwise than the GPU's.
        torch.testing.assert_close(on_host.state[other]["master"].cuda(), master.detach(), rtol=1e-5, atol=1e-6)
        tolerance = torch.finfo(dtype).eps + 1e-5
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
        assert on_host.state[other]["master"].device.type == "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_moves_between_gpu_and_host(dtype: torch.dtype) -> None:
    ours = parameters(dtype)
    on_gpu = AdamOptimizer(ours)
    for step in range(3):
        give_gradients(ours, step)
        on_gpu.step()
    twins = copy.deepcopy(ours)
    on_host = AdamOffloadOptimizer(twins)
    on_host.load_state_dict(on_gpu.state_dict())
    again = AdamOptimizer(copied := copy.deepcopy(ours))
    again.load_state_dict(on_host.state_dict())
    for optimizer, targets in ((on_gpu, ours), (on_host, twins), (again, copied)):
        give_gradients(targets, 3)
        optimizer.step()
    for one, other, third in zip(ours, twins, copied, strict=True):
        assert torch.equal(one, third)
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_offloading_leaves_no_state_on_the_gpu() -> None:
    target = torch.nn.Parameter(torch.ones(2**22, dtype=torch.float16, device="cuda"))
    target.grad = torch.ones_like(target)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    AdamOffloadOptimizer([target]).step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert target.float().mean().item() == pytest.approx(0.999, abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [2, 3, math.inf])
def test_clipping_and_overflow(dtype: torch.dtype, norm_type: float) -> None:
    ours = parameters(dtype)
    give_gradients(ours, 0)
    vector = torch.cat([target.grad.flatten() for target in ours if target.grad is not None]).double()
    unclipped = [None if target.grad is None else target.grad.clone() for target in ours]
    norm = bmt.optim.clip_grad_norm([{"params": ours}], max_norm=0.5, norm_type=norm_type, scale=4.0)
    expected = torch.linalg.vector_norm(vector, norm_type).item() / 4
    assert norm.item() == pytest.approx(expected, rel=1e-4)
    factor = (0.5 / (norm + 1e-6)).clamp(max=1)
    for target, before in zip(ours, unclipped, strict=True):
        if before is not None:  # a factor in half precision would be up to 0.4% off
            torch.testing.assert_close(target.grad, (before.float() * factor).to(dtype), rtol=1e-6, atol=0)
    assert norm.device.type == "cuda"
    manager = OptimManager(loss_scale=4)
    manager.add_optimizer(AdamOptimizer(ours))
    assert manager.step()
    give_gradients(ours, 1)
    assert ours[1].grad is not None
    ours[1].grad[3] = math.nan
    assert not manager.step()
    assert manager.loss_scale == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(dtype: torch.dtype, smoothing: float) -> None:
    logits = (torch.randn(300, 5000, device="cuda") * 3).to(dtype)
    logits[:, -1] = -math.inf
    target = torch.randint(0, 4999, (300,), device="cuda")
    target[::3] = -100
    ours, theirs = logits.clone().requires_grad_(), logits[:, :-1].double().requires_grad_()
    found = bmt.loss.FusedCrossEntropy(label_smoothing=smoothing)(ours, target)
    expected = F.cross_entropy(theirs, target, label_smoothing=smoothing)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (found * 1024).backward()
    (expected * 1024).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert not ours.grad[:, -1].any()
    torch.testing.assert_close(
        ours.grad[:, :-1].double(), theirs.grad, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6
    )


def test_recomputation_repeats_dropout_and_saves_memory(gpu_engine: TorchEngine) -> None:
    options: dict[str, Any] = {"dropout_p": 0.3, "att_init_std": 0.05, "ffn_init_std": 0.05, "dtype": torch.float32}
    peaks, gradients = [], []
    for use_checkpoint in (False, True):
        with use_engine(TorchEngine(gpu_engine.device, use_checkpoint=use_checkpoint)):
            torch.manual_seed(0)
            encoder = Encoder(4, 64, 256, 4, 16, **options)
            x = torch.randn(8, 128, 64, device="cuda")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            encoder(x, None).square().sum().backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            gradients.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("offload", [True, False])
def test_the_documented_loop_learns_in_float16(offload: bool, tmp_path: Path) -> None:
    bmt.init_distributed(seed=0)
    model = Linear(8, 3, init_std=0.1, bias=True)
    assert model.weight.dtype is torch.float16
    inputs = torch.randn(64, 8, device="cuda")
    labels = (inputs @ torch.randn(8, 3, device="cuda")).argmax(1)
    optimizer_class = AdamOffloadOptimizer if offload else AdamOptimizer
    optimizer = optimizer_class(model.parameters(), scale=2.0**24)
    schedule = bmt.lr_scheduler.Noam(optimizer, start_lr=5e-1, warmup_iter=10, end_iter=-1)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = bmt.loss.FusedCrossEntropy()(model(inputs.half()), labels)
        losses.append(loss.item())
        optimizer.loss_scale(loss).backward()
        norm = bmt.optim.clip_grad_norm(optimizer.param_groups, max_norm=10.0, scale=optimizer.scale)
        assert not norm.isnan() or optimizer.scale > 2**16
        bmt.optim_step(optimizer, schedule)
    assert losses[-1] < 0.3 < losses[0]
    assert optimizer.scale < 2**24, "the first steps overflow"
    bmt.save(model, tmp_path / "model.pt")
    with use_engine(TorchEngine(torch.device("cpu"))):
        on_cpu = Linear(8, 3, bias=True)
        bmt.load(on_cpu, tmp_path / "model.pt")
    assert torch.equal(on_cpu.weight, model.weight.float().cpu())
