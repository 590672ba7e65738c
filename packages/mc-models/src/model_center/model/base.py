"""What all models share: building from a configuration, loading, saving, exporting."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from model_center.engine import current_engine, rank, synchronize, uninitialized
from model_center.layer import Module, select
from model_center.model.checkpoint import MAX_FILE_BYTES, Checkpoint, write_checkpoint
from model_center.model.config import Config, is_huggingface
from model_center.model.output_projection import OutputProjection, labelled
from model_center.model.rules import Rule, Table, expand
from model_center.model.source import CONFIG_NAME, read_config, read_json, resolve
from model_center.model.transfer import Exported, WeightImport

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is about to be loaded.

    Attributes:
        weights: its tensors.
        options: the content of its `config.json`, empty if it has none.
    """

    weights: Checkpoint
    options: Mapping[str, Any]

    @property
    def is_foreign(self) -> bool:
        """Whether it is a Transformers checkpoint, rather than one with our own names."""
        return is_huggingface(self.options)


_POOLED_CLASSIFIERS = ("ForSequenceClassification", "ForMultipleChoice")
"""Endings of Transformers' classes whose classifier scores one state of a sequence; ours scores every position."""


def _check_classifier(config: Config, stored: Stored) -> None:
    for name in stored.options.get("architectures") or ():
        if name.endswith(_POOLED_CLASSIFIERS):
            raise ValueError(
                f"`cls_head` must be None for {name} in {stored.weights.description}, whose classifier does not score "
                f"every position as `cls_head` does, but is {config.cls_head}; load it without, and give a new head to "
                f"what `save_pretrained` then writes"
            )


def build(layer: type[ModuleT], config: Config, prefix: str = "", **given: Any) -> ModuleT:
    """Makes a layer from a configuration's options; `prefix` and `given` as in `model_center.layer.select`."""
    return layer(**select(layer, config, prefix=prefix, **given))


