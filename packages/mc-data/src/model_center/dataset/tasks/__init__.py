"""Tasks: their definition, once for all model families, and how rows become model input.

This module needs no PyTorch; the data sets (`bertdataset`, …) do.
"""

from .catalogue import TASKS, UnknownTask, load_task
from .task import Prompt, Task

__all__ = ["TASKS", "Prompt", "Task", "UnknownTask", "load_task"]
