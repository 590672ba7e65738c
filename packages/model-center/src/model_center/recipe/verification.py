"""`model-center verify`: whether a checkpoint is what a Transformers directory is, and where it is not."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model_center.model.config import is_huggingface
from model_center.model.source import LocalDirectory, read_config
from model_center.model.t5_scaling import T5ScalingConfig

from .checkpoint_configuration import Tolerances, VerifyConfig
from .commands import OK, preparing, print_lines
from .configuration import require
from .run_directory import PACKAGES, write_text
from .stored_models import StoredModel, open_stored
from .valid_json import valid_json
from .verification_checks import (
    Check,
    Measure,
    check_configuration,
    check_gradients,
    check_loading,
    check_logits,
    check_names,
    check_states,
    check_weights,
)
from .verification_runs import run_ours, run_transformers
from .verification_sample import Sample, SampleOptions, make_sample

FORMAT, FORMAT_VERSION = "model_center.parity", 1
FAILED = 1
"""Exit code of a comparison that found a difference."""
TOLERANCES = Tolerances(weights=1e-6, states=1e-5, logits=1e-5, gradients=1e-4)
"""What passes unless something else is asked for."""
TOLERANCES_IN_FLOAT64 = Tolerances(weights=1e-6, states=1e-10, logits=1e-10, gradients=1e-10)
"""The same in float64, for families of which Transformers computes all in it; T5's norms and GPT-J's rotations it
computes in float32."""
WHOLLY_IN_FLOAT64 = ("bert", "gpt2")


@dataclass(frozen=True)
class Certificate:
    """The result of a comparison, and all that it depends on.

    Attributes:
        checkpoint: Path, layout and the files with length and SHA-256.
        against: Likewise of the Transformers directory.
        sample: What the input was, None where none was needed.
        dtype: What both sides computed in.
        checks: The comparisons, in order; where names do not match, there are no others.
        versions: Version of each package.
        time: When it was made.
    """

    checkpoint: Mapping[str, Any]
    against: Mapping[str, Any]
    sample: str | None
    dtype: str
    checks: tuple[Check, ...]
    versions: Mapping[str, str]
    time: str

    @property
    def passed(self) -> bool:
        """Whether all checks have."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """Return it as JSON; differences that are no number are null."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "passed": self.passed, **asdict(self)}
        for check, written in zip(self.checks, content["checks"], strict=True):
            written["passed"] = check.passed
        return valid_json(content, indent=2, ensure_ascii=False)


def run(config: VerifyConfig, console: Console, *, json: bool) -> int:
    """Compare, print the result and write the certificate.

    Returns:
        The exit code: 0 if everything agrees, 1 if not.
    """
    with preparing(console, "Comparing"):
        certificate = verify(config)
        if config.certificate is not None:
            write_text(Path(config.certificate), certificate.to_json() + "\n")
    if json:
        console.out(certificate.to_json(), highlight=False)
    else:
        show(certificate, console)
        print_lines(console, {"certificate": config.certificate} if config.certificate else {})
    return OK if certificate.passed else FAILED