class BaseModel(Module):
    """Base of all models.

    A family derives from one of the skeletons, names its configuration class, and gives its weight rules.
    """

    config_class: ClassVar[type[Config]]
    """The family's configuration."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold heads: the only parts that a checkpoint may lack, or hold without need."""
    tied_output: ClassVar[str]
    """The weight that an untied model has and a tied one takes from its input embedding."""

    def __init__(self, config: Config) -> None:
        self._check_class(config)
        config.validate()
        self.config = config

    def output_projection_of(self, hidden_states: Tensor) -> OutputProjection:
        """What the head makes of hidden states (…, dim_model), before its scores are computed."""
        raise NotImplementedError

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Scores of the head for the outputs' `last_hidden_state`: (…, dim_model) to (…, vocab_size or cls_head)."""
        return self.output_projection_of(hidden_states).scores()

    def summed_loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of the head's scores, summed over the positions that have a label.

        Scores are computed at these positions only, and never all at once, forward and backward.

        Args:
            hidden_states: (…, dim_model), the outputs' `last_hidden_state`.
            labels: (…) class indices, -100 where there is nothing to predict. On the CPU they spare the host the wait
                for the number of labels.

        Returns:
            A scalar, float32 (float64 in a float64 model); 0 without any label. Divide it by what you want a mean over.

        Raises:
            ValueError: the shapes do not fit, or (on the CPU) a label is no class.
        """
        rows, labels = labelled(hidden_states, labels)
        return self.output_projection_of(rows).summed_loss(labels)

    @classmethod
    def _check_class(cls, config: Config) -> None:
        if not isinstance(config, cls.config_class):
            raise ValueError(f"`config` must be a {cls.config_class.__name__}, but is a {type(config).__name__}")

    @classmethod
    def table(cls, config: Any) -> Table | None:  # noqa: ARG003 - families need it
        """The rules for Transformers checkpoints; None for a family that Transformers does not have."""
        return None

    @classmethod
    def own_rules(cls, names: list[str], config: Any, stored: Stored) -> list[Rule]:  # noqa: ARG003 - likewise
        """The rules for a stored checkpoint with our own names: those of a model with `config` are `names`."""
        return [Rule(name, name) for name in names]

    @classmethod
    def fit(cls, config: Any, stored: Stored) -> Any:
        """Lets the configuration follow what only the weights can tell.

        Transformers 5 calls every T5 tied, also one whose output projection differs from its embedding; here it is not.

        Raises:
            ValueError: the checkpoint is of a model that the configuration cannot follow.
        """
        table = cls.table(config)
        if stored.is_foreign and config.cls_head is not None:
            _check_classifier(config, stored)
        if table is None or not stored.is_foreign or not config.tied:
            return config
        held = {table.canonical(name): name for name in stored.weights.names()}
        for row in expand(table.rules, config.depths):
            if row.ours == (cls.tied_output,) and row.theirs[0] in held and row.fallback in held:
                output, embedding = (stored.weights.read(held[name]) for name in (row.theirs[0], row.fallback))
                if not torch.equal(output, embedding):
                    return replace(config, tied=False)
        return config

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        config: Config | None = None,
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a checkpoint, on the current engine's device, in evaluation mode.

        What the checkpoint holds is never filled with random values first. A head that it lacks has the values of a
        fresh model's, made with the same seed, which takes drawing all of that model's random numbers.

        Args:
            name_or_dir: a directory (of `save_pretrained`, in Hugging Face's layout, or a legacy ModelCenter one with
                `pytorch_model.pt`), a documented identifier such as "bert-base-uncased", or the `owner/name` of a
                repository on the Hugging Face hub.
            config: takes the place of the checkpoint's own configuration, e.g. to add a classification head.
            dtype: type of the parameters; takes the place of the configuration's.
            revision: branch, tag or commit on the hub.
            local_files_only: whether to use only what the hub's cache holds.

        Raises:
            FileNotFoundError: there is no such directory or identifier, or it holds no weights.
            ValueError: the configuration or the weights do not fit; one message lists everything.
        """
        source = resolve(
            name_or_dir, cls.config_class.repositories(), revision=revision, local_files_only=local_files_only
        )
        options: Mapping[str, Any]
        if config is None:
            options, path = read_config(source)
            config = cls.config_class.from_raw(options, path)
        else:
            cls._check_class(config)
            path_of_config = source.file(CONFIG_NAME)
            options = {} if path_of_config is None else read_json(path_of_config)
        if dtype is not None:
            config = replace(config, dtype=dtype)
        stored = Stored(Checkpoint(source), options)
        config = cls.fit(config, stored)
        with uninitialized():
            model = cls(config)
        weights = model.import_of(stored).check()
        if weights.absent:
            # A head's fresh values depend on all random numbers that are drawn before them.
            del model
            model = cls(config)
        weights.copy_into(model)
        model.eval()
        return model

    def import_of(self, stored: Stored) -> WeightImport:
        """What loads a checkpoint into models like this one."""
        table = self.table(self.config) if stored.is_foreign else None
        wanted = current_engine().state_shapes(self)
        rules = self.own_rules(list(wanted), self.config, stored) if table is None else table.rules
        rows = expand(rules, self.config.depths)
        if stored.options.get("tie_word_embeddings") is False:  # then a missing projection is missing
            rows = [replace(row, fallback=None) if row.ours == (self.tied_output,) else row for row in rows]
        return WeightImport(type(self).__name__, wanted, stored.weights, rows, table, self.heads)

    def save_pretrained(self, directory: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Writes `config.json` and the weights as safetensors, for `from_pretrained`.

        With several processes all must call it; the first one writes.

        Args:
            directory: a new directory, which appears complete or not at all, or an existing one, whose other files
                stay as they are.
            max_file_bytes: larger models are spread over several files.
        """
        state = current_engine().state_dict(self)
        if rank() == 0:
            write_checkpoint(directory, self.config.to_dict(), state, max_file_bytes)
        synchronize()

    def export_huggingface(self, directory: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Writes a directory that `transformers.AutoModel*.from_pretrained` loads, with the same logits.

        Args:
            directory: as in `save_pretrained`.
            max_file_bytes: as in `save_pretrained`.

        Raises:
            ValueError: Transformers has no such model, or cannot express an option or a weight of this one.
        """
        self._exported_config()  # an error is the same on all processes, and comes before anything is gathered
        state = current_engine().state_dict(self)
        if rank() == 0:
            write_checkpoint(directory, *self.exported(state), max_file_bytes)
        synchronize()

    def exported(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Exported]:
        """Configuration and tensors for Transformers.

        Args:
            state: our tensors by name; a head may be absent.

        Raises:
            ValueError: as `export_huggingface`; what concerns the weights themselves when they are asked for.
        """
        table, config = self._exported_config()
        if not self.has_scores(head for head in self.heads if not any(name.startswith(f"{head}.") for name in state)):
            del config["architectures"]
        config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
        return config, Exported(state, expand(table.rules, self.config.depths), table.exported)

    def _exported_config(self) -> tuple[Table, dict[str, Any]]:
        table, architecture = self.counterpart()
        return table, {**self.config.checked_huggingface(), "architectures": [architecture]}

    def counterpart(self) -> tuple[Table, str]:
        """The weight rules, and the class of Transformers that has the head of this model.

        Raises:
            ValueError: there is none.
        """
        table = self.table(self.config)
        if table is None:
            raise ValueError(f"Transformers has no counterpart of {type(self).__name__}")
        architecture = table.architecture if self.config.cls_head is None else table.classifier
        if architecture is None:
            raise ValueError(f"Transformers has no {type(self).__name__} with a classification head (`cls_head`)")
        return table, architecture

    def has_scores(self, absent: Iterable[str]) -> bool:
        """Whether it has the weights that logits need, without the heads (of those that it has) that are absent."""
        scoring = "cls_projection" if self.config.cls_head is not None else self.tied_output.partition(".")[0]
        return not (hasattr(self, scoring) and scoring in absent)
