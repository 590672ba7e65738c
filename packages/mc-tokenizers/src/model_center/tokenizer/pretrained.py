"""BERT's, GPT-2's, GPT-J's and T5's tokenizers: thin names over Transformers' fast tokenizers.

What is added to Transformers' classes: the identifiers of the documentation, the protocol ``Tokenizer``, and errors
where Transformers would quietly build a tokenizer that knows no words.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Self

import transformers

from .resolve import (
    BERT_REPOSITORIES,
    GPT2_REPOSITORIES,
    GPTJ_REPOSITORIES,
    T5_REPOSITORIES,
    Layout,
    find_files,
    local_path,
)
from .vocabulary import check_merges, read_json, read_tokens, require_tokens

# The number in ["▁the",-3.95], an entry of a unigram vocabulary.
_SCORE = re.compile(r'(?<=",)-?\d[\d.e-]*(?=\])')


class _ModelCenterTokenizer(transformers.TokenizersBackend):  # type: ignore[misc]  # untyped library
    """What the four classes add to Transformers' own."""

    repositories: ClassVar[dict[str, str]]
    layouts: ClassVar[tuple[Layout, ...]]
    backend_model: ClassVar[str]
    required_tokens: ClassVar[dict[str, str]]
    # The parts of tokenizer.json that Transformers' class makes anew, and what it always makes them of. A file that
    # says otherwise is taken as it is, since it would give other ids.
    remade_parts: ClassVar[dict[str, dict[str, Any]]] = {}
    # The options of these parts, and where tokenizer.json says the same.
    remade_options: ClassVar[dict[str, tuple[str, str]]] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *init_inputs: Any,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a tokenizer from a directory, a vocabulary file or the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: A local directory with Hugging Face's layout (``tokenizer.json``) or with
                the plain vocabulary files, a documented identifier such as ``"bert-base-uncased"``, or the
                ``organisation/name`` of a hub repository.
            *init_inputs: Passed on to the Transformers class.
            revision: Branch, tag or commit of the hub repository.
            local_files_only: Only use local files and the hub's cache.
            cache_dir: Where downloads are kept, instead of the hub's usual cache.
            **options: Passed on to the Transformers class, e.g. ``do_lower_case``, ``pad_token``.

        Raises:
            ValueError: The files are missing, or are not what this class reads.
        """
        path = local_path(
            pretrained_model_name_or_path,
            cls.repositories,
            revision=revision,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
        )
        files = find_files(path, cls.layouts, cls.__name__)
        options = cls._options(files, options)
        source = files[0] if path.is_file() and len(files) == 1 else files[0].parent
        try:
            tokenizer: Self = super().from_pretrained(str(source), *init_inputs, local_files_only=True, **options)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            names = " and ".join(str(file) for file in files)
            raise ValueError(f"{names}: Transformers could not build a {cls.__name__} of it: {error}") from error
        found = type(tokenizer.backend_tokenizer.model).__name__
        if found != cls.backend_model:
            raise ValueError(
                f"{files[0]} holds a {found} tokenizer, but {cls.__name__} needs {cls.backend_model}. Load it with "
                "the class it was made with (`load_tokenizer` finds that)"
            )
        tokenizer.name_or_path = os.fspath(pretrained_model_name_or_path)
        tokenizer._complete()
        return tokenizer

    @classmethod
    def _options(cls, files: list[Path], options: dict[str, Any]) -> dict[str, Any]:
        """Check the files, and add to the given options those that the files call for."""
        # Transformers would add a missing special token behind the vocabulary, where the model has no embedding.
        stated = {**_tokenizer_config(files), **options}
        names = {name: stated.get(name) or token for name, token in cls.required_tokens.items()}
        tokens = {name: token["content"] if isinstance(token, dict) else str(token) for name, token in names.items()}
        require_tokens(files[0], dict.fromkeys(read_tokens(files[0])), tokens)
        if len(files) > 1 or files[0].suffix != ".json":
            return options
        content = read_json(files[0])
        given = [name for name in cls.remade_options if name in options]
        if given and (difference := cls._difference(content)) is not None:
            raise ValueError(
                f"`{given[0]}` would change nothing: in {files[0]}, {difference} as {cls.__name__} makes it, so that "
                "the file is taken as it is; leave the option out, or change the file"
            )
        said = {name: (content.get(part) or {}, key) for name, (part, key) in cls.remade_options.items()}
        return {name: part[key] for name, (part, key) in said.items() if key in part and name not in stated} | options

    @classmethod
    def _difference(cls, content: dict[str, Any]) -> str | None:
        """Tell what a tokenizer.json has that Transformers' class would not make, if there is something."""
        for part, makes in cls.remade_parts.items():
            has = content.get(part) or {"type": None}
            for key, value in makes.items():
                if has.get(key, value) != value:
                    return f"`{part}.{key}` is {has[key]!r}, not {value!r}"
        return None

    @classmethod
    def convert_to_native_format(cls, **options: Any) -> Any:
        """Turn files into arguments of the constructor (for Transformers)."""
        file = options.get("tokenizer_file")
        if file is not None and cls._difference(read_json(Path(file))) is not None:
            return super().convert_to_native_format(**options)
        # Asked for a class without a constructor of its own, Transformers would pass over the options, and over what
        # the class makes of a sentencepiece file; so it is asked for its own class.
        owner: Any = next(base for base in cls.__mro__ if not issubclass(base, _ModelCenterTokenizer))
        return owner.convert_to_native_format(**options)

    def _complete(self) -> None:
        """Add what the files leave open."""

    @property
    def name(self) -> str:
        """Last part of the directory or identifier it was loaded from, or the class's name."""
        path = Path(self.name_or_path)
        return (path.parent if path.is_file() else path).name or type(self).__name__

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of everything that decides ids (see `Tokenizer`)."""
        # What precedes the added tokens is the truncation and padding of the last call.
        _, _, content = self.backend_tokenizer.to_str().partition('"added_tokens":')
        if self.backend_model == "Unigram":
            # The scores lose their last digit when a tokenizer is copied to another process.
            content = _SCORE.sub(lambda score: f"{float(score[0]):.6g}", content)
        special_tokens = sorted((name, str(token)) for name, token in self.special_tokens_map.items())
        identity = f"{special_tokens} {self.split_special_tokens} {content}"
        return hashlib.sha256(identity.encode()).hexdigest()

    @property
    def eod_id(self) -> int:
        """Id that ends a document."""
        return self._required_id("eos_token")

    @property
    def pad_id(self) -> int:
        """Id that fills a batch up to one length."""
        return self._required_id("pad_token")

    def _required_id(self, token: str) -> int:
        token_id = getattr(self, f"{token}_id")
        if not isinstance(token_id, int):
            raise ValueError(f"{self.name} has no `{token}`: set it to a token of the vocabulary")
        return token_id


class BertTokenizer(_ModelCenterTokenizer, transformers.BertTokenizer):  # type: ignore[misc]  # untyped library
    """BERT's WordPiece tokenizer (section 1.6.3): Transformers' ``BertTokenizer``.

    A vocabulary that holds upper-case words is read as a cased one unless ``do_lower_case`` says otherwise, so that a
    plain directory of ``bert-base-cased`` works. ``eod_id`` is the id of ``[SEP]``.
    """

    repositories = BERT_REPOSITORIES
    layouts = (("tokenizer.json",), ("vocab.txt",))
    backend_model = "WordPiece"
    required_tokens: ClassVar = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    remade_parts: ClassVar = {
        "normalizer": {"type": "BertNormalizer", "clean_text": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    }
    remade_options: ClassVar = {
        "do_lower_case": ("normalizer", "lowercase"),
        "strip_accents": ("normalizer", "strip_accents"),
        "tokenize_chinese_chars": ("normalizer", "handle_chinese_chars"),
    }

    @classmethod
    def _options(cls, files: list[Path], options: dict[str, Any]) -> dict[str, Any]:
        options = super()._options(files, options)
        if files[0].suffix == ".json" or "do_lower_case" in _tokenizer_config(files):
            return options
        lower_case = not any(re.fullmatch("[A-Z][a-z]+", word) for word in read_tokens(files[0]))
        return {"do_lower_case": lower_case, **options}

    @property
    def eod_id(self) -> int:
        """Id of ``[SEP]``, which ends each of BERT's segments."""
        return self._required_id("sep_token")


