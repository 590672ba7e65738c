"""What comes with the package: presets of the options, and sample text."""

from importlib.resources import files
from pathlib import Path

from .configuration import nearest

PRESETS = tuple(sorted(entry.name.removesuffix(".yaml") for entry in (files(__package__) / "presets").iterdir()))
SAMPLES = {"shakespeare": "shakespeare.jsonl.gz"}


def preset_path(name: str) -> Path:
    """Return the YAML file of a preset.

    Args:
        name: One of `PRESETS`.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}, only {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return Path(str(files(__package__) / "presets" / f"{name}.yaml"))


def sample_path(name: str) -> Path:
    """Return the file of a sample text.

    Args:
        name: One of `SAMPLES`.

    Raises:
        ValueError: There is no such sample.
    """
    if name not in SAMPLES:
        raise ValueError(f"there is no sample {name!r}, only {', '.join(SAMPLES)}{nearest(name, SAMPLES)}")
    return Path(str(files(__package__) / "samples" / SAMPLES[name]))
