"""One of two processes, of which rank 1 ends in the way that the first argument says while the other waits for it."""

import os
import signal
import sys

import torch
import torch.distributed as dist

from model_center.engine.launch import Place, join

place = Place.of_environment(os.environ)
join(place, torch.device("cpu"))
dist.all_reduce(torch.ones(1))
if place.rank == 1:
    if sys.argv[1] == "raises":
        raise ValueError("the data of rank 1 is broken")
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(torch.ones(1))
