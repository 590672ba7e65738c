"""An encoder layer learns, with nothing but mc-layers installed."""

import torch

from model_center import engine as bmt
from model_center.layer import Encoder, Linear

bmt.init_distributed(seed=1)
encoder = Encoder(num_layers=1, dim_model=8, dim_ff=16, num_heads=2, dim_head=4, dtype=torch.float32)
head = Linear(8, 2, dtype=torch.float32)
bmt.init_parameters(head)
optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-2)
hidden, targets = torch.randn(4, 3, 8), torch.tensor([0, 1, 0, 1])
losses = []
for _ in range(20):
    logits = head(encoder(hidden, torch.ones(4, 3, 3, dtype=torch.bool))).mean(dim=1)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
