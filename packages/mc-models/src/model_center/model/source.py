"""Where a checkpoint's files come from: a local directory, or a repository on the Hugging Face hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG_NAME = "config.json"


class Source(Protocol):
    """A place that holds a checkpoint's files."""

    @property
    def description(self) -> str:
        """How error messages name the place."""

    def file(self, name: str) -> Path | None:
        """The local path of the file called `name`, or None if the place has no such file."""


@dataclass(frozen=True)
class LocalDirectory:
    """A directory on this machine."""

    path: Path

    @property
    def description(self) -> str:
        """The directory's path."""
        return f"directory {self.path}"

    def file(self, name: str) -> Path | None:
        """The file's path, if it exists."""
        path = self.path / name
        return path if path.is_file() else None


@dataclass(frozen=True)
class HubRepository:
    """A model repository on the Hugging Face hub, read through `huggingface_hub` and its cache.

    Its environment variables hold here too: `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and the others.
    """

    repository: str
    revision: str | None = None
    local_files_only: bool = False

    @property
    def description(self) -> str:
        """The repository and its revision."""
        return f"Hugging Face repository {self.repository} (revision {self.revision or 'main'})"

    def file(self, name: str) -> Path | None:
        """The file's path in the hub's cache, downloaded if need be; None if the repository does not have it.

        Raises:
            FileNotFoundError: there is no such repository or revision.
        """
        try:
            path = hf_hub_download(
                self.repository, name, revision=self.revision, local_files_only=self.local_files_only
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise FileNotFoundError(f"cannot find {self.description}: {error}") from error
        except EntryNotFoundError:  # the repository does not have it, or offline it is not in the cache
            return None
        return Path(path)


def resolve(
    name_or_dir: str | Path,
    repositories: Mapping[str, str | None],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Source:
    """Finds the place that `name_or_dir` means.

    Args:
        name_or_dir: a directory, a known identifier, or the `owner/name` of a repository on the hub.
        repositories: known identifier -> repository on the hub, or None where the hub has none.
        revision: branch, tag or commit of the repository; the default is its main branch.
        local_files_only: whether to use only what the hub's cache holds.

    Raises:
        FileNotFoundError: `name_or_dir` is none of these; the message lists the nearest known identifiers.
    """
    path, name = Path(name_or_dir).expanduser(), str(name_or_dir)
    if path.is_dir():
        return LocalDirectory(path)
    if path.is_file():
        raise FileNotFoundError(f"{name} is a file; give the directory that holds it and its {CONFIG_NAME}")
    if name in repositories:
        repository = repositories[name]
        if repository is None:
            raise FileNotFoundError(
                f"the weights of {name} are in no Hugging Face repository: pass a local directory instead, either a "
                f"legacy ModelCenter directory ({CONFIG_NAME} and pytorch_model.pt, as ModelCenter 0.1 to 1.0 "
                f"distributed and saved this model) or one that save_pretrained wrote"
            )
        return HubRepository(repository, revision, local_files_only)
    if isinstance(name_or_dir, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return HubRepository(name, revision, local_files_only)
    nearest = get_close_matches(name, repositories, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    raise FileNotFoundError(
        f"{name!r} is neither a directory nor a known identifier; {meant}Known identifiers: {', '.join(repositories)}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        ValueError: the file is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def read_config(source: Source) -> tuple[dict[str, Any], Path]:
    """Reads the place's `config.json`; returns its content and its path.

    Raises:
        FileNotFoundError: there is none.
    """
    path = source.file(CONFIG_NAME)
    if path is None:
        offline = ""
        if isinstance(source, HubRepository):
            offline = "; if this machine is offline, it is not in the hub's cache either (HF_HUB_CACHE)"
        raise FileNotFoundError(f"{source.description} has no {CONFIG_NAME}{offline}")
    return read_json(path), path
