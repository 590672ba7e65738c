"""`model-center report`: runs side by side in a table and a plot, whether finished, running or crashed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import isfinite, prod
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from .anomalies import count_reports
from .commands import OK, preparing, print_lines
from .configuration import ReportConfig
from .metrics import valid_records
from .progress import RECENT_STEPS, count, duration, operations
from .run_directory import Entry, RunDirectory, read_status
from .valid_json import valid_json

LAST_SHARE = 50
"""The final training loss is the mean of this part (one in so many) of the steps."""


@dataclass(frozen=True)
class RunSummary:
    """What one run came to, or has come to so far; None where it is not known (yet)."""

    run: str
    """The directory as it was given."""
    state: str
    """running, interrupted, failed or finished."""
    error: str | None
    """What a failed run failed of."""
    last_sign: str
    """When the run last wrote its metrics or its status (UTC): a run that was killed still says that it is running."""
    model: str | None
    """Name of the model in the configuration, without folders."""
    parameters: int | None
    """Numbers the model is made of."""
    data: str | None
    """Task or data set in the configuration, without folders."""
    steps: int
    """Training steps done."""
    tokens: int | None
    """Tokens trained on."""
    training_loss: float | None
    """Mean training loss of the last steps."""
    final_loss: float | None
    """Loss of the last validation or evaluation."""
    perplexity: float | None
    """Perplexity of the last validation."""
    best_loss: float | None
    """Lowest loss of a validation or evaluation."""
    measure: str | None
    """What the score is, e.g. accuracy."""
    best_score: float | None
    """Highest score of an evaluation."""
    tokens_per_second: float | None
    """Tokens by the time that training steps took."""
    tflops: float | None
    """Floating-point operations of the model a second and GPU in that time, in 10^12."""
    peak_share: float | None
    """These as a share of what the GPU can do."""
    memory_gib: float | None
    """Largest memory that tensors have taken of a GPU or, on a CPU, that the process has taken."""
    predicted_memory_gib: float | None
    """What was predicted for a GPU."""
    seconds: float
    """Time that training steps took."""
    seconds_left: float | None
    """What a running run still needs, at the speed of its last steps."""
    anomalies: int
    """Steps whose loss was reported as an anomaly."""


def run(config: ReportConfig, console: Console, *, json: bool) -> int:
    """Print the comparison, and draw it if asked to."""
    with preparing(console, "Reading the runs"):
        records = {name: read_records(Path(name)) for name in config.runs}
        summaries = [summarize(Path(name), records[name]) for name in records]
        if config.plot is not None:
            # Only here, since a table needs no Matplotlib.
            from .plot import plot_losses

            plot_losses(records, Path(config.plot))
    if json:
        console.out(as_json(summaries), highlight=False)
    else:
        console.print(table_of(summaries))
        if config.plot is not None:
            print_lines(console, {"plot": config.plot})
    return OK


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run; none if it was left before its first step.

    Raises:
        ValueError: the directory is no run, or its metrics are damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a run directory: there is no such directory")
    missing = {"state", "updated"} - read_status(path).keys()
    if missing:
        raise ValueError(f"{path} is not a run directory: its status.json has no {' and no '.join(sorted(missing))}")
    file = RunDirectory(path).metrics
    try:
        return valid_records(file)
    except FileNotFoundError:
        return []
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def summarize(path: Path, records: Sequence[Mapping[str, Any]]) -> RunSummary:
    """Return the summary of a run directory.

    What the run has put under `summary` in its status.json (`model`, `parameters`, `data`, `predicted_memory_gib`)
    wins over what its configuration, its checkpoints and its metrics tell.

    Args:
        path: the directory.
        records: its metrics, as `read_records` returns them.
    """
    run, status = RunDirectory(path), read_status(path)
    known: Mapping[str, Any] = status.get("summary", {})
    config = _read_config(run.config)
    training = [record for record in records if record["kind"] == "train"]
    results = [record for record in records if record["kind"] != "train"]
    scored = [record for record in results if "score" in record]
    counted = [record for record in training if "tokens" in record]
    tokens = sum(record["tokens"] for record in counted)
    losses = [record["loss"] for record in training[-max(1, len(training) // LAST_SHARE) :]]
    best = max(scored, key=lambda record: float(record["score"]), default=None)
    memory = [record["memory_gib"] for record in training if "memory_gib" in record]
    seconds = sum(record["seconds"] for record in training)
    steps = training[-1]["step"] if training else 0
    return RunSummary(
        run=str(path),
        state=status["state"],
        error=status.get("error"),
        last_sign=_last_sign(run, status).isoformat(timespec="seconds"),
        model=known.get("model") or _name(config.get("model"), ("name", "preset", "family")),
        parameters=known.get("parameters") or _count_parameters(path),
        data=known.get("data") or _name(config.get("data"), ("task", "path")),
        steps=steps,
        tokens=tokens if counted else None,
        training_loss=sum(losses) / len(losses) if losses else None,
        final_loss=results[-1]["loss"] if results else None,
        perplexity=results[-1].get("perplexity") if results else None,
        best_loss=min((record["loss"] for record in results if isfinite(record["loss"])), default=None),
        measure=best["measure"] if best else None,
        best_score=best["score"] if best else None,
        tokens_per_second=tokens / sum(record["seconds"] for record in counted) if counted else None,
        tflops=_mean_rate(training, "tflops"),
        peak_share=_mean_rate(training, "peak_share"),
        memory_gib=max(memory, default=None),
        predicted_memory_gib=known.get("predicted_memory_gib"),
        seconds=seconds,
        seconds_left=_seconds_left(training, config.get("max_steps")) if status["state"] == "running" else None,
        anomalies=sum(count_reports(path).values()),
    )


def _mean_rate(training: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a rate over the time of the steps that tell it."""
    known = [record for record in training if name in record]
    amount = sum(float(record[name]) * float(record["seconds"]) for record in known)
    return amount / sum(float(record["seconds"]) for record in known) if known else None


