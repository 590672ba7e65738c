"""What comes with the package: presets of the options, and sample text."""

from importlib.resources import files
from pathlib import Path

from .configuration import nearest

SAMPLES = {"shakespeare": "shakespeare.jsonl.gz"}


def preset_names(recipe: str) -> tuple[str, ...]:
    """Return the names of a recipe's presets.

    Args:
        recipe: "pretrain" or "finetune".
    """
    folder = files(__package__) / "presets" / recipe
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir()))


def preset_path(recipe: str, name: str) -> Path:
    """Return the YAML file of a preset.

    Raises:
        ValueError: `name` is none of `preset_names(recipe)`.
    """
    return _shipped("preset", name, {preset: f"presets/{recipe}/{preset}.yaml" for preset in preset_names(recipe)})


def sample_path(name: str) -> Path:
    """Return the file of a sample text.

    Raises:
        ValueError: `name` is none of `SAMPLES`.
    """
    return _shipped("sample", name, {sample: f"samples/{file}" for sample, file in SAMPLES.items()})


def _shipped(kind: str, name: str, known: dict[str, str]) -> Path:
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}, only {', '.join(known)}{nearest(name, known)}")
    return Path(str(files(__package__) / known[name]))
