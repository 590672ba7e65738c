"""Where a tokenizer's files are: a local directory, or a repository of the Hugging Face hub."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# The identifiers of the documentation (sections 1.6 to 1.9) and the hub repositories that hold those checkpoints.
BERT_REPOSITORIES = {
    f"bert-{name}": f"google-bert/bert-{name}"
    for name in (
        "base-cased",
        "base-uncased",
        "large-cased",
        "large-uncased",
        "base-chinese",
        "base-multilingual-cased",
    )
}
GPT2_REPOSITORIES = {
    "gpt2-base": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
GPTJ_REPOSITORIES = {"gptj-6b": "EleutherAI/gpt-j-6b"}
T5_REPOSITORIES = {f"t5-{size}": f"google-t5/t5-{size}" for size in ("small", "base", "large", "3b", "11b")}

_HUB_FILES = (
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

Layout = tuple[str, ...]
"""Files that together make a tokenizer, e.g. ``("vocab.json", "merges.txt")``."""


def describe_layouts(layouts: Sequence[Layout]) -> str:
    """Say which files would do, e.g. ``tokenizer.json, or vocab.json and merges.txt``."""
    return ", or ".join(" and ".join(layout) for layout in layouts)


def find_files(path: Path, layouts: Sequence[Layout], owner: str) -> list[Path]:
    """Find the files of the first complete layout in a directory; a file stands for a layout of one file.

    Raises:
        ValueError: No layout is complete.
    """
    if path.is_file():
        for layout in layouts:
            # Text vocabularies and sentencepiece models go by any name; a .json may be one of many things.
            if layout == (path.name,) or (len(layout) == 1 and path.suffix == Path(layout[0]).suffix != ".json"):
                return [path]
        path = path.parent
    for layout in layouts:
        files = [path / name for name in layout]
        if all(file.is_file() for file in files):
            return files
    raise ValueError(
        f"{path} holds no vocabulary for {owner}: looked for {describe_layouts(layouts)}; found {contents(path)}"
    )


def contents(folder: Path) -> str:
    """The first names in a folder, for messages."""
    return ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"


def local_path(
    name_or_path: str | os.PathLike[str],
    repositories: Mapping[str, str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
) -> Path:
    """Find a tokenizer's files, downloading them when the name is one of the hub.

    Args:
        name_or_path: A local file or directory, an identifier, or the ``organisation/name`` of a hub repository.
        repositories: The hub repositories of the identifiers; where there are none, only local files are looked for.
        revision: Branch, tag or commit of the hub repository; its main branch when None.
        local_files_only: Only look at local files and the hub's cache (as ``HF_HUB_OFFLINE=1`` does).
        cache_dir: Where downloads are kept, instead of the hub's usual cache.

    Raises:
        ValueError: There is no such path or identifier, or the hub could not deliver it.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = os.fspath(name_or_path)
    if not repositories:
        raise ValueError(
            f"no tokenizer {name!r}: there is no such file or directory (looked for {path.absolute()}). Give the "
            "directory that holds the vocabulary, or the vocabulary file"
        )
    repository = repositories.get(name, name)
    if repository.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        near = difflib.get_close_matches(name, repositories, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(repositories)}"
        raise ValueError(
            f"no tokenizer {name!r}: there is no such file or directory (looked for {path.absolute()}), "
            f"and it is not a documented identifier ({hint}). Give the directory that holds the vocabulary, "
            "a documented identifier, or the organisation/name of a hub repository"
        )
    return _download(name, repository, revision, local_files_only, cache_dir)


def _download(
    name: str,
    repository: str,
    revision: str | None,
    local_files_only: bool,
    cache_dir: str | Path | None,
) -> Path:
    # Imported here: a local directory needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(_HUB_FILES),
                local_files_only=local_files_only,
                cache_dir=cache_dir,
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        version = f" at revision {revision!r}" if revision else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no tokenizer {name!r}: there is no such directory (looked for {Path(name).absolute()}), and the hub "
            f"repository {repository}{version} could not be fetched ({reason}). Check the name, go online once, or "
            "give a local directory"
        ) from error
