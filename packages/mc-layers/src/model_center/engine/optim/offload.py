"""Adam whose state lies in the host's memory and is updated by its processors."""

from collections.abc import Iterator
from functools import cached_property

import torch

from model_center.engine.current import current_engine
from model_center.engine.optim.adam import AdamOptimizer, Bucket, local_gradient


class AdamOffloadOptimizer(AdamOptimizer):
    """`AdamOptimizer` whose masters and moments stay in the host's memory and are updated by the CPU.

    A GPU then holds 2 bytes for a half-precision parameter and 2 for its gradient, the host 12 and a pinned buffer of
    2. Gradients travel to the host while earlier ones are being worked on. For parameters that are on the CPU anyway
    there is no difference from `AdamOptimizer`.

    Source: Ren et al. 2021, "ZeRO-Offload". Takes the arguments of `AdamOptimizer`.
    """

    @cached_property
    def _buffers(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        return {}

    def _state_device(self, parameter: torch.nn.Parameter) -> torch.device:  # noqa: ARG002
        return torch.device("cpu")

    def _fetch(self, buckets: list[Bucket]) -> Iterator[list[torch.Tensor]]:
        arrivals = [self._send(bucket) for bucket in buckets]
        for bucket, arrival in zip(buckets, arrivals, strict=True):
            if arrival is None:
                yield [local_gradient(parameter) for parameter in bucket]
            else:
                arrival.synchronize()
                yield [self._buffer(parameter) for parameter in bucket]

    def _send(self, bucket: Bucket) -> torch.cuda.Event | None:
        """Sends the gradients of a bucket to the host; returns what tells of their arrival, None if they are there."""
        if bucket[0].device.type == "cpu":
            return None
        for parameter in bucket:
            self._buffer(parameter).copy_(local_gradient(parameter), non_blocking=True)
        arrival: torch.cuda.Event = torch.cuda.current_stream(bucket[0].device).record_event()
        return arrival

    def _outlet(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        held = super()._outlet(parameter)
        return held if held.device.type == "cpu" else self._buffer(parameter)

    def _publish(self, bucket: Bucket) -> None:
        for parameter in bucket:
            held = super()._outlet(parameter)
            if held.device.type != "cpu":
                # The next gradient is copied to the buffer by the same stream as this goes away.
                held.copy_(self._buffer(parameter), non_blocking=True)

    def _buffer(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The pinned room that a parameter's gradient comes through and its new value leaves through."""
        if parameter not in self._buffers:
            held = current_engine().local(parameter.detach())
            self._buffers[parameter] = torch.empty_like(held, device="cpu", pin_memory=True)
        return self._buffers[parameter]