def verify(config: VerifyConfig) -> Certificate:
    """Compare a checkpoint with a Transformers directory.

    Raises:
        FileNotFoundError: One of them has no configuration or no weights.
        ValueError: One is damaged or no directory, they are of different families or of one that Transformers does not
            have, or the sample text does not suit the model.
    """
    ours, theirs = open_both(config)
    checks, description = [check_names(ours, theirs)], None
    if checks[0].passed:
        sample = _sample(config, ours, theirs)
        description = sample.description
        measures = _measures(config, ours.model.config.model_type)
        checks += [check_configuration(ours, theirs), check_weights(ours, theirs, measures["weights"])]
        dtype = getattr(torch, config.dtype)
        # One after the other, so that only one side's model is in memory.
        expected, missing = run_transformers(Path(config.against), ours.model, sample, dtype, theirs.weights.absent)
        found = run_ours(Path(config.checkpoint), ours.model, sample, dtype, ours.weights.absent)
        checks += [
            check_loading(theirs, missing),
            check_states(found, expected, measures["states"]),
            check_logits(found, expected, sample, measures["logits"]),
            check_gradients(found, expected, theirs, measures["gradients"]),
        ]
    return Certificate(
        checkpoint=_described(ours),
        against=_described(theirs),
        sample=description,
        dtype=config.dtype,
        checks=tuple(checks),
        versions={package: version(package) for package in PACKAGES},
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def open_both(config: VerifyConfig) -> tuple[StoredModel, StoredModel]:
    """Look at the checkpoint and at the Transformers directory.

    Raises:
        FileNotFoundError, ValueError: As `verify`.
    """
    for option in ("checkpoint", "against"):
        path = getattr(config, option)
        require(Path(path).is_dir(), option, "a directory", path)
    own, raw = (read_config(LocalDirectory(Path(path)))[0] for path in (config.checkpoint, config.against))
    if not is_huggingface(raw):
        raise ValueError(f"against must be a directory of Transformers, but {config.against} is not one")
    family = own.get("model_type", raw.get("model_type"))  # directories of ModelCenter 0.1 to 1.0 do not name theirs
    changes: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    ours = open_stored(config.checkpoint, family, changes)
    ours.model.counterpart()  # there may be none, which matters more than what the other directory is
    if raw.get("model_type") != family:
        raise ValueError(
            f"both must be of the same family, but {config.checkpoint} is a {family!r} and {config.against} a "
            f"{raw.get('model_type')!r}"
        )
    if isinstance(ours.model.config, T5ScalingConfig):
        changes["residual_scale"] = ours.model.config.residual_scale or 1.0  # so that weights are of the same scale
    return ours, open_stored(config.against, changes=changes)


def show(certificate: Certificate, console: Console) -> None:
    """Print the result: a line for each check, then what failed, by name."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("check", style="bold")
    table.add_column("result")
    for name in ("compared", "worst", "allowed"):
        table.add_column(name, justify="right")
    table.add_column("where", overflow="fold")
    for check in certificate.checks:
        result = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        worst = (f"{check.worst[0].value:.1e}", check.worst[0].name) if check.worst else ("", "")
        allowed = "" if check.tolerance is None else f"{check.tolerance:.0e}"
        table.add_row(check.name, result, f"{check.compared:,}", worst[0], allowed, worst[1])
    console.print(table)
    for check in certificate.checks:
        if not check.passed:
            console.print(f"\n{check.name}:", style="bold", highlight=False)
            _show_all(check, console)
        for note in check.notes:
            console.print(f"{check.name}: {note}", highlight=False, soft_wrap=True)
    lines = {"result": "passed" if certificate.passed else "FAILED", "checkpoint": certificate.checkpoint["path"]}
    lines |= {"against": certificate.against["path"], "computed in": f"{certificate.dtype}, CPU"}
    print_lines(console, lines | {"sample": certificate.sample or "none, since the names do not match"})


def _show_all(check: Check, console: Console) -> None:
    for problem in check.problems:
        console.print(f"  {problem}", highlight=False, soft_wrap=True)
    if check.worst:
        table = Table(show_edge=False, pad_edge=False)
        for column in ("here", "there"):
            table.add_column(column, overflow="fold")
        table.add_column("difference", justify="right")
        for each in check.worst:
            table.add_row(each.name, each.counterpart, f"{each.value:.1e}")
        console.print(table)


def _measures(config: VerifyConfig, family: str) -> dict[str, Measure]:
    """The tolerances that were asked for, and for the rest the usual ones."""
    usual = TOLERANCES_IN_FLOAT64 if config.dtype == "float64" and family in WHOLLY_IN_FLOAT64 else TOLERANCES
    asked = {name: limit for name, limit in vars(config.tolerances).items() if limit is not None}
    return {name: Measure(limit, config.worst) for name, limit in (vars(usual) | asked).items()}


def _sample(config: VerifyConfig, ours: StoredModel, theirs: StoredModel) -> Sample:
    limits = (theirs.options.get(name) for name in ("n_positions", "max_position_embeddings"))
    options = SampleOptions(
        folders=[Path(config.checkpoint), Path(config.against)],
        text=config.text,
        rows=config.rows,
        length=min([config.length, *filter(None, limits)]),
        seed=config.seed,
        padding_id=theirs.options.get("pad_token_id") or 0,
    )
    return make_sample(ours.model.config, options)


def _described(stored: StoredModel) -> dict[str, Any]:
    """What a certificate says of one side."""
    files = {}
    for path in (stored.config_path, *stored.checkpoint.paths):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return {"path": str(stored.config_path.parent.resolve()), "layout": stored.layout, "files": files}
