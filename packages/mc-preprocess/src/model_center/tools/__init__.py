"""Tools that turn raw text into training data."""

from importlib.metadata import version

from .encoders import CausalLMEncoder, CPM1Encoder, Encoder
from .executors import LocalExecutor, WorkerDiedError
from .reading import InputError, ReadOptions
from .tokenization import Counts, tokenize_files

__version__ = version("mc-preprocess")
__all__ = [
    "CPM1Encoder",
    "CausalLMEncoder",
    "Counts",
    "Encoder",
    "InputError",
    "LocalExecutor",
    "ReadOptions",
    "WorkerDiedError",
    "__version__",
    "tokenize_files",
]
