"""The registry of model families."""

from importlib import import_module
from pathlib import Path
from typing import Any

from model_center.model.base import BaseModel
from model_center.model.source import Source, read_config, resolve

_MODELS = (
    "bert.Bert",
    "gpt2.GPT2",
    "gptj.GPTj",
    "t5.T5",
    "cpm1.CPM1",
    "cpm2.CPM2",
)


def _imported(name: str) -> type[BaseModel]:
    module, _, model = name.partition(".")
    found: type[BaseModel] = getattr(import_module(f"model_center.model.{module}"), model)
    return found


families: dict[str, type[BaseModel]] = {model.config_class.model_type: model for model in map(_imported, _MODELS)}
"""Model type -> model class, for every family."""


def load_model(name_or_dir: str | Path, **options: Any) -> BaseModel:
    """Loads a checkpoint with the class of the family that it names.

    Args:
        name_or_dir: as in `BaseModel.from_pretrained`; legacy directories do not name their family.
        options: passed on to `BaseModel.from_pretrained`.

    Raises:
        ValueError: the checkpoint names no family, or one that is not known.
    """
    remote = {name: options[name] for name in ("revision", "local_files_only") if name in options}
    return find_family(name_or_dir, **remote).from_pretrained(name_or_dir, **options)


def find_family(
    name_or_dir: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> type[BaseModel]:
    """Says which family a checkpoint names.

    Args:
        name_or_dir: as in `load_model`.
        revision: as in `BaseModel.from_pretrained`.
        local_files_only: likewise.

    Raises:
        ValueError: the checkpoint names no family, or one that is not known.
    """
    raw, path = read_config(find_source(name_or_dir, revision=revision, local_files_only=local_files_only))
    model_type = raw.get("model_type")
    if model_type not in families:
        found = f"is {model_type!r}" if model_type else "is missing, as in legacy directories; use that family's class"
        raise ValueError(f"{path}: `model_type` must be one of {', '.join(families)}, but {found}")
    return families[model_type]


def find_source(name_or_dir: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Source:
    """Finds the files of a checkpoint of any family.

    Args:
        name_or_dir: as in `load_model`.
        revision: as in `BaseModel.from_pretrained`.
        local_files_only: likewise.

    Raises:
        FileNotFoundError: there is no such directory or identifier.
    """
    repositories = {
        name: repo for model in families.values() for name, repo in model.config_class.repositories().items()
    }
    return resolve(name_or_dir, repositories, revision=revision, local_files_only=local_files_only)
