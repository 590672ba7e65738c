"""The same layer and training code under a second engine gives the same model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeBlock, FakeDistributedModule, FakeEngine, FlatParameter

from model_center import engine as bmt
from model_center.engine import Engine, TorchEngine, use_engine
from model_center.layer import Decoder, Embedding, Encoder, Linear, RelativePositionEmbedding

torch_engine: Callable[[], Engine] = lambda: TorchEngine(torch.device("cpu"))  # noqa: E731


class Translator(torch.nn.Module):
    """A little of everything: all kinds of parameters, both stacks, a shared bias that needs gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Embedding(20, 8, init_std=1.0)
        self.bias = RelativePositionEmbedding(2, num_buckets=8, max_distance=16, bidirectional=True)
        sizes: dict[str, Any] = {"num_layers": 2, "dim_model": 8, "dim_ff": 16, "num_heads": 2, "dim_head": 4}
        options: dict[str, Any] = {"att_init_std": 0.3, "ffn_init_std": 0.3, "ffn_activate_fn": "gated_gelu"}
        self.encoder = Encoder(**sizes, **options, pos_bias_type="relative")
        self.decoder = Decoder(**sizes, **options)
        self.head = Linear(8, 20, init_std=0.3, bias=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        encoded = self.encoder(self.embedding(source), None, self.bias(source.shape[1], source.shape[1]))
        causal = torch.ones(target.shape[1], target.shape[1]).tril().bool().expand(len(target), -1, -1)
        decoded = self.decoder(self.embedding(target), causal, None, encoded, None)
        logits: torch.Tensor = self.head(decoded)
        return logits


def train(engine: Engine, steps: int = 4) -> tuple[Translator, list[float], list[float]]:
    with use_engine(engine):
        torch.manual_seed(0)
        model = Translator()
        bmt.init_parameters(model)
        optimizer = bmt.optim.AdamOffloadOptimizer(model.parameters(), weight_decay=1e-2)
        schedule = bmt.lr_scheduler.Noam(optimizer, start_lr=3e-2, warmup_iter=2, end_iter=-1)
        loss_func = bmt.loss.FusedCrossEntropy(ignore_index=-100)
        losses, norms = [], []
        data = torch.Generator().manual_seed(1)
        for _ in range(steps):
            source, target = (torch.randint(0, 20, (3, 5), generator=data) for _ in range(2))
            optimizer.zero_grad()
            loss = loss_func(model(source, target).flatten(0, 1), target.flatten())
            losses.append(bmt.sum_loss(loss).item())
            optimizer.loss_scale(loss).backward()
            norm = bmt.optim.clip_grad_norm(optimizer.param_groups, max_norm=1.0, scale=optimizer.scale)
            norms.append(norm.item())
            bmt.optim_step(optimizer, schedule)
        return model, losses, norms


def test_training_is_the_same_under_both_engines() -> None:
    fake = FakeEngine()
    with use_engine(torch_engine()) as plain:
        model, losses, norms = train(plain)
    fake_model, fake_losses, fake_norms = train(fake)
    assert fake_losses == pytest.approx(losses, rel=1e-5)
    assert fake_norms == pytest.approx(norms, rel=1e-4)
    state, fake_state = model.state_dict(), fake_model.state_dict()
    assert list(fake_state) == list(state)
    for name, tensor in state.items():
        torch.testing.assert_close(fake_state[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    # For clipping, for the step as a whole, and for the optimizer, which may also be stepped by itself.
    assert fake.events.count("before update") == 12
    assert fake.events.count("after update") == 8
    assert fake.events[:2] == ["link 2 blocks", "link 2 blocks"]


def test_every_parameter_and_class_is_the_second_engines() -> None:
    with use_engine(FakeEngine()) as engine:
        model = Translator()
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in engine.parameters}
    assert all(isinstance(parameter, FlatParameter) and parameter.dim() == 1 for parameter in model.parameters())
    assert isinstance(model.head, FakeDistributedModule)
    assert isinstance(model.head, Linear)
    assert type(model.head).__name__ == "Linear"
    layers: Any = model.encoder.layers
    assert type(model.head) is type(layers[0].ffn.ffn.w_out)
    assert all(isinstance(block, FakeBlock) for block in model.encoder.layers)


@pytest.mark.parametrize(("writer", "reader"), [(torch_engine, FakeEngine), (FakeEngine, torch_engine)])
def test_a_checkpoint_of_one_engine_loads_in_the_other(
    writer: Callable[[], Engine], reader: Callable[[], Engine], tmp_path: Path
) -> None:
    with use_engine(writer()) as engine:
        model = Translator().eval()
        bmt.save(model, tmp_path / "model.pt")
    with use_engine(reader()):
        other = Translator()
        bmt.load(other, tmp_path / "model.pt")
        other.eval()
    source, target = torch.arange(10).view(2, 5), torch.arange(10, 20).view(2, 5)
    torch.testing.assert_close(other(source, target), model(source, target))
    states = [torch_engine().state_dict(each) for each in (model, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert engine.name in ("torch", "fake")


def test_a_layer_initialises_again() -> None:
    for engine in (torch_engine(), FakeEngine()):
        with use_engine(engine):
            layer = Linear(40, 50, init_std=0.5, bias=True)
            before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
            bmt.init_parameters(torch.nn.Sequential(layer))
            weight = layer.state_dict()["weight"]
            assert not torch.equal(weight, before["weight"])
            assert weight.std().item() == pytest.approx(0.5, rel=0.1)
            assert not layer.state_dict()["bias"].any()


def test_collectives_reach_the_second_engine() -> None:
    with use_engine(FakeEngine()) as engine:
        assert (bmt.rank(), bmt.world_size()) == (0, 2)
        assert bmt.sum_loss(torch.tensor(3.0)).item() == 3.0
        assert bmt.distributed.all_reduce(torch.tensor(3.0)).item() == 6.0
        assert bmt.gather_result(torch.tensor([1, 2])).tolist() == [1, 2, 1, 2]
        bmt.synchronize()
        engine.shutdown()
        assert engine.events == ["synchronize", "shutdown"]


@pytest.mark.parametrize("grad_scale", [None, 4.0])
def test_the_manager_averages_what_the_engine_sums(grad_scale: float | None) -> None:
    with use_engine(FakeEngine()):
        manager = bmt.optim.OptimManager(loss_scale=8, grad_scale=grad_scale)
        assert manager.scale_loss(torch.tensor(1.0)).item() == 8 / (grad_scale or 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_states_of_one_process_go_between_engines(dtype: torch.dtype) -> None:
    flat = FakeEngine()
    flat.world_size = 1
    for writer, reader in ((flat, torch_engine()), (torch_engine(), flat), (flat, flat)):
        with use_engine(writer):
            layer = Linear(3, 2, dtype=dtype, bias=True)
            optimizer = bmt.optim.AdamOptimizer(layer.parameters())
            layer(torch.ones(1, 3, dtype=dtype)).sum().backward()
            optimizer.step()
            saved = optimizer.state_dict()
        assert saved["state"][0]["exp_avg"].shape == (2, 3)
        with use_engine(reader):
            other = bmt.optim.AdamOptimizer(Linear(3, 2, dtype=dtype, bias=True).parameters())
            other.load_state_dict(saved)
            again = other.state_dict()
        torch.testing.assert_close(again, saved, rtol=0, atol=0)
