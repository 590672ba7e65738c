"""The states of the random generators that training draws from, as tensors."""

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch

from model_center.engine import current_engine


def random_states() -> dict[str, torch.Tensor]:
    """Return copies of the states of torch (and its GPU), NumPy and Python in this process."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - what data code shares
    _, numbers, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.position": torch.tensor([int(position), int(has_gauss)]),
        "numpy.gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python.numbers": torch.tensor(numbers),
        "python.gauss": torch.tensor([] if python_gauss is None else [python_gauss], dtype=torch.float64),
    }
    device = current_engine().device
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: Mapping[str, torch.Tensor]) -> None:
    """Let the generators of this process go on from what `random_states` returned.

    A state of a GPU is ignored where there is none; a GPU without a saved state keeps its own.
    """
    torch.set_rng_state(states["torch"])
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, states["numpy.gauss"].item()))  # noqa: NPY002
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python.numbers"].tolist()), gauss[0] if gauss else None))
    device = current_engine().device
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def derive_random_states(states: Mapping[str, torch.Tensor], rank: int) -> None:
    """Seed the generators of a process that had no counterpart when `states` of the first process were saved.

    The seed is the SHA-256 of the saved state of torch and the rank, so that resuming twice gives the same numbers.
    """
    digest = hashlib.sha256(states["torch"].numpy().tobytes() + rank.to_bytes(8, "little")).digest()
    seed = int.from_bytes(digest[:4], "little")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - likewise
    random.seed(seed)
