"""Losses that are no numbers and losses that leap: found before the optimizer's step, reported with their batch."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

from model_center.tokenizer import Tokenizer

from .pretrain_configuration import AnomalyPolicy, WatchOptions
from .run_directory import Entry, write_text

Action = Literal["fine", "warn", "skip", "rewind", "stop"]

MAD_OF_NORMAL = 0.6745
"""Median absolute deviation of a normal distribution, in standard deviations."""
SMALLEST_SPREAD = 0.01
"""Share of the median that losses are taken to spread at least: steps of a flat curve are no spikes."""
MOST_SAMPLES, MOST_EXCERPTS, LONGEST_EXCERPT = 4096, 8, 500


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a step whose gradients are there and whose update has not been made."""

    action: Action
    """fine or warn: update. skip: leave the update out. rewind: load the last checkpoint, and tell the watch
    (`LossWatch.rewound`). stop: end the run with the reason as its error."""
    reason: str = ""
    """What was found, for a message; empty if fine."""


class TrainingStoppedError(RuntimeError):
    """The watch has stopped a run; the message says why and what can be done."""


class LossWatch:
    """Judges each step by its loss and gradient norm.

    Both must be those of the global batch, so that all processes come to the same verdict. Its state belongs to a
    checkpoint: with it a resumed run judges as if it had never been interrupted.

    Args:
        options: what is an anomaly, and what is done about it.
        scales_loss: whether the loss is scaled dynamically, as with float16. Then gradients that overflow are how the
            scale is found, and only losses are judged.
    """

    def __init__(self, options: WatchOptions, *, scales_loss: bool = False) -> None:
        self.options = options
        self.scales_loss = scales_loss
        self.losses: list[tuple[int, float]] = []
        """Step and loss of the last fine steps, at most a window of them."""
        self.skipped = 0
        """Skipped steps in a row."""
        self.rewinds: list[int] = []
        """Steps that a rewind was for."""
        self.first: float | None = None
        """Loss of the first step."""
        self.high = 0
        """Steps in a row whose loss was far above it."""

    def judge(self, step: int, loss: float, gradient_norm: float) -> Verdict:
        """Judge a step before its update.

        Args:
            step: number of the step; counts from wherever, but always up by one (but for rewinds).
            loss: its loss, the mean over the global batch.
            gradient_norm: norm of all gradients before clipping.
        """
        reason, policy = self._anomaly(loss, gradient_norm)
        if self._has_diverged(loss):
            return Verdict(
                "stop",
                f"the loss is {loss:.4g} and has been above {self.options.divergence:g} times that of the first step "
                f"({self.first:.4g}) for {self.high} steps (watch.divergence)",
            )
        if policy is None:
            self._remember(step, loss)
            return Verdict("fine")
        if policy == "warn":
            # What the run goes on from is what later losses are measured against.
            if math.isfinite(loss):
                self._remember(step, loss)
        elif policy == "skip":
            self.skipped += 1
            if self.skipped > self.options.patience:
                why = (
                    f"and {self.options.patience} steps in a row were skipped before; the learning rate may be too high"
                )
                return Verdict("stop", f"{reason}, {why}")
        elif policy == "rewind":
            if len(self.rewinds) == self.options.max_rewinds:
                return Verdict("stop", f"{reason}, after {len(self.rewinds)} rewinds (watch.max_rewinds)")
            self.rewinds.append(step)
        return Verdict(policy, reason)

    def _anomaly(self, loss: float, gradient_norm: float) -> tuple[str, AnomalyPolicy | None]:
        """Return what is wrong and the policy for it; None if nothing is."""
        options = self.options
        if not math.isfinite(loss):
            return f"the loss is {loss}", options.non_finite
        if not math.isfinite(gradient_norm) and not self.scales_loss:
            return f"the gradient norm is {gradient_norm} (loss {loss:.4g})", options.non_finite
        if len(self.losses) == options.window:
            recent = [value for _, value in self.losses]
            middle = median(recent)
            deviation = median(abs(value - middle) for value in recent) / MAD_OF_NORMAL
            spread = max(deviation, SMALLEST_SPREAD * abs(middle))
            if loss > middle + options.factor * spread:
                found = f"the loss is {loss:.4g}, {(loss - middle) / spread:.1f} standard deviations above {middle:.4g}"
                return f"{found}, the median of the last {options.window} steps", options.spike
        return "", None

    def _has_diverged(self, loss: float) -> bool:
        """Whether losses are that high for good; those that are no numbers are another matter."""
        factor = self.options.divergence
        if factor is None or not math.isfinite(loss):
            return False
        if self.first is None:
            self.first = loss
        self.high = self.high + 1 if loss > factor * self.first else 0
        return self.high > self.options.patience

    def _remember(self, step: int, loss: float) -> None:
        self.losses = [*self.losses, (step, loss)][-self.options.window :]
        self.skipped = 0

    def rewound(self, step: int) -> None:
        """Forget what came after a step, which the run has gone back to. Rewinds and their batches stay known."""
        self.losses = [entry for entry in self.losses if entry[0] <= step]
        self.skipped = self.high = 0

    def excludes(self, step: int) -> bool:
        """Whether a rewind was for this step, so that its batch is left out when its turn comes again."""
        return step in self.rewinds

    def state_dict(self) -> dict[str, Any]:
        """Return all that later verdicts depend on, fit for JSON."""
        state = {name: getattr(self, name) for name in ("skipped", "rewinds", "first", "high")}
        return state | {"losses": [list(entry) for entry in self.losses]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]][-self.options.window :]
        self.skipped = int(state["skipped"])
        self.rewinds = [int(step) for step in state["rewinds"]]
        self.first, self.high = state["first"], int(state["high"])


def report_batch(
    run: Path,
    step: int,
    verdict: Verdict,
    *,
    loss: float,
    gradient_norm: float,
    samples: Sequence[int],
    rows: Iterable[Sequence[int]] = (),
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write what is known of a batch that a watch found fault with to `anomalies/step-000123.json` of a run.

    Args:
        run: the run directory.
        step: number of the step.
        verdict: the watch's.
        loss: the step's loss.
        gradient_norm: its gradient norm.
        samples: numbers of the global batch's samples; the first few thousands are written.
        rows: token ids of this process's rows; of the first few an excerpt is written.
        tokenizer: decodes them; without it the ids themselves are written.

    Returns:
        The file.
    """
    shown = [list(row) for row in islice(rows, MOST_EXCERPTS)]
    if tokenizer is not None:
        excerpts: list[Any] = [tokenizer.decode(row)[:LONGEST_EXCERPT] for row in shown]
    else:
        excerpts = [row[:LONGEST_EXCERPT] for row in shown]
    report = {
        "step": step,
        "action": verdict.action,
        "reason": verdict.reason,
        "loss": _finite_or_name(loss),
        "gradient_norm": _finite_or_name(gradient_norm),
        "samples": list(samples[:MOST_SAMPLES]),
        "samples_in_all": len(samples),
        "excerpts": excerpts,
    }
    file = run / Entry.ANOMALIES / f"step-{step:06d}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return file


def count_reports(run: Path) -> dict[str, int]:
    """Return how many anomalies a run has reported, by what was done about them."""
    files = sorted((run / Entry.ANOMALIES).glob("step-*.json"))
    return dict(Counter(str(json.loads(file.read_text(encoding="utf-8"))["action"]) for file in files))


def _finite_or_name(value: float) -> float | str:
    """Return a number, or the name of what is none: JSON has no such numbers."""
    return value if math.isfinite(value) else str(value)