def _seconds_left(training: Sequence[Mapping[str, Any]], max_steps: Any) -> float | None:
    if not isinstance(max_steps, int) or not training:
        return None
    recent = [float(record["seconds"]) for record in training[-RECENT_STEPS:]]
    return sum(recent) / len(recent) * (max_steps - int(training[-1]["step"]))


def as_json(summaries: Sequence[RunSummary]) -> str:
    """Return the summaries as a JSON list, with null for what is not known or no number."""
    return valid_json([asdict(summary) for summary in summaries], indent=2, ensure_ascii=False)


def table_of(summaries: Sequence[RunSummary]) -> Table:
    """Return the summaries as a table: a column for each run, and a row for all that is known of any of them."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("run", style="bold")
    for summary in summaries:
        table.add_column(summary.run, justify="right", overflow="fold")
    for name, texts in _rows(summaries):
        if any(texts):
            table.add_row(name, *(text or "–" for text in texts))
    return table


def _rows(summaries: Sequence[RunSummary]) -> list[tuple[str, list[str]]]:
    columns = [texts_of(summary) for summary in summaries]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def texts_of(summary: RunSummary) -> dict[str, str]:
    """Return a run's column of the table by the names of its rows; an empty text for what is not known."""

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    state = summary.state
    if state == "running":
        silence = (datetime.now(UTC) - datetime.fromisoformat(summary.last_sign)).total_seconds()
        state += f" (last sign {duration(silence)} ago)"
    predicted = summary.predicted_memory_gib
    return {
        "state": state,
        "error": summary.error or "",
        "model": summary.model or "",
        "parameters": "" if summary.parameters is None else count(summary.parameters),
        "data": summary.data or "",
        "steps": f"{summary.steps:,}",
        "tokens": text(summary.tokens, ","),
        "training loss": text(summary.training_loss, ".4f"),
        "final loss": text(summary.final_loss, ".4f"),
        "perplexity": text(summary.perplexity, ".4g"),
        "best loss": text(summary.best_loss, ".4f"),
        "best score": f"{summary.best_score:.1%} {summary.measure}" if summary.best_score is not None else "",
        "tokens/s": text(summary.tokens_per_second, ",.0f"),
        "operations": "" if summary.tflops is None else operations(summary.tflops),
        "share of peak": text(summary.peak_share, ".1%"),
        "memory, GiB": text(summary.memory_gib, ".2f"),
        "predicted, GiB": text(predicted, ".2f"),
        "time in steps": duration(summary.seconds),
        "time left": "" if summary.seconds_left is None else duration(summary.seconds_left),
        "anomalies": str(summary.anomalies or ""),
    }


def _last_sign(run: RunDirectory, status: Mapping[str, Any]) -> datetime:
    updated = datetime.fromisoformat(status["updated"])
    if not run.metrics.exists():
        return updated
    written = datetime.fromtimestamp(run.metrics.stat().st_mtime, UTC)
    return max(updated, written) if status["state"] == "running" else updated


def _read_config(file: Path) -> Mapping[str, Any]:
    """Return a run's configuration; empty if the run was left before it was written."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged: {problem}") from error
    return config if isinstance(config, dict) else {}


def _name(options: Any, fields: Sequence[str]) -> str | None:
    """Return the first of the fields that is set, without the folders of a path."""
    if not isinstance(options, dict):
        return None
    return next((Path(str(options[field])).name for field in fields if options.get(field)), None)


def _count_parameters(path: Path) -> int | None:
    """Return the number of weights in the run's newest checkpoint, read from its headers; None if there is none."""
    checkpoints = sorted((path / Entry.CHECKPOINTS).glob("*/model*.safetensors"), key=lambda file: file.stat().st_mtime)
    if not checkpoints:
        return None
    total = 0
    for file in checkpoints[-1].parent.glob("model*.safetensors"):
        try:
            with safe_open(file, framework="pt") as weights:
                total += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return None  # a run that goes on has just replaced it
    return total
