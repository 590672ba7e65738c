"""How far the host runs ahead of a GPU that does nothing until the host waits for it."""

import pytest
import torch

from model_center.engine.run_ahead import BYTES_AHEAD, RunAhead, blocks_ahead


class Gpu:
    """A stream whose work is done when somebody waits for it."""

    def __init__(self) -> None:
        self.given = self.done = 0

    def record_event(self) -> "Event":
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.given = gpu, gpu.given

    def synchronize(self) -> None:
        self.gpu.done = max(self.gpu.done, self.given)


@pytest.mark.parametrize(
    ("largest", "expected"), [(0, 1), (10, BYTES_AHEAD // 10), (BYTES_AHEAD // 3, 3), (2 * BYTES_AHEAD, 1)]
)
def test_large_blocks_get_a_lead_of_one(largest: int, expected: int) -> None:
    assert blocks_ahead(largest) == expected


@pytest.mark.parametrize("lead", [1, 3])
def test_the_host_waits_for_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch, lead: int) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: gpu)
    ahead = RunAhead()
    ahead.expect(5)
    ahead.expect(BYTES_AHEAD // lead)
    for block in range(10):
        ahead.enter()
        assert gpu.done == max(0, block - lead)
        gpu.given += 1
