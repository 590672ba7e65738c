"""Metrics sent to Weights & Biases, whose package wandb is the extra `wandb`."""

import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from .metrics import Metrics, numbers_of
from .run_directory import Entry, write_text


class WeightsAndBiases:
    """Logs every number of a step, validation or evaluation as `<kind>/<name>` over the step.

    Args:
        run: the run directory. It keeps the identifier by which a resumed run goes on in the same curves.
        project: project at Weights & Biases.
        name: the run's name there.
        mode: online sends records as they come, offline keeps them in the run directory until `wandb sync`.
        config: the resolved configuration, which is shown beside the curves.

    Raises:
        ImportError: the package wandb is not installed.
    """

    def __init__(
        self, run: Path, *, project: str, name: str, mode: Literal["online", "offline"], config: Mapping[str, Any]
    ) -> None:
        wandb = import_wandb()
        self.run = wandb.init(
            project=project,
            name=name,
            mode=mode,
            config=dict(config),
            dir=str(run),
            id=_identifier(run),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps of our own, since those of wandb must not go back as a rewound run does.
        self.run.define_metric("*", step_metric="step")

    def record(self, metrics: Metrics) -> None:
        """Log the numbers."""
        named = {f"{metrics.kind}/{name}": value for name, value in numbers_of(metrics).items()}
        self.run.log({"step": metrics.step, **named})

    def close(self) -> None:
        """End the run once all is sent; in offline mode, wandb's own process writes the last records moments later."""
        self.run.finish()


def import_wandb() -> Any:
    """Return the package wandb.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("wandb")
    except ModuleNotFoundError as error:
        raise ImportError(
            "recording to Weights & Biases (wandb.mode) needs the package wandb, which is not installed: "
            'install model-center with its extra "wandb"'
        ) from error


def check_login() -> None:
    """Ask the server of Weights & Biases whether it takes records from here.

    Raises:
        ValueError: nobody is logged in, or the server does not answer.
    """
    wandb = import_wandb()
    reason = "nobody is logged in"
    try:
        if wandb.login(verify=True):
            return
    except wandb.Error as error:
        reason = str(error)
    raise ValueError(
        f"wandb.mode is online, but Weights & Biases takes no records from here: {reason.rstrip('.')}. Log in with "
        "`wandb login`, or give --wandb.mode offline and send the records later with `wandb sync`"
    )


def _identifier(run: Path) -> str:
    """Return the run's identifier, made when it is asked for first."""
    file = run / Entry.WANDB / "identifier"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_text(file, secrets.token_hex(8))
    return file.read_text()
