"""Which engine runs this process."""

import atexit
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from model_center.engine.base import Engine
from model_center.engine.determinism import deterministic_algorithms
from model_center.engine.launch import Place, launched_size
from model_center.engine.torch_engine import TorchEngine

EngineT = TypeVar("EngineT", bound=Engine)
EngineName = Literal["torch", "bmtrain"]

ENGINE_VARIABLE = "MODEL_CENTER_ENGINE"
"""Environment variable that names the engine where `init_distributed` is not told."""

# Plain variables, not context variables: autograd runs backward, and with it recomputed blocks, in other threads.
_current: Engine | None = None  # in use
_chosen: Engine | None = None  # by `init_distributed`
_default: Engine | None = None  # where nothing was chosen
_settings = ExitStack()  # of the process, that the chosen engine has changed
atexit.register(_settings.close)  # which would fail once the interpreter takes modules away


def current_engine() -> Engine:
    """The engine in use.

    That of `use_engine`, else that of `init_distributed`, else BMTrain if the script has initialised it by itself,
    else plain PyTorch in one process.

    Raises:
        ValueError: If this process is one of several and `init_distributed` has not been called, or if BMTrain was
            initialised after `init_distributed` had started PyTorch.
    """
    if _current is None:
        return _default_engine()
    if _current is _chosen and _chosen.name != "bmtrain" and _bmtrain_runs():
        raise ValueError(
            "bmtrain.init_distributed() was called after init_distributed() had chosen PyTorch, and one process runs "
            'one engine: call init_distributed(engine="bmtrain") instead of both'
        )
    return _current


def _default_engine() -> Engine:
    global _default  # noqa: PLW0603
    name: EngineName = "bmtrain" if _bmtrain_runs() else "torch"
    if _default is None or _default.name != name:
        if name == "torch" and (size := launched_size(os.environ)) > 1:
            raise ValueError(
                f"init_distributed() must be called before anything else of this package: this is one of {size} "
                "processes (`WORLD_SIZE`), which would each train a copy of their own"
            )
        _default = _bmtrain_engine(seed=0) if name == "bmtrain" else TorchEngine()
    return _default


@contextmanager
def use_engine(engine: EngineT) -> Iterator[EngineT]:
    """Runs a block of code under `engine`: layers constructed in it belong to that engine.

    The process's settings for a deterministic engine are in force in it, and restored at its end.
    """
    global _current  # noqa: PLW0603
    with ExitStack() as settings:
        if engine.deterministic:
            settings.enter_context(deterministic_algorithms(compiles=engine.compiles))
        previous, _current = _current, engine
        try:
            yield engine
        finally:
            _current = previous


