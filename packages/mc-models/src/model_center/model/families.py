"""The registry of model families."""

from pathlib import Path
from typing import Any

from model_center.model.base import BaseModel
from model_center.model.bert import Bert
from model_center.model.cpm1 import CPM1
from model_center.model.cpm2 import CPM2
from model_center.model.gpt2 import GPT2
from model_center.model.gptj import GPTj
from model_center.model.source import read_config, resolve
from model_center.model.t5 import T5

_MODELS: list[type[BaseModel]] = [
    Bert,
    GPT2,
    GPTj,
    T5,
    CPM1,
    CPM2,
]
families: dict[str, type[BaseModel]] = {model.config_class.model_type: model for model in _MODELS}
"""Model type -> model class, for every family."""


def load_model(name_or_dir: str | Path, **options: Any) -> BaseModel:
    """Loads a checkpoint with the class of the family that it names.

    Args:
        name_or_dir: as in `BaseModel.from_pretrained`; legacy directories do not name their family.
        options: passed on to `BaseModel.from_pretrained`.

    Raises:
        ValueError: the checkpoint names no family, or one that is not known.
    """
    repositories = {
        name: repo for model in families.values() for name, repo in model.config_class.repositories().items()
    }
    remote = {name: options[name] for name in ("revision", "local_files_only") if name in options}
    raw, path = read_config(resolve(name_or_dir, repositories, **remote))
    model_type = raw.get("model_type")
    if model_type not in families:
        found = f"is {model_type!r}" if model_type else "is missing, as in legacy directories; use that family's class"
        raise ValueError(f"{path}: `model_type` must be one of {', '.join(families)}, but {found}")
    return families[model_type].from_pretrained(name_or_dir, **options)
