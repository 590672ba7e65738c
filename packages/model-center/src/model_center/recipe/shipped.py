"""What comes with the package: presets of the options, and sample text."""

from importlib.resources import files
from pathlib import Path

from .configuration import nearest

PRESETS = tuple(sorted(entry.name.removesuffix(".yaml") for entry in (files(__package__) / "presets").iterdir()))
SAMPLES = {"shakespeare": "shakespeare.jsonl.gz"}


def preset_path(name: str) -> Path:
    """Return the YAML file of a preset.

    Raises:
        ValueError: `name` is none of `PRESETS`.
    """
    return _shipped("preset", name, {preset: f"{preset}.yaml" for preset in PRESETS})


def sample_path(name: str) -> Path:
    """Return the file of a sample text.

    Raises:
        ValueError: `name` is none of `SAMPLES`.
    """
    return _shipped("sample", name, SAMPLES)


def _shipped(kind: str, name: str, known: dict[str, str]) -> Path:
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}, only {', '.join(known)}{nearest(name, known)}")
    return Path(str(files(__package__) / f"{kind}s" / known[name]))
