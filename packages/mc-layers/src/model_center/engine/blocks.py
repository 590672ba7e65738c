"""Blocks of a model: the units of activation recomputation and, under engines that shard, of sharding."""

from collections.abc import Iterable
from typing import Any, cast

import torch

from model_center.engine.base import ModuleT
from model_center.engine.current import current_engine


def CheckpointBlock(module: ModuleT) -> ModuleT:
    """Makes `module` a block: with the engine's setting `use_checkpoint` it recomputes its activations in backward.

    That saves the memory of all activations inside the block for the time of a second forward pass. Random numbers
    (dropout) are the same in both passes.

    Args:
        module: Any module whose `forward` can be called with positional arguments. Parameter names, attributes and
            methods stay where they are.

    Returns:
        What takes the place of `module` in a model; call it with positional arguments only.
    """
    # An engine of sharded parameters may return a wrapper here, which passes everything on to `module`.
    return cast(ModuleT, current_engine().checkpoint_block(module))


class TransformerBlockList(torch.nn.ModuleList):
    """Blocks that run one after another, each on the previous one's output.

    Args:
        blocks: The blocks, in order. Those that are not blocks yet become blocks, as with `CheckpointBlock`.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module]) -> None:
        super().__init__(current_engine().block_list(blocks))

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        """Runs all blocks.

        Args:
            hidden_states: What the first block takes first.
            *args: What every block takes besides, by position.

        Returns:
            The last block's output (`hidden_states` itself if there are no blocks).
        """
        for block in self:
            hidden_states = block(hidden_states, *args)
        return hidden_states
