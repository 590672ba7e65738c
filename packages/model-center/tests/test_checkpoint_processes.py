"""Several processes write one checkpoint, and any number of them goes on from it."""

import errno
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoint_training import assert_equal, contents, make_state, run_processes, train
from safetensors import safe_open

from model_center import engine
from model_center.model import GPT2
from model_center.model.safetensors_writer import SafetensorsWriter
from model_center.recipe.checkpoints import CheckpointStore, TrainingState


def open_store(directory: Path, *, asynchronous: bool = False) -> CheckpointStore:
    return CheckpointStore(directory, keep_last=9, keep_best=True, asynchronous=asynchronous)


def resume_and_train(folder: Path, start: int, steps: int, asynchronous: bool) -> None:
    """Load, compare with what was saved, save again at once, train, save, and go on from there twice alike."""
    store = open_store(folder / "checkpoints", asynchronous=asynchronous)
    state = make_state(torch.bfloat16)
    newest = store.newest(verify=True).path
    assert newest == folder / "checkpoints" / f"step-{start:08d}"
    assert store.load(newest, state) == {"step": start}
    loaded = contents(state)
    if engine.rank() == 0:
        assert_equal(loaded, torch.load(folder / f"{start}.pt", weights_only=True))
    drawn = engine.distributed.all_gather(torch.rand(1)).flatten().tolist()
    assert len(set(drawn)) == engine.world_size(), "processes must draw different numbers"
    train(state, steps)
    state.progress = {"step": start + steps}
    store.save(state, step=start + steps, config="")
    saved = contents(state)
    if engine.rank() == 0:
        torch.save(saved, folder / f"{start + steps}.pt")
    if engine.world_size() == 2 and engine.current_engine().device.type == "cpu":
        straight = train(state, 2)
        newest = store.newest().path
        assert newest is not None
        again = make_state(torch.bfloat16)
        store.load(newest, again)
        assert train(again, 2) == straight
        expected, found = contents(state), contents(again)
        assert_equal(found, expected)
    store.close()


def first_steps(folder: Path) -> None:
    state = make_state(torch.bfloat16)
    train(state, 2)
    state.progress = {"step": 2}
    with open_store(folder / "checkpoints") as store:
        store.save(state, step=2, config="")
    torch.save(contents(state), folder / "2.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for CPUs")
def test_one_two_four_one(tmp_path: Path) -> None:
    first_steps(tmp_path)
    run_processes(resume_and_train, 2, tmp_path, 2, 2, True)
    run_processes(resume_and_train, 4, tmp_path, 4, 1, False)
    last = tmp_path / "checkpoints" / "step-00000005"
    assert len(list(last.glob("optimizer-*"))) == 4
    index = json.loads((last / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 4
    state = make_state(torch.bfloat16)
    store = open_store(tmp_path / "checkpoints")
    assert store.load(last, state) == {"step": 5}
    assert_equal(contents(state), torch.load(tmp_path / "5.pt", weights_only=True))
    assert_equal(dict(GPT2.from_pretrained(last).state_dict()), dict(state.model.state_dict()))
    elements = 0
    for path in last.glob("optimizer-*"):
        with safe_open(path, framework="pt") as file:
            elements += sum(file.get_tensor(key).numel() for key in file.keys() if "/exp_avg/" in key)  # noqa: SIM118
    assert elements == sum(parameter.numel() for parameter in state.model.parameters()), "no element is stored twice"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_and_engines(tmp_path: Path) -> None:
    """From one process and engine to the next, with as many GPUs as there are, up to two."""
    count = min(2, torch.cuda.device_count())
    run_processes(first_steps, 1, tmp_path)
    run_processes(resume_and_train, count, tmp_path, 2, 2, True)
    step = 4
    if find_spec("bmtrain") is not None:
        run_processes(resume_and_train, count, tmp_path, 4, 1, True, name="bmtrain")
        run_processes(resume_and_train, 1, tmp_path, 5, 1, False, name="bmtrain")
        step = 6
    run_processes(resume_and_train, 1, tmp_path, step, 1, True)


FAILED = r"process 1: cannot write optimizer-00002-of-00002\.safetensors of"


def save_and_wait(store: CheckpointStore, state: TrainingState, step: int) -> None:
    store.save(state, step=step, config="")
    store.wait()


def fail_on_one(folder: Path) -> None:
    add = SafetensorsWriter.add

    def failing(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        if "exp_avg" in name and engine.rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(writer, name, tensor)

    state = make_state()
    train(state, 1)
    for asynchronous in (False, True):
        store = open_store(folder / str(asynchronous), asynchronous=asynchronous)
        save_and_wait(store, state, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SafetensorsWriter, "add", failing)
            with pytest.raises(OSError, match=FAILED) as told:
                save_and_wait(store, state, 2)
        assert "No space left on device" in str(told.value)
        assert sorted(path.name for path in (folder / str(asynchronous)).iterdir()) == [".lock", "step-00000001"]
        store.save(state, step=3, config="")
        assert store.newest(verify=True).path == folder / str(asynchronous) / "step-00000003"
        fail_when_loading(store, folder / str(asynchronous))


def fail_when_loading(store: CheckpointStore, directory: Path) -> None:
    """Each process reads a share of the files; what one finds, all tell."""
    damaged = directory / "step-00000001" / "random-00002-of-00002.safetensors"
    engine.synchronize()
    if engine.rank() == 0:
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    engine.synchronize()
    with pytest.raises(ValueError, match=r"random-00002-of-00002\.safetensors: bytes 0 to \d+ do not have"):
        store.load(damaged.parent, make_state())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for CPUs")
def test_a_failure_of_one_is_told_by_all(tmp_path: Path) -> None:
    run_processes(fail_on_one, 2, tmp_path)
