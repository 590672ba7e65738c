"""Configurations: keyword dataclasses that read and write JSON and know the published sizes of their family."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

import torch

from model_center.engine import HALF
from model_center.engine.checkpoint import atomic_write
from model_center.layer import BlockOptions
from model_center.model.source import read_config, read_json, resolve

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Published:
    """A published checkpoint of a family.

    Attributes:
        repository: its repository on the Hugging Face hub, or None where the hub has none.
        size: the options in which it differs from the family's defaults.
    """

    repository: str | None
    size: Mapping[str, Any]


def published_by(owner: str, sizes: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, Published]:
    """Checkpoints whose repositories on the hub are called `owner/identifier`; `common` is what all sizes share."""
    return {name: Published(f"{owner}/{name}", {**common, **size}) for name, size in sizes.items()}


@dataclass(kw_only=True)
class Config(BlockOptions):
    """Base of all configurations: the options that every model has, and how they are stored.

    A family inherits this class as a dataclass, adds its own fields, restates defaults that differ, and fills the
    class attributes below. Wrong values raise a ValueError when the configuration is made.
    """

    model_type: ClassVar[str]
    """Name of the family, as in `config.json`."""
    published: ClassVar[Mapping[str, Published]] = {}
    """The published checkpoints by identifier."""
    huggingface: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    """Our field -> the field of Transformers' configuration of the same `model_type`, and its default there."""
    huggingface_aliases: ClassVar[Mapping[str, str]] = {
        "hidden_size": "dim_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "max_position_embeddings": "position_size",
        "head_dim": "dim_head",
    }
    """Names by which Transformers takes fields of all families -> our option, or a field of `huggingface_carried`."""
    huggingface_activations: ClassVar[Mapping[str, str]] = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
    """Transformers' names of activations -> ours, where they differ."""
    huggingface_fixed: ClassVar[Mapping[str, Any]] = {}
    """Fields of Transformers' configuration that change what is computed, and the only value that is supported."""
    huggingface_repeated: ClassVar[Mapping[str, str]] = {}
    """Further fields of Transformers' configuration that export writes -> our option."""
    huggingface_written: ClassVar[Mapping[str, Any]] = {}
    """Fields that export writes with these values where nothing else was imported."""
    huggingface_carried: ClassVar[tuple[str, ...]] = (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
    )
    """Fields of Transformers' configuration that nothing here depends on: import keeps them for the next export."""
    huggingface_untied: ClassVar[Mapping[str, Any]] = {}
    """Our options for the output projection of their untied models, where those are not our defaults."""
    padding_ids: ClassVar[int] = 0
    """Ids at the end of our vocabulary that theirs lacks: they fill it up, and their logits are minus infinity."""
    not_exported: ClassVar[frozenset[str]] = frozenset(
        {
            "att_dropout_p",
            "att_mask_value",
            "cls_head",
            "dropout_p",
            "dtype",
            "ffn_dropout_p",
            "half",
            "huggingface_fields",
            "int8",
        }
    )
    """Options that do not change what Transformers' model computes, or that export treats by itself."""

    vocab_size: int
    """Number of token ids."""
    dim_model: int = 768
    """Width of the residual stream."""
    num_heads: int = 12
    """Attention heads of each layer."""
    dim_head: int = 64
    """Width of each attention head."""
    dim_ff: int = 3072
    """Width of the feed-forward layers."""
    emb_init_mean: float = 0.0
    """Mean of the normal distribution that embeddings start from."""
    emb_init_std: float = 1
    """Standard deviation of the normal distribution that embeddings start from."""
    proj_init_mean: float = 0.0
    """Mean of the normal distribution that the output projection starts from."""
    proj_init_std: float = 1
    """Standard deviation of the normal distribution that the output projection starts from."""
    proj_bias: bool = True
    """Whether the output projection has a bias."""
    position_bias_num_buckets: int = 32
    """Buckets of the learnt relative positions, with `pos_bias_type="relative"`."""
    position_bias_max_distance: int = 128
    """Distance from which all relative positions share a bucket."""
    pos_init_mean: float = 0.0
    """Mean of the normal distribution that relative positions start from."""
    pos_init_std: float = 1
    """Standard deviation of the normal distribution that relative positions start from."""
    half: bool = True
    """Use the engine's half type (fp16 on CUDA, fp32 on CPU) rather than fp32; `dtype` wins over it."""
    tied: bool = False
    """Use the input embedding as the output projection."""
    cls_head: int | None = None
    """Classes of a linear head that takes the place of the language-model head; None for the latter."""
    huggingface_fields: dict[str, Any] | None = None
    """The fields of `huggingface_carried` that the model's Transformers configuration had, if it came with one."""

    def __post_init__(self) -> None:
        if self.dtype is HALF and not self.half:
            self.dtype = torch.float32
        self.validate()

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of each stack."""
        raise NotImplementedError

    def validate(self) -> None:
        """Checks the type of every field and the values that can be judged without building the model.

        Raises:
            ValueError: the first problem found, naming the field, the rule and the value.
        """
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _has_type(value, hints[field.name]):
                wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in _kinds(hints[field.name]))
                raise ValueError(f"`{field.name}` must be of type {wanted}, but is {value!r}")
            _check_value(field.name, value)
        if strange := [name for name in self.huggingface_fields or {} if name not in self.huggingface_carried]:
            raise ValueError(
                f"`huggingface_fields` must be of {', '.join(self.huggingface_carried)}, but holds {', '.join(strange)}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "the given options") -> Self:
        """Makes a configuration from a mapping as it stands in a JSON file.

        Args:
            values: field name -> value; numbers may be strings ("-inf", "-1e4"), `dtype` is a name ("bfloat16").
            origin: where the values come from, for error messages.

        Raises:
            ValueError: an unknown key, with the nearest valid one, or a value of the wrong type or range.
        """
        hints = get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                nearest = get_close_matches(key, sorted(known), n=1, cutoff=0.0)
                raise ValueError(f"{origin}: {cls.__name__} has no option `{key}`; the nearest one is `{nearest[0]}`")
        try:
            return cls(**{key: _from_json(value, hints[key]) for key, value in values.items()})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{origin}: {error}") from error

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Reads a configuration that `to_json_file` or an earlier ModelCenter wrote.

        Raises:
            ValueError: the file is of another model type or a newer format, or holds a wrong option.
        """
        return cls._from_our_json(read_json(Path(path)), Path(path))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as it stands in a JSON file, with the model type and the format's version."""
        values = {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"model_type": self.model_type, "format_version": FORMAT_VERSION, **values}

    def to_json_file(self, path: str | Path) -> None:
        """Writes the configuration; the file is replaced as a whole or not at all."""
        with atomic_write(path) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def preset(cls, name: str) -> Self:
        """The configuration of a published checkpoint, made without any file.

        Raises:
            ValueError: no published checkpoint of this family has that name.
        """
        if name not in cls.published:
            nearest = get_close_matches(name, cls.published, n=1, cutoff=0.0)
            raise ValueError(
                f"{cls.__name__} has no preset {name!r}; did you mean {nearest[0]!r}? Known: {', '.join(cls.published)}"
            )
        return cls(**cls.published[name].size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **changes: Any,
    ) -> Self:
        """Reads the configuration of a checkpoint.

        Args:
            name_or_dir: a directory (ours, Hugging Face's layout, or a legacy ModelCenter one), an identifier of
                `published`, or the `owner/name` of a repository on the Hugging Face hub.
            revision: branch, tag or commit on the hub.
            local_files_only: whether to use only what the hub's cache holds.
            changes: options that take the place of the checkpoint's.
        """
        source = resolve(name_or_dir, cls.repositories(), revision=revision, local_files_only=local_files_only)
        raw, path = read_config(source)
        return dataclasses.replace(cls.from_raw(raw, path), **changes)

    @classmethod
    def repositories(cls) -> dict[str, str | None]:
        """Identifier -> repository on the hub, for every published checkpoint."""
        return {name: published.repository for name, published in cls.published.items()}

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any], path: Path) -> Self:
        """Makes a configuration from the content of any `config.json`: ours, Transformers', or a legacy one."""
        if not is_huggingface(raw):
            return cls._from_our_json(raw, path)
        if not cls.huggingface:
            raise ValueError(f"{path} is a Transformers configuration, and {cls.__name__} has no counterpart there")
        cls._check_model_type(raw, path)
        for key, value in cls.huggingface_fixed.items():
            if raw.get(key, value) != value:
                raise ValueError(f"{path}: `{key}` must be {value!r} for {cls.__name__}, but is {raw[key]!r}")
        try:
            options = cls.from_huggingface(raw)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if any(name.endswith("ForTokenClassification") for name in raw.get("architectures") or ()):
            options |= {"cls_head": raw.get("num_labels") or len(raw.get("id2label") or "01"), "proj_bias": True}
        return cls.from_dict(options, str(path))

    @classmethod
    def from_huggingface(cls, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Our options for the fields of a Transformers configuration; a family adds what the table cannot say."""
        theirs = cls._without_aliases(theirs)
        options = {ours: theirs.get(name, default) for ours, (name, default) in cls.huggingface.items()}
        width, heads = options["dim_model"], options["num_heads"]
        if options.get("dim_ff") is None:
            options["dim_ff"] = 4 * width
        if "dim_head" not in options:
            if width % heads:
                raise ValueError(f"the width must be a multiple of the number of heads ({heads}), but is {width}")
            options["dim_head"] = width // heads
        options["vocab_size"] += cls.padding_ids
        activation = cls.huggingface_activations.get(options["ffn_activate_fn"], options["ffn_activate_fn"])
        projection = {} if options["tied"] else cls.huggingface_untied
        written = cls.huggingface_written.items()
        held = [(name, theirs[name]) for name in cls.huggingface_carried if name in theirs]
        carried = dict(field for field in held if field not in written)
        return {**options, **projection, "ffn_activate_fn": activation, "huggingface_fields": carried or None}

    @classmethod
    def _without_aliases(cls, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Fields under the names of the family."""
        names = {ours: name for ours, (name, _) in cls.huggingface.items()}
        names |= {name: name for name in cls.huggingface_carried}
        aliases = {alias: names[ours] for alias, ours in cls.huggingface_aliases.items() if ours in names}
        fields = {name: value for name, value in theirs.items() if aliases.get(name, name) == name}
        for alias in theirs.keys() & aliases.keys():
            if fields.setdefault(name := aliases[alias], theirs[alias]) != theirs[alias]:
                raise ValueError(
                    f"`{alias}` must be that of `{name}`, {fields[name]!r}, which it is another name of, but is "
                    f"{theirs[alias]!r}; leave one of them out"
                )
        return fields

    def to_huggingface(self) -> dict[str, Any]:
        """The Transformers configuration for our options; a family adds what the table cannot say."""
        activations = {ours: theirs for theirs, ours in self.huggingface_activations.items()}
        ours = {
            **vars(self),
            "vocab_size": self.vocab_size - self.padding_ids,
            "ffn_activate_fn": activations.get(self.ffn_activate_fn, self.ffn_activate_fn),
            "att_dropout_p": self.dropout_p if self.att_dropout_p is None else self.att_dropout_p,
        }
        return {
            "model_type": self.model_type,
            **self.huggingface_written,
            **(self.huggingface_fields or {}),
            **{name: ours[key] for key, (name, _) in self.huggingface.items()},
            **{name: ours[key] for name, key in self.huggingface_repeated.items()},
        }

    def checked_huggingface(self) -> dict[str, Any]:
        """The Transformers configuration for our options.

        Raises:
            ValueError: it cannot express an option that changes what the model computes.
        """
        theirs = self.to_huggingface()
        expressed = type(self).from_dict(type(self).from_huggingface(theirs))
        lost = [f"{name}={value!r}" for name, (value, _) in self.differences(expressed).items()]
        if lost:
            raise ValueError(f"Transformers' {self.model_type!r} models cannot express {', '.join(lost)}")
        if self.cls_head is not None:
            theirs["num_labels"] = self.cls_head
        return theirs

    def differences(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """The options that change what a model computes and have another value in `other`: name -> both values."""
        return {
            field.name: (getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
            if field.name not in self.not_exported
            and not (field.name == "proj_bias" and (self.tied or self.cls_head is not None))
            and "_init_" not in field.name
            and getattr(other, field.name) != getattr(self, field.name)
        }

    @classmethod
    def _from_our_json(cls, raw: Mapping[str, Any], path: Path) -> Self:
        cls._check_model_type(raw, path)
        version = raw.get("format_version", FORMAT_VERSION)
        if version not in range(1, FORMAT_VERSION + 1):
            raise ValueError(f"{path}: `format_version` must be at most {FORMAT_VERSION}, but is {version!r}")
        values = {key: value for key, value in raw.items() if key not in ("model_type", "format_version")}
        return cls.from_dict(values, str(path))

    @classmethod
    def _check_model_type(cls, raw: Mapping[str, Any], path: Path) -> None:
        model_type = raw.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"{path}: `model_type` must be {cls.model_type!r} for {cls.__name__}, but is {model_type!r}; "
                f"model_center.model.load_model picks the class by itself"
            )


def is_huggingface(raw: Mapping[str, Any]) -> bool:
    """Whether the content of a `config.json` is Transformers': it names its model type, but not our format."""
    return "format_version" not in raw and ("model_type" in raw or "architectures" in raw)


def _kinds(hint: Any) -> tuple[Any, ...]:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(get_origin(kind) or kind for kind in kinds)


def _has_type(value: Any, hint: Any) -> bool:
    kinds = _kinds(hint)
    if isinstance(value, bool):
        return bool in kinds
    if value is HALF:
        return torch.dtype in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, float | int) and not isinstance(value, bool):
        if name.endswith("dropout_p") and not 0 <= value < 1:
            raise ValueError(f"`{name}` must be at least 0 and less than 1, but is {value}")
        if name.endswith(("_std", "_eps")) and not value >= 0:
            raise ValueError(f"`{name}` must not be negative, but is {value}")
        if isinstance(value, int) and value < 1 and name.startswith(_SIZES):
            raise ValueError(f"`{name}` must be a positive integer, but is {value}")


_SIZES = ("vocab_size", "type_size", "position_size", "dim_", "num_", "pos_rotary_dim", "position_bias", "cls_head")


def _from_json(value: Any, hint: Any) -> Any:
    kinds = _kinds(hint)
    if isinstance(value, str) and float in kinds:
        return float(value)
    if isinstance(value, str) and torch.dtype in kinds:
        dtype = HALF if value == "half" else getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype) and dtype is not HALF:
            raise ValueError(f"`dtype` must be 'half' or the name of a torch dtype, but is {value!r}")
        return dtype
    return value


def _to_json(value: Any) -> Any:
    if value is HALF:
        return "half"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value
