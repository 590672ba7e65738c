"""Checkpoints: atomic writes, strict loading, one error for all problems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center import engine as bmt
from model_center.engine import atomic_write, compare_states

# Savers are forked: importing torch for each would take most of the test's time.
KILLED_SAVERS = """
import os, pathlib, random, signal, sys, time, torch
from model_center import engine as bmt

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
model, other = torch.nn.Linear(1000, 1000), torch.nn.Linear(1000, 1000)
delays = random.Random(0)
number = 1

def save(number):
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, number)
    bmt.save(model, folder / "model.pt")

save(number)
for _ in range(25):
    saver = os.fork()
    if saver == 0:
        while True:
            number += 1
            save(number)
    time.sleep(delays.uniform(0.005, 0.06))
    os.kill(saver, signal.SIGKILL)
    os.waitpid(saver, 0)
    bmt.load(other, folder / "model.pt")
    found = {value for parameter in other.parameters() for value in parameter.unique().tolist()}
    assert len(found) == 1 and min(found) >= number, (found, number)
    number = int(found.pop())
print(number)
"""
pytestmark = pytest.mark.usefixtures("cpu_engine")


def test_what_is_saved_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    bmt.save(model, tmp_path / "model.pt")
    assert not bmt.load(other, str(tmp_path / "model.pt"))
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert list(torch.load(tmp_path / "model.pt", weights_only=True)) == list(model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_loading_converts_the_data_type(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    bmt.save(model, tmp_path / "model.pt")
    half = torch.nn.Linear(3, 4).half()
    bmt.load(half, tmp_path / "model.pt")
    assert half.weight.dtype is torch.float16
    assert torch.equal(half.weight, model.weight.half())


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_SAVERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1, "no saver got to the end of a save"
    names = [path.name for path in tmp_path.iterdir()]
    unfinished = [name for name in names if name != "model.pt"]
    assert unfinished, "no saver was killed while it wrote"
    assert all(name.startswith(".model.pt.") for name in unfinished)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_links_and_usual_permissions(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_directory_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the directory of .*nowhere/model.pt does not exist"):
        bmt.save(torch.nn.Linear(1, 1), tmp_path / "nowhere" / "model.pt")
    with pytest.raises(FileNotFoundError, match=r"absent.pt"):
        bmt.load(torch.nn.Linear(1, 1), tmp_path / "absent.pt")


def test_all_problems_are_told_in_one_error_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2), "c": torch.nn.Linear(2, 2)})
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(3, 2), "d": torch.nn.Linear(2, 2)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bmt.save(source, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not fit this ModuleDict") as caught:
        bmt.load(model, tmp_path / "model.pt")
    assert str(caught.value).splitlines()[1:] == [
        "  missing: c.weight",
        "  missing: c.bias",
        "  unexpected: d.weight",
        "  unexpected: d.bias",
        "  wrong shape: b.weight is (2, 3), must be (2, 2)",
    ]
    assert "model.pt" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_loading_loosely_tells_what_was_left_out_and_still_refuses_wrong_shapes(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "c": torch.nn.Linear(2, 2)})
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "d": torch.nn.Linear(2, 2)})
    bmt.save(source, tmp_path / "model.pt")
    mismatch = bmt.load(model, tmp_path / "model.pt", strict=False)
    assert mismatch.missing == ("c.weight", "c.bias")
    assert mismatch.unexpected == ("d.weight", "d.bias")
    assert torch.equal(model["a"].weight, source["a"].weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"wrong shape: a.weight is \(2, 2\), must be \(2, 5\)"):
        bmt.load(torch.nn.ModuleDict({"a": torch.nn.Linear(5, 2)}), tmp_path / "model.pt", strict=False)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo this must not run",)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    bmt.save(model, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    for name in ("cut", "empty", "text", "evil"):
        with pytest.raises(ValueError, match=f"{name}.pt is not a complete checkpoint"):
            bmt.load(model, tmp_path / f"{name}.pt")
    for name in ("list", "numbers"):
        with pytest.raises(ValueError, match=f"{name}.pt must hold a dictionary of tensors"):
            bmt.load(model, tmp_path / f"{name}.pt")


shapes = st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(1, 3), max_size=2).map(torch.Size), max_size=6)


@settings(deadline=None)
@given(expected=shapes, found=shapes)
def test_compare_states_finds_every_difference(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    mismatch = compare_states(expected, found)
    assert set(mismatch.missing) == expected.keys() - found.keys()
    assert set(mismatch.unexpected) == found.keys() - expected.keys()
    both = expected.keys() & found.keys()
    assert dict(mismatch.misshaped or {}) == {
        name: (expected[name], found[name]) for name in both if expected[name] != found[name]
    }
    assert bool(mismatch) == (expected != found)
    lines = str(mismatch).splitlines()
    assert len(lines) == len(mismatch.missing) + len(mismatch.unexpected) + len(mismatch.misshaped or {})
