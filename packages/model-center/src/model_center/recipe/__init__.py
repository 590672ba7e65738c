"""Training recipes and the model-center command.

Names are imported on first use, so that the command's `--help` does not wait for PyTorch and Transformers.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import EncoderClassifier, load_classifier
    from .configuration import OptimizerOptions
    from .evaluation import evaluate_checkpoint
    from .finetune_configuration import DataOptions, FinetuneConfig, ModelOptions, QuickstartConfig
    from .finetuning import Job, Result, finetune, prepare, train
    from .metrics import EvaluationMetrics, Recorder, StepMetrics, read_metrics
    from .plot import plot_run
    from .quickstart import quickstart_config
    from .run_directory import read_status

__version__ = version("model-center")
__all__ = [
    "DataOptions",
    "EncoderClassifier",
    "EvaluationMetrics",
    "FinetuneConfig",
    "Job",
    "ModelOptions",
    "OptimizerOptions",
    "QuickstartConfig",
    "Recorder",
    "Result",
    "StepMetrics",
    "__version__",
    "evaluate_checkpoint",
    "finetune",
    "load_classifier",
    "plot_run",
    "prepare",
    "quickstart_config",
    "read_metrics",
    "read_status",
    "train",
]

_HOMES = {
    "DataOptions": "finetune_configuration",
    "EncoderClassifier": "classifier",
    "EvaluationMetrics": "metrics",
    "FinetuneConfig": "finetune_configuration",
    "Job": "finetuning",
    "ModelOptions": "finetune_configuration",
    "OptimizerOptions": "configuration",
    "QuickstartConfig": "finetune_configuration",
    "Recorder": "metrics",
    "Result": "finetuning",
    "StepMetrics": "metrics",
    "evaluate_checkpoint": "evaluation",
    "finetune": "finetuning",
    "load_classifier": "classifier",
    "plot_run": "plot",
    "prepare": "finetuning",
    "quickstart_config": "quickstart",
    "read_metrics": "metrics",
    "read_status": "run_directory",
    "train": "finetuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
