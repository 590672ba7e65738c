"""Tools that turn raw text into training data."""

from importlib.metadata import version

from .encoders import CausalLMEncoder, CPM1Encoder, Encoder
from .executors import LocalExecutor, WorkerDiedError
from .inspection import Summary, decoded_samples, plot_lengths, summarize
from .ray_executor import RayExecutor
from .reading import InputError, ReadOptions
from .reshaping import merge_datasets, split_dataset
from .shuffling import shuffle_lines
from .tokenization import Counts, tokenize_files

__version__ = version("mc-preprocess")
__all__ = [
    "CPM1Encoder",
    "CausalLMEncoder",
    "Counts",
    "Encoder",
    "InputError",
    "LocalExecutor",
    "RayExecutor",
    "ReadOptions",
    "Summary",
    "WorkerDiedError",
    "__version__",
    "decoded_samples",
    "merge_datasets",
    "plot_lengths",
    "shuffle_lines",
    "split_dataset",
    "summarize",
    "tokenize_files",
]
