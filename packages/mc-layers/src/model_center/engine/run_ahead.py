"""How far the host may be ahead of the GPU where whole parameters of blocks come and go."""

from collections import deque

import torch

BYTES_AHEAD = 128 * 2**20
"""Whole parameters that may wait for the GPU, beside those of the block at work."""


def blocks_ahead(largest: int) -> int:
    """How many blocks the host may be ahead, one at least, where the largest has so many bytes of parameters."""
    return max(1, BYTES_AHEAD // largest) if largest else 1


class RunAhead:
    """Holds the host back before it gathers a block's parameters while those of earlier ones still wait for the GPU.

    With a lead of one block, which is all that large ones get, the GPU has to wait whenever the host has more to do
    than launch a block's kernels: between backward and the optimizer's step, for one.
    """

    def __init__(self) -> None:
        self._largest = 0
        self._entered: deque[torch.cuda.Event] = deque()

    def expect(self, size: int) -> None:
        """Told of the bytes of each block."""
        self._largest = max(self._largest, size)

    def enter(self) -> None:
        """Called by the host before each block, in forward and in backward."""
        while len(self._entered) >= blocks_ahead(self._largest):
            self._entered.popleft().synchronize()
        self._entered.append(torch.cuda.current_stream().record_event())
