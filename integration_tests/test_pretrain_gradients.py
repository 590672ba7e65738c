"""The gradient of a global batch, however it is divided: processes, micro-batches, packed or padded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_training import exit_codes, start_processes
from pretraining_gradients import SEQ2SEQ, VOCABULARY, WAYS, samples, save_gradients
from safetensors.torch import load_file

from model_center.engine import TorchEngine, use_engine
from model_center.model import families, load_model

TOLERANCES = {"float64": 1e-6, "float32": 1e-5}
SIZES = {"vocab_size": VOCABULARY, "dim_model": 16, "num_heads": 2, "dim_head": 8, "dim_ff": 32}
SPREAD = {"emb_init_std": 0.5, "att_init_std": 0.1, "ffn_init_std": 0.1, "proj_init_std": 0.2, "dropout_p": 0.0}
DEPTHS = {"num_layers": 2, "num_encoder_layers": 2, "num_decoder_layers": 2, "pos_rotary_dim": 4}
PROCESSES = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, and the gradients that one, two and four processes find."""
    folder = tmp_path_factory.mktemp("gradients")
    with use_engine(TorchEngine(torch.device("cpu"))):
        for family, model_class in families.items():
            torch.manual_seed(1)
            known = vars(model_class.config_class(vocab_size=2))
            options: dict[str, Any] = {**SIZES, **SPREAD, **{k: v for k, v in DEPTHS.items() if k in known}}
            model_class(model_class.config_class(**options)).save_pretrained(folder / family)
    for processes in PROCESSES:
        assert exit_codes(start_processes(save_gradients, processes, folder)) == [0] * processes
    return folder


def logits_of(family: str, model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of one sample alone, by the documented arguments."""
    ids, length = sample["input_ids"][None], torch.tensor([len(sample["input_ids"])])
    if family in SEQ2SEQ:
        decoder_ids = sample["decoder_input_ids"][None]
        output = model(ids, length, decoder_ids, torch.tensor([decoder_ids.shape[1]]), return_logits=True)
    elif family == "cpm1":
        output = model(ids, length, sample["context"][None], torch.zeros_like(ids), return_logits=True)
    else:
        output = model(ids, length=length, return_logits=True)
    logits: torch.Tensor = output[0]
    return logits


def reference(folder: Path, family: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Each sample alone, with all logits: the gradient of the mean cross entropy over all labels."""
    tensors = [{name: torch.from_numpy(values) for name, values in sample.items()} for sample in samples(family)]
    with use_engine(TorchEngine(torch.device("cpu"))):
        model = load_model(folder / family, dtype=dtype)
        logits = torch.cat([logits_of(family, model, sample) for sample in tensors])
        loss = torch.nn.functional.cross_entropy(logits, torch.cat([sample["labels"] for sample in tensors]))
        loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("family", families)
def test_the_same_gradient_in_every_way(folder: Path, family: str, precision: str) -> None:
    expected = reference(folder, family, getattr(torch, precision))
    largest = max(float(gradient.abs().max()) for name, gradient in expected.items() if name != "loss")
    assert 0.01 < largest < 10  # so that the tolerances mean something
    ways = 0
    for processes in PROCESSES:
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in load_file(folder / f"{processes}.safetensors").items():
            kind, of, way, name = key.split("/")
            if (kind, of) == (precision, family):
                found.setdefault(way, {})[name] = tensor
        for way, gradients in found.items():
            ways += 1
            assert gradients.keys() == expected.keys(), (processes, way)
            for name, gradient in gradients.items():
                apart = float((gradient.double() - expected[name].double()).abs().max())
                assert apart <= TOLERANCES[precision], (processes, way, name, apart)
    assert ways == len(PROCESSES) * len(WAYS)
