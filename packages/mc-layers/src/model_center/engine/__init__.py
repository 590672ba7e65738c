"""The engine seam: everything distributed goes through here, under BMTrain's names.

`from model_center import engine as bmt` is all that a script written for BMTrain changes to run on plain PyTorch.
"""

from importlib.metadata import version

from model_center.engine import distributed, loss, lr_scheduler, optim
from model_center.engine.base import Engine
from model_center.engine.blocks import CheckpointBlock, TransformerBlockList
from model_center.engine.checkpoint import (
    StateMismatch,
    atomic_write,
    compare_states,
    load,
    load_state_dict,
    save,
)
from model_center.engine.current import current_engine, init_distributed, use_engine
from model_center.engine.dtype import HALF
from model_center.engine.initializer import Constant, Initializer, Normal, fills_parameters, uninitialized
from model_center.engine.optim import optim_step
from model_center.engine.process import (
    gather_result,
    init_parameters,
    print_rank,
    rank,
    sum_loss,
    synchronize,
    world_size,
)
from model_center.engine.torch_engine import TorchEngine

__version__ = version("mc-layers")
__all__ = [
    "HALF",
    "CheckpointBlock",
    "Constant",
    "Engine",
    "Initializer",
    "Normal",
    "StateMismatch",
    "TorchEngine",
    "TransformerBlockList",
    "__version__",
    "atomic_write",
    "compare_states",
    "current_engine",
    "distributed",
    "fills_parameters",
    "gather_result",
    "init_distributed",
    "init_parameters",
    "load",
    "load_state_dict",
    "loss",
    "lr_scheduler",
    "optim",
    "optim_step",
    "print_rank",
    "rank",
    "save",
    "sum_loss",
    "synchronize",
    "uninitialized",
    "use_engine",
    "world_size",
]
