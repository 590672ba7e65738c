"""Pre-trains a small GPT-2 on indexed data sets, evaluates and saves it; all packages together, started by torchrun.

    torchrun --nproc_per_node 2 pretraining_script.py FOLDER

FOLDER holds `tokenizer` and the data sets `tokens/train_1`, … and `tokens/dev_1`; the model goes to `model`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model_center import engine as bmt
from model_center.dataset import DistributedMMapIndexedDataset
from model_center.dataset.indexed import CausalLM, ObjectiveDataset
from model_center.model import GPT2, GPT2Config
from model_center.tokenizer import load_tokenizer

BATCH, EPOCHS, MAX_LENGTH = 4, 3, 32


def samples(folder: Path, name: str, seed: int | None = None, epoch: int = 0) -> ObjectiveDataset:
    """This process's sequences."""
    place = (bmt.rank(), bmt.world_size())
    source = DistributedMMapIndexedDataset(folder / "tokens", name, *place, seed=seed, epoch=epoch)
    return ObjectiveDataset(source, CausalLM(), max_length=MAX_LENGTH)


def summed_loss(model: GPT2, batch: list[dict[str, np.ndarray]]) -> tuple[Tensor, Tensor]:
    """The sum of the losses of all labelled positions, and their number."""
    device = bmt.current_engine().device
    ids, labels = (
        pad_sequence([torch.from_numpy(sample[name]) for sample in batch], batch_first=True, padding_value=padding)
        for name, padding in (("input_ids", 0), ("labels", -100))
    )
    length = torch.tensor([len(sample["input_ids"]) for sample in batch])
    logits: Tensor = model(ids.to(device), length=length.to(device), return_logits=True)
    loss = bmt.loss.FusedCrossEntropy(reduction="sum")(logits.flatten(0, 1), labels.flatten().to(device))
    return loss, (labels != -100).sum().to(device)


@torch.no_grad()
def evaluate(model: GPT2, data: ObjectiveDataset) -> float:
    """Mean loss of the labelled positions of all processes' samples."""
    model.eval()
    loss, count = summed_loss(model, data[:])
    model.train()
    totals = bmt.distributed.all_reduce(torch.stack([loss, count.float()]))
    return (totals[0] / totals[1]).item()


def main(folder: Path) -> None:
    bmt.init_distributed(seed=0)
    tokenizer = load_tokenizer(folder / "tokenizer")
    config = GPT2Config(
        vocab_size=len(tokenizer) + 1,
        num_layers=2,
        dim_model=32,
        num_heads=2,
        dim_head=16,
        dim_ff=64,
        position_size=MAX_LENGTH,
        dropout_p=0.0,
        emb_init_std=0.1,
        att_init_std=0.1,
        ffn_init_std=0.1,
    )
    model = GPT2(config)
    dev = samples(folder, "dev")
    bmt.print_rank(f"dev loss {evaluate(model, dev):.6f}")
    optimizer = bmt.optim.AdamOptimizer(model.parameters(), lr=1e-2)
    manager = bmt.optim.OptimManager()
    manager.add_optimizer(optimizer)
    for epoch in range(EPOCHS):
        data = samples(folder, "train", seed=0, epoch=epoch)
        for start in range(0, len(data), BATCH):
            loss, count = summed_loss(model, data[start : start + BATCH])
            # Processes count different numbers of tokens: each loss is weighed by its share of them.
            share = bmt.world_size() / bmt.distributed.all_reduce(count)
            manager.zero_grad()
            manager.backward(loss * share)
            manager.clip_grad_norm(optimizer.param_groups, max_norm=1.0)
            manager.step()
        bmt.print_rank(f"dev loss {evaluate(model, dev):.6f}")
    model.save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
