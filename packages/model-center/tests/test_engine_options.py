"""The options of the engine that recipes have, and what becomes of them."""

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
