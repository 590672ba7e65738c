"""A model is saved and loaded, with nothing but mc-models and what it needs installed."""

import tempfile

import torch

from model_center.model import Bert, BertConfig

config = BertConfig(vocab_size=16, dim_model=8, num_heads=2, dim_head=4, dim_ff=16, num_layers=1, half=False)
model = Bert(config).eval()
ids, lengths = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = Bert.from_pretrained(folder).eval()
    logits = model(input_ids=ids, length=lengths, return_logits=True)
    assert logits.shape == (2, 3, 16), logits.shape
    assert torch.equal(loaded(input_ids=ids, length=lengths, return_logits=True), logits)
