"""One of two processes under the engine of the first argument, of which rank 1 ends as the second one says."""

import os
import signal
import sys
from typing import Any

import torch

from model_center import engine as bmt

engine: Any = sys.argv[1]
bmt.init_distributed(engine=engine)
bmt.distributed.all_reduce(torch.ones(1))
if bmt.rank() == 1:
    if sys.argv[2] == "raises":
        raise ValueError("the data of rank 1 is broken")
    os.kill(os.getpid(), signal.SIGKILL)
bmt.distributed.all_reduce(torch.ones(1)).item()
