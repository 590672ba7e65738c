# What is imported from where, on first use: the only list of the public names.

from .anomalies import TrainingStoppedError
from .callbacks import Callbacks
from .checkpoint_configuration import ConvertConfig, VerifyConfig
from .checkpoints import CheckpointStore, TrainingState, find_newest
from .classifier import EncoderClassifier, load_classifier
from .commands import RunInterrupted
from .configuration import (
    EngineOptions,
    OptimizerOptions,
    ReportConfig,
    WandbOptions,
)
from .conversion import Conversion, prepare_conversion
from .evaluation import evaluate_checkpoint, load_task_model
from .finetune_configuration import (
    DataOptions,
    FinetuneConfig,
    ModelOptions,
    QuickstartConfig,
)
from .finetuning import Job, Result, finetune, prepare, train
from .metrics import (
    EvaluationMetrics,
    Recorder,
    StepMetrics,
    ValidationMetrics,
    read_metrics,
)
from .plot import plot_losses, plot_run
from .pretrain_configuration import (
    BatchOptions,
    CheckpointOptions,
    PretrainConfig,
    PretrainDataOptions,
    PretrainModelOptions,
    ValidationOptions,
    WatchOptions,
)
from .pretraining import PretrainingResult, pretrain
from .pretraining_job import PretrainingJob, prepare_pretraining
from .quickstart import quickstart_config
from .report import RunSummary, summarize
from .run_directory import read_status
from .verification import Certificate, verify

__version__: str
__all__ = [
    "BatchOptions",
    "Callbacks",
    "Certificate",
    "CheckpointOptions",
    "CheckpointStore",
    "Conversion",
    "ConvertConfig",
    "DataOptions",
    "EncoderClassifier",
    "EngineOptions",
    "EvaluationMetrics",
    "FinetuneConfig",
    "Job",
    "ModelOptions",
    "OptimizerOptions",
    "PretrainConfig",
    "PretrainDataOptions",
    "PretrainModelOptions",
    "PretrainingJob",
    "PretrainingResult",
    "QuickstartConfig",
    "Recorder",
    "ReportConfig",
    "Result",
    "RunInterrupted",
    "RunSummary",
    "StepMetrics",
    "TrainingState",
    "TrainingStoppedError",
    "ValidationMetrics",
    "ValidationOptions",
    "VerifyConfig",
    "WandbOptions",
    "WatchOptions",
    "__version__",
    "evaluate_checkpoint",
    "find_newest",
    "finetune",
    "load_classifier",
    "load_task_model",
    "plot_losses",
    "plot_run",
    "prepare",
    "prepare_conversion",
    "prepare_pretraining",
    "pretrain",
    "quickstart_config",
    "read_metrics",
    "read_status",
    "summarize",
    "train",
    "verify",
]
