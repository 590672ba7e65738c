"""The options of the engine that recipes have, and what becomes of them."""

from typing import Any

import pytest
import torch

from model_center import engine
from model_center.recipe.configuration import EngineOptions


def test_options_reach_the_engine() -> None:
    with engine.use_engine(engine.TorchEngine(torch.device("cpu"))):
        engine.init_distributed(seed=1, **EngineOptions(deterministic=True, use_checkpoint=True).settings)
        found = engine.current_engine()
        assert (found.name, found.deterministic, found.use_checkpoint, found.compiles) == ("torch", True, True, False)
        assert torch.are_deterministic_algorithms_enabled()
        engine.init_distributed(seed=1, **EngineOptions().settings)
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True, "activation_budget": -0.1}, "engine.activation_budget must be from 0 to 1, but is -0.1"),
        ({"activation_budget": 0.5}, "must be left out without engine.compile, but is 0.5"),
        ({"compile": True, "use_checkpoint": True, "activation_budget": 0.5}, "left out with engine.use_checkpoint"),
    ],
)
def test_a_budget_of_activations_that_cannot_be_kept(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)
