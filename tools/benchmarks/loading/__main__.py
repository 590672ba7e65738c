"""Memory that each process takes while a large checkpoint is loaded, beside what it holds of the model afterwards.

PYTHONPATH=tools python -m benchmarks.loading --family t5 --preset t5-11b --processes 2 --device cpu
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shared_gpus import take_place

from model_center import engine
from model_center.model import families
from model_center.recipe.simulation import meta_model

GIB = 2**30
_HEADER_ROOM = 2**24


def main() -> int:
    """Write a checkpoint, load it in several processes, and print a row for each."""
    parser = argparse.ArgumentParser(prog="loading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=families, default="t5")
    parser.add_argument("--preset", default="t5-3b")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", choices=("torch", "bmtrain"), default="torch")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # of the processes that this one starts
    options = parser.parse_args()
    if options.load is not None:
        return load(options)
    with tempfile.TemporaryDirectory() as name:
        size = write_hollow_checkpoint(options, Path(name))
        command = ["--standalone", f"--nproc_per_node={options.processes}", "-m", "benchmarks.loading", "--load", name]
        chosen = [f"--{each}={getattr(options, each)}" for each in ("family", "preset", "engine")]
        hidden = {} if options.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *command, *chosen], check=True, env=os.environ | hidden
        )
        reports = [json.loads(file.read_text()) for file in sorted(Path(name).glob("rank-*.json"))]
    table = Table("process", "own memory, peak GiB", "GPU, peak GiB", "holds, GiB", "seconds")
    for rank, report in enumerate(reports):
        gpu = "" if report["gpu"] is None else f"{report['gpu'] / GIB:.2f}"
        own, holds = (f"{report[name] / GIB:.2f}" for name in ("host", "holds"))
        table.add_row(str(rank), own, gpu, holds, f"{report['seconds']:.0f}")
    Console(width=100).print(
        f"{options.preset}: {size / GIB:.2f} GiB of bfloat16 weights, engine {options.engine}", table
    )
    return 0


def write_hollow_checkpoint(options: argparse.Namespace, folder: Path) -> int:
    """Write weights that are all zero and take no room on the disk; returns the bytes that they stand for."""
    model_class = families[options.family]
    config: Any = model_class.config_class.preset(options.preset)
    config.dtype = torch.bfloat16
    end, header = 0, {}
    for name, tensor in meta_model(model_class, config).state_dict().items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode().ljust(_HEADER_ROOM)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.to_json_file(folder / "config.json")
    return end


def load(options: argparse.Namespace) -> int:
    """Load the checkpoint and write down the peaks, as one of the processes."""
    take_place()
    engine.init_distributed(seed=0, engine=options.engine)
    current, before = engine.current_engine(), own_memory()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_memory())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    model = families[options.family].from_pretrained(options.load, dtype=torch.bfloat16)
    current.synchronize()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    on_gpu = current.device.type == "cuda"
    report = {
        "host": peak - before,
        "gpu": torch.cuda.max_memory_allocated() if on_gpu else None,
        "holds": sum(current.local(parameter.detach()).nbytes for parameter in model.parameters()),
        "seconds": seconds,
    }
    (options.load / f"rank-{current.rank}.json").write_text(json.dumps(report))
    current.shutdown()
    return 0


def own_memory() -> int:
    """Bytes of this process alone: what it has mapped of files is not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
