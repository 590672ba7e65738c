import json
import os
import random
import shutil
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_training import assert_equal, contents, make_state, seed, train
from safetensors.torch import load_file

from model_center.engine.optim import AdamOptimizer, OptimManager
from model_center.engine.optim.loss_scale import LossScaler
from model_center.model import GPT2
from model_center.recipe import checkpoint_files
from model_center.recipe.checkpoint_files import Manifest
from model_center.recipe.checkpoints import CheckpointStore, TrainingState, find_newest
from model_center.recipe.random_states import derive_random_states, random_states, restore_random_states
from model_center.tokenizer import BertTokenizer

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def open_store(directory: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(directory, **{"keep_last": 2, "keep_best": True, "asynchronous": False, **options})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_by_bit(tmp_path: Path, asynchronous: bool, dtype: torch.dtype) -> None:
    state = make_state(dtype)
    random.gauss(0, 1)  # leaves half of a pair in Python's generator
    np.random.normal()  # noqa: NPY002 - likewise
    train(state, 3)
    with open_store(tmp_path, asynchronous=asynchronous) as store:
        state.progress = {"step": 3, "samples": [1, 2]}
        store.save(state, step=3, config="seed: 3\n")
        straight = train(state, 4)
        drawn = (random.gauss(0, 1), np.random.normal(), torch.rand(1).item())  # noqa: NPY002 - likewise
        resumed = make_state(dtype)
        newest = store.newest(verify=True).path
        assert newest == tmp_path / "step-00000003"
        assert store.load(newest, resumed) == {"step": 3, "samples": [1, 2]}
    assert train(resumed, 4) == straight
    assert (random.gauss(0, 1), np.random.normal(), torch.rand(1).item()) == drawn  # noqa: NPY002 - likewise
    assert_equal(contents(resumed), contents(state))
    assert resumed.manager.loss_scale == state.manager.loss_scale != make_state().manager.loss_scale
    assert (newest / "run.yaml").read_text() == "seed: 3\n"


def test_a_loss_scale_outlives_a_checkpoint_without_one(tmp_path: Path) -> None:
    plain, scaling = make_state(), make_state()
    plain.manager.scaler = LossScaler(1.0, enabled=False)
    train(plain, 1)
    with open_store(tmp_path) as store:
        store.save(plain, step=1, config="")
        newest = store.newest().path
        assert newest is not None
        store.load(newest, scaling)
    assert scaling.manager.scaler == make_state().manager.scaler


def test_synchronous_and_asynchronous_files_are_the_same(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        state = make_state()
        seed()
        train(state, 2)
        with open_store(tmp_path / str(asynchronous), asynchronous=asynchronous) as store:
            store.save(state, step=2, config="", score=0.5)
            train(state, 1)
    first, second = (tmp_path / str(asynchronous) / "step-00000002" for asynchronous in (False, True))
    assert names(first) == names(second)
    assert [name for name in names(first) if (first / name).read_bytes() != (second / name).read_bytes()] == []


def test_the_weights_are_those_of_save_pretrained(tmp_path: Path) -> None:
    state = make_state()
    train(state, 1)
    store = open_store(tmp_path / "checkpoints")
    store.save(state, step=1, config="")
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    state.model.save_pretrained(tmp_path / "saved")
    assert_equal(load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors"))
    assert (checkpoint / "config.json").read_bytes() == (tmp_path / "saved" / "config.json").read_bytes()
    loaded = GPT2.from_pretrained(checkpoint)
    assert_equal(dict(loaded.state_dict()), dict(state.model.state_dict()))
    loaded.export_huggingface(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "config.json").is_file()


def test_a_tokenizer_lies_beside_the_model(tmp_path: Path, encoder: Path) -> None:
    state = make_state()
    state.tokenizer = BertTokenizer.from_pretrained(encoder)
    open_store(tmp_path).save(state, step=0, config="")
    found = BertTokenizer.from_pretrained(tmp_path / "step-00000000")
    assert found.encode("sun moon") == state.tokenizer.encode("sun moon")


def test_before_the_first_step_and_for_parameters_without_gradient(tmp_path: Path) -> None:
    state = make_state()
    store = open_store(tmp_path)
    store.save(state, step=0, config="")
    resumed = make_state()
    store.load(tmp_path / "step-00000000", resumed)
    next(state.model.parameters()).requires_grad_(False)
    train(state, 2)
    store.save(state, step=2, config="")
    store.load(tmp_path / "step-00000002", resumed)
    assert_equal(contents(resumed), contents(state))
    assert len(resumed.optimizers[0].state) == len(list(state.model.parameters())) - 1


def test_the_last_ones_and_the_best_one_stay(tmp_path: Path) -> None:
    state, store = make_state(), open_store(tmp_path)
    scores = [None, 0.5, 0.2, float("nan"), 0.3, 0.2, 0.4]
    for step, score in enumerate(scores):
        store.save(state, step=step, config="", score=score)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    store = open_store(tmp_path, keep_last=1, keep_best=False)
    store.save(state, step=7, config="", score=1.0)
    assert names(tmp_path) == ["step-00000007"]
    with pytest.raises(ValueError, match="`keep_last` must be at least 1, but is 0"):
        open_store(tmp_path, keep_last=0)


def test_after_going_back_the_newest_is_that_written_last(tmp_path: Path) -> None:
    state, store = make_state(), open_store(tmp_path, keep_best=False)
    for step in (10, 20, 15):
        store.save(state, step=step, config="")
    os.utime(tmp_path / "step-00000015", (0, 0))  # the clock does not matter
    assert store.newest().path == tmp_path / "step-00000015"
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    store.save(state, step=20, config="again")
    assert store.newest().path == tmp_path / "step-00000020"
    assert (tmp_path / "step-00000020" / "run.yaml").read_text() == "again"


def test_a_damaged_checkpoint_is_neither_newest_nor_deleted_nor_counted(tmp_path: Path) -> None:
    state, store = make_state(), open_store(tmp_path, keep_best=False)
    for step in (1, 2):
        store.save(state, step=step, config="")
    (tmp_path / "step-00000002" / "training.json").unlink()
    store.save(state, step=3, config="")
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    found = store.newest()
    assert found.path == tmp_path / "step-00000001"
    assert [str(damage) for damage in found.damaged] == [
        "step-00000002/training.json: missing",
        "step-00000003/manifest.json: missing",
    ]


def test_leftovers_go_when_nobody_writes(tmp_path: Path) -> None:
    state, store = make_state(), open_store(tmp_path)
    store.save(state, step=1, config="")
    for name in (".step-00000001.replaced", ".step-00000002.writing", ".step-00000003.removed"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    assert open_store(tmp_path).newest(verify=True).path == tmp_path / "step-00000001"
    assert names(tmp_path) == ["notes", "step-00000001"]


def test_two_writers_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    original = checkpoint_files.publish
    monkeypatch.setattr(checkpoint_files, "publish", lambda filled, target: (go_on.wait(20), original(filled, target)))
    state, store = make_state(), open_store(tmp_path, asynchronous=True)
    store.save(state, step=1, config="")
    other = open_store(tmp_path)  # does not remove what is being written
    with pytest.raises(OSError, match="another process is writing a checkpoint to"):
        other.save(state, step=2, config="")
    go_on.set()
    store.close()
    other.save(state, step=2, config="")
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_reader_sees_whole_checkpoints_only(tmp_path: Path) -> None:
    state, done, seen = make_state(), threading.Event(), []

    def read() -> None:
        while not done.is_set():
            found = find_newest(tmp_path, verify=True)
            seen.append(found.path)
            assert not found.damaged, found

    errors: list[BaseException] = []

    def catch() -> None:
        try:
            read()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    reader = threading.Thread(target=catch)
    reader.start()
    with open_store(tmp_path, asynchronous=True, keep_last=1) as store:
        for step in range(15):
            store.save(state, step=step, config="", score=-step)
    done.set()
    reader.join()
    assert not errors, errors
    assert len(set(seen)) > 2


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    state, store = make_state(), open_store(tmp_path)
    train(state, 1)
    store.save(state, step=1, config="")
    checkpoint = tmp_path / "step-00000001"
    other = make_state(dim_ff=16)
    before = {name: tensor.clone() for name, tensor in contents(other).items()}
    with pytest.raises(ValueError, match="is of another training") as caught:
        store.load(checkpoint, other)
    told = str(caught.value)
    for expected in (
        "model: `dim_ff` is 14 in the checkpoint, 16 here",
        "weights: wrong shape: encoder.layers.0.ffn.ffn.w_in.w.weight is (14, 10), must be (16, 10)",
        "optimizer 0: encoder.layers.0.ffn.ffn.w_in.w.weight is of group 0 and shape [14, 10] in the checkpoint, ",
    ):
        assert expected in told
    assert_equal(contents(other), before)
    with pytest.raises(ValueError, match="`num_layers` is 2 in the checkpoint, 9 here") as caught:
        store.load(checkpoint, make_state(num_layers=9))
    added = sum(name.startswith("encoder.layers.") for name in state.model.state_dict()) // 2 * 7
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 + 6 + 6
    assert lines[2].startswith("weights: missing: encoder.layers.2.")
    assert lines[7] == f"weights: and {added - 5} more"
    assert lines[-1] == f"optimizer 0: and {added - 5} more"

    manager = OptimManager()
    with pytest.raises(ValueError, match=r"optimizers: 1 in the checkpoint, 0 here"):
        store.load(checkpoint, TrainingState(make_state().model, None, manager))
    manager.add_optimizer(AdamOptimizer(list(make_state().model.parameters())))
    with pytest.raises(ValueError, match="must train parameters of `model` only"):
        store.save(TrainingState(state.model, None, manager), step=2, config="")
    manager = OptimManager()
    manager.add_optimizer(torch.optim.SGD(state.model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"must hold AdamOptimizer and AdamOffloadOptimizer only.* holds a SGD"):
        store.save(TrainingState(state.model, None, manager), step=2, config="")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        store.load(tmp_path / "step-00000009", state)
    state.progress = {"step": {1}}
    with pytest.raises(ValueError, match="must be values that JSON can hold"):
        store.save(state, step=2, config="")
    assert names(tmp_path) == ["step-00000001"]


def test_options_without_effect_on_the_model_may_change(tmp_path: Path) -> None:
    state, store = make_state(), open_store(tmp_path)
    train(state, 1)
    store.save(state, step=1, config="")
    other = make_state(torch.bfloat16, dropout_p=0.2, emb_init_std=0.1)
    store.load(tmp_path / "step-00000001", other)
    masters = {name: tensor for name, tensor in contents(other).items() if name.endswith("master")}
    assert len(masters) == len(list(other.model.parameters()))


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, store = make_state(), open_store(tmp_path)
    monkeypatch.setattr(checkpoint_files, "FORMAT_VERSION", 7)
    store.save(state, step=2, config="")
    monkeypatch.undo()
    store.save(state, step=1, config="")
    with pytest.raises(ValueError, match="has format version 7, but this version of model-center reads up to 1"):
        store.load(tmp_path / "step-00000002", state)
    with pytest.raises(ValueError, match="has format version 7"):  # rather than take an older one
        store.newest()
    with pytest.raises(ValueError, match="has format version 7"):
        find_newest(tmp_path)


def test_parameters_are_matched_by_name(tmp_path: Path) -> None:
    """The order within a group may differ, not the group."""
    state, store = make_state(), open_store(tmp_path)
    train(state, 2)
    store.save(state, step=2, config="")
    other = make_state()
    for group in other.optimizers[0].param_groups:
        group["params"].reverse()
    store.load(tmp_path / "step-00000002", other)
    own, loaded = (dict(each.model.named_parameters()) for each in (state, other))
    for name, parameter in own.items():
        expected, found = state.optimizers[0].state[parameter], other.optimizers[0].state[loaded[name]]
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    groups = other.optimizers[0].param_groups
    groups[0]["params"].append(groups[1]["params"].pop())
    with pytest.raises(ValueError, match=r"of group 1 and shape .* in the checkpoint, of group 0 and shape"):
        store.load(tmp_path / "step-00000002", other)


def test_random_states_of_processes_that_were_not_there() -> None:
    seed()
    states = random_states()

    def drawn(rank: int) -> tuple[float, float, float]:
        derive_random_states(states, rank)
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002 - what data code shares

    assert drawn(4) == drawn(4)
    assert len({value for rank in range(2, 6) for value in drawn(rank)}) == 12
    restore_random_states(states)
    again = (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002 - likewise
    seed()
    assert again == (torch.rand(1).item(), np.random.rand(), random.random())  # noqa: NPY002 - likewise


def test_the_manifest_says_what_wrote_it(tmp_path: Path) -> None:
    open_store(tmp_path).save(make_state(), step=4, config="", score=1.5)
    manifest = Manifest.read(tmp_path / "step-00000004")
    assert (manifest.step, manifest.score, manifest.world_size, manifest.engine) == (4, 1.5, 1, "torch")
    assert manifest.model == "GPT2"
    assert manifest.versions["torch"] == version("torch")
    assert set(manifest.files) == set(names(tmp_path / "step-00000004")) - {"manifest.json"}
    raw = json.loads((tmp_path / "step-00000004" / "manifest.json").read_text())
    assert (raw["format"], raw["format_version"]) == ("model_center.checkpoint", 1)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000005")  # a copy is a checkpoint as well
    assert not find_newest(tmp_path, verify=True).damaged