def init_distributed(
    seed: int = 0,
    *,
    engine: EngineName | None = None,
    use_checkpoint: bool | None = None,
    zero_level: Literal[2, 3] = 3,
    compile: bool = False,
    activation_budget: float | None = None,
    deterministic: bool = False,
) -> None:
    """Starts the engine. Call it once, before anything else of this package.

    Under torchrun it starts the communication between all processes; otherwise there is one process.

    Args:
        seed: Seeds the random generators of torch, Python and NumPy (if installed), from 0 to 2**32 - 1; the same on
            every process, which is how all of them make the same weights. For dropout that differs between processes
            call `torch.manual_seed(seed + rank())` once the model is made.
        engine: "torch" or "bmtrain"; by default what the environment variable `MODEL_CENTER_ENGINE` says, else
            "bmtrain" if the script has already initialised BMTrain, else "torch".
        use_checkpoint: Whether blocks recompute their activations in backward, which saves memory and costs a third
            more computation; by default on CUDA only, and not with an `activation_budget`.
        zero_level: With several processes, 3 shards a block's parameters between its uses, and 2 keeps them from its
            forward to its backward pass, which saves one gathering for more memory.
        compile: Whether blocks are compiled, which makes the first steps take much longer and all later ones less.
            Blocks of one kind share what is compiled, and it is compiled twice at most while nothing but lengths
            change. A call with a cache is not compiled.
        activation_budget: Share of the activations that compiled blocks keep for backward, from 0 to 1: what is
            cheapest to compute is computed again. 1, like None, is what the compiler keeps by itself, and 0 the
            blocks' inputs only. It needs `compile`, and takes the place of `use_checkpoint`.
        deterministic: Whether the same script on the same machine computes the same bits in every run, until
            `init_distributed` is called again. An operation that has no such form raises a RuntimeError that names it.

    Raises:
        ValueError: If an argument is out of range, the engine cannot run here, another one already runs in this
            process, the processes do not find each other, or there is nothing here to compile with.
    """
    global _current, _chosen  # noqa: PLW0603
    if not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be from 0 to 2**32 - 1, but is {seed}")
    name = engine or os.environ.get(ENGINE_VARIABLE) or ("bmtrain" if _bmtrain_runs() else "torch")
    source = "engine" if engine else ENGINE_VARIABLE
    if name not in get_args(EngineName):
        raise ValueError(f"`{source}` must be one of {', '.join(get_args(EngineName))}, but is {name!r}")
    if name == "torch" and _bmtrain_runs():
        raise ValueError(f"`{source}` must be 'bmtrain', which already runs in this process, but is 'torch'")
    if name == "bmtrain" and _chosen is not None and _chosen.name == "torch" and _chosen.world_size > 1:
        raise ValueError(f"`{source}` must be 'torch', which already runs in this process, but is 'bmtrain'")
    options: dict[str, Any] = {
        "use_checkpoint": use_checkpoint,
        "compile": compile,
        "activation_budget": activation_budget,
        "deterministic": deterministic,
    }
    if name == "bmtrain":
        started = _bmtrain_engine(seed=seed, zero_level=zero_level, **options)
    else:
        started = _torch_engine(zero_level, **options)
    if started.device.type == "cuda":
        torch.cuda.set_device(started.device)
    _settings.close()
    if deterministic:
        _settings.enter_context(deterministic_algorithms(compiles=compile))
    _seed(seed)
    _current = _chosen = started
    _accompany_optimizers()


@cache
def _accompany_optimizers() -> None:
    """Lets PyTorch's optimizers, too, find gradients as they have to be, also when they are stepped by themselves."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not getattr(optimizer, "tells_engine", False):  # as ours do by themselves
        current_engine().before_update_of(optimizer.param_groups)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not getattr(optimizer, "tells_engine", False):
        current_engine().after_update()


def _torch_engine(zero_level: int, **options: Any) -> Engine:
    if launched_size(os.environ) == 1:
        return TorchEngine(**options)
    # Imported for several processes only: PyTorch's distributed tensors take a second to import.
    from model_center.engine.fsdp_engine import FSDPEngine

    return FSDPEngine(Place.of_environment(os.environ), zero_level=zero_level, **options)


def _bmtrain_engine(**options: Any) -> Engine:
    if find_spec("bmtrain") is None:
        raise ValueError(
            "the engine 'bmtrain' needs the package bmtrain, which is not installed: install mc-layers with its extra "
            "\"bmtrain\" (tools/bmtrain_wheel.py builds a wheel where there is none), or use the engine 'torch'"
        )
    if not torch.cuda.is_available():
        raise ValueError("the engine 'bmtrain' needs a GPU, but PyTorch finds none here; use the engine 'torch'")
    from model_center.engine.bmtrain_engine import BMTrainEngine

    return BMTrainEngine(**options)


def _bmtrain_runs() -> bool:
    """Whether BMTrain has been initialised, by whomever; never imports it."""
    module = sys.modules.get("bmtrain.global_var")
    return module is not None and bool(module.config["initialized"])


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        import numpy as np
    except ModuleNotFoundError:  # torch works without it
        return
    np.random.seed(seed)  # noqa: NPY002 - the generator that data code shares
