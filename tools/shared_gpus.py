"""Several processes of one launch on one GPU: tests of what needs several GPUs, where there are not that many.

NCCL refuses two processes of one host on one GPU. So each process is told that it has a host of its own: they talk
through sockets, and take turns on the GPU. What they compute is what several GPUs compute; how fast is not.
"""

import os

VARIABLE = "MODEL_CENTER_PROCESSES_PER_GPU"


def most_processes() -> int:
    """How many processes may train together on this machine's GPUs."""
    import torch  # here, since every process imports this file when it starts

    return torch.cuda.device_count() * _sharing()


def take_place() -> None:
    """Changes the environment of a process that a launcher has started; does nothing where none share a GPU."""
    if _sharing() > 1 and "LOCAL_RANK" in os.environ:
        os.environ["NCCL_HOSTID"] = f"process-{os.environ['RANK']}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) // _sharing())
        os.environ["LOCAL_WORLD_SIZE"] = "1"


def _sharing() -> int:
    return int(os.environ.get(VARIABLE, "1"))