class GPT2Tokenizer(_ModelCenterTokenizer, transformers.GPT2Tokenizer):  # type: ignore[misc]  # untyped library
    """GPT-2's byte-level BPE tokenizer (section 1.7.3): Transformers' ``GPT2Tokenizer``.

    GPT-2's vocabulary has no padding token. One is added behind it (id 50257 for the published vocabulary), which is
    the padding id of the GPT-2 model of `model_center.model`.
    """

    repositories = GPT2_REPOSITORIES
    layouts = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    backend_model = "BPE"
    required_tokens: ClassVar = {"eos_token": "<|endoftext|>"}
    remade_parts: ClassVar = {
        "normalizer": {"type": None},
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "ignore_merges": False},
    }
    remade_options: ClassVar = {"add_prefix_space": ("pre_tokenizer", "add_prefix_space")}

    @classmethod
    def _options(cls, files: list[Path], options: dict[str, Any]) -> dict[str, Any]:
        if len(files) == 2:
            check_merges(files[1])
        return super()._options(files, options)

    def _complete(self) -> None:
        if self.pad_token is None:
            self.add_special_tokens({"pad_token": "<|padding|>"})


class GPTjTokenizer(GPT2Tokenizer):
    """GPT-J's tokenizer (section 1.8.3): GPT-2's with 143 additional tokens; it pads with ``<|endoftext|>``."""

    repositories = GPTJ_REPOSITORIES

    def _complete(self) -> None:
        if self.pad_token is None:
            self.add_special_tokens({"pad_token": self.eos_token})


class T5Tokenizer(_ModelCenterTokenizer, transformers.T5Tokenizer):  # type: ignore[misc]  # untyped library
    """T5's (and mT5's) sentencepiece tokenizer (section 1.9.3): Transformers' ``T5Tokenizer``."""

    repositories = T5_REPOSITORIES
    layouts = (("tokenizer.json",), ("spiece.model",))
    backend_model = "Unigram"
    required_tokens: ClassVar = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

    @classmethod
    def _options(cls, files: list[Path], options: dict[str, Any]) -> dict[str, Any]:
        # Transformers suspects every vocabulary over 100,000 entries of a fault that Mistral's had, and warns.
        return {"fix_mistral_regex": False, **super()._options(files, options)}


def _tokenizer_config(files: list[Path]) -> dict[str, Any]:
    """The options saved beside the vocabulary."""
    file = files[0].parent / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}
