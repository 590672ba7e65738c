"""Computes the gradients of one global batch in several ways, in as many processes as torchrun starts.

    torchrun --nproc_per_node 2 gradient_script.py FOLDER

FOLDER holds a model of each family; all gradients go to the file `<processes>.safetensors` in it.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model_center import engine as bmt
from model_center.layer import AttentionMask
from model_center.model import load_model
from model_center.recipe.pretraining import accumulate_gradients

VOCABULARY = 17
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
WAYS = [(1, False), (3, False), (8, False), (1, True), (2, True)]
"""Rows of a micro-batch, and whether two samples share a row."""


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Any]
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels=self.labels.to(device))


def samples() -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of eight samples of different lengths, with positions that have no label.

    The last id is left out: GPT-2 never predicts its padding.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (3, 9, 5, 8, 2, 7, 4, 6):
        ids, labels = (torch.randint(0, VOCABULARY - 1, (length,), generator=generator) for _ in range(2))
        labels[torch.rand(length, generator=generator) < 0.3] = -100
        made.append((ids, labels))
    return made


def padded(parts: list[Tensor], filling: int = 0) -> Tensor:
    return pad_sequence(parts, batch_first=True, padding_value=filling)


def batch_of(family: str, rows: list[list[tuple[Tensor, Tensor]]]) -> Batch:
    """One micro-batch of rows, each of one sample or of several packed ones."""
    ids = padded([torch.cat([sample[0] for sample in row]) for row in rows])
    labels = padded([torch.cat([sample[1] for sample in row]) for row in rows], -100)
    length = torch.tensor([sum(len(sample[0]) for sample in row) for row in rows])
    span = padded([torch.cat([torch.full_like(x, number) for number, (x, _) in enumerate(row)]) for row in rows])
    position = padded([torch.cat([torch.arange(len(x)) for x, _ in row]) for row in rows])
    inputs: dict[str, Any]
    if family == "cpm1":
        inputs = {"input": ids, "length": length, "context": position < 1, "span": span}
    elif family == "cpm2":
        inputs = {"enc_input": ids, "enc_length": length, "dec_input": ids, "dec_length": length}
    elif family == "t5":
        inputs = {"input_ids": ids, "length": length, "decoder_input_ids": ids, "decoder_length": length}
    else:
        mask = AttentionMask(lengths=length, documents=span)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    return Batch(inputs, labels)


def batches_of(family: str, micro_size: int, *, packs: bool) -> Iterator[Batch]:
    """The micro-batches of this process."""
    mine = samples()[bmt.rank() :: bmt.world_size()]
    rows = [mine[at : at + 2] for at in range(0, len(mine), 2)] if packs else [[sample] for sample in mine]
    for at in range(0, len(rows), micro_size):
        yield batch_of(family, rows[at : at + micro_size])


def main(folder: Path) -> None:
    bmt.init_distributed(seed=0)
    targets = sum(int((labels != -100).sum()) for _, labels in samples())
    found: dict[str, Tensor] = {}
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        family = directory.name
        for precision, dtype in PRECISIONS.items():
            model = load_model(directory, dtype=dtype)
            for micro_size, packs in WAYS:
                if packs and family in ("t5", "cpm2"):
                    continue
                optimizer = bmt.optim.AdamOptimizer(model.parameters())
                manager = bmt.optim.OptimManager()
                manager.add_optimizer(optimizer)
                manager.zero_grad()
                loss = accumulate_gradients(model, manager, batches_of(family, micro_size, packs=packs), targets)
                manager.clip_grad_norm(optimizer.param_groups, max_norm=1e9)  # waits for reductions, clips nothing
                way = f"{precision}/{family}/{micro_size}{' packed' * packs}"
                found[f"{way}/loss"] = loss.cpu()
                engine = bmt.current_engine()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        whole = engine.whole(parameter, engine.local(parameter.grad))
                        found[f"{way}/{name}"] = whole.detach().cpu().clone()
    if bmt.rank() == 0:
        save_file(found, folder / f"{bmt.world_size()}.safetensors")
    bmt.current_engine().shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
