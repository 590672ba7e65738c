"""The loader deals out rows, each once an epoch, with mc-data[torch] installed."""

import torch

from model_center.dataset import DistributedDataLoader

rows = [{"labels": number} for number in range(7)]
loaders = [DistributedDataLoader(rows, batch_size=2, shuffle=True, rank=rank, world_size=2) for rank in range(2)]
orders = []
for _ in range(2):
    orders.append([int(label) for loader in loaders for batch in loader for label in batch["labels"]])
    assert sorted(orders[-1]) == list(range(7)), orders
assert orders[0] != orders[1]
assert isinstance(next(iter(loaders[0]))["labels"], torch.Tensor)
