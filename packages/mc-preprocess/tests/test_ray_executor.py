"""The same bytes from a Ray cluster, also when one of its nodes is killed in the middle of a run."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_center.tools import Counts, InputError, RayExecutor, ReadOptions, WorkerDiedError, tokenize_files

ray: Any = pytest.importorskip("ray", reason="needs the extra ray")
OPTIONS = ReadOptions(part_bytes=2000)

pytestmark = pytest.mark.slow


class SlowEncoder:
    """Takes long enough for a node to be killed at work."""

    provenance = {"encoder": {"name": "slow"}}  # noqa: RUF012  # as an encoder of a user would have it

    def encode(self, line: str) -> list[list[int]]:
        time.sleep(0.005)
        if line == "fail":
            raise ValueError("a bad word")
        return [list(line.encode())]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster: Any = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class KillsNode:
    """Kills the second node when some parts are done."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.parts = 0
        self.killer: threading.Thread | None = None

    def started(self, total_bytes: int, done: Counts) -> None:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2

    def advanced(self, counts: Counts) -> None:
        self.parts += 1
        if self.parts == 4:
            (second,) = self.cluster.worker_nodes
            self.killer = threading.Thread(target=self.cluster.remove_node, args=(second, False))
            self.killer.start()


def test_a_failing_line_is_named(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.txt").write_text("good\nfail\n")
    with pytest.raises(InputError, match=r"^bad\.txt:2: the encoder failed with ValueError: a bad word$"):
        tokenize_files(["bad.txt"], "out", SlowEncoder(), executor=RayExecutor(2))


def test_a_killed_node_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    text = tmp_path / "data.txt"
    text.write_text("".join(f"line {i}\n" for i in range(3000)))
    watcher = KillsNode(cluster)
    counts = tokenize_files(
        [text], tmp_path / "ray", SlowEncoder(), options=OPTIONS, executor=RayExecutor(2), watcher=watcher
    )
    assert watcher.killer is not None
    watcher.killer.join()
    deadline = time.monotonic() + 60
    while len([node for node in ray.nodes() if node["Alive"]]) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert counts.documents == 3000
    SlowEncoder.encode = lambda self, line: [list(line.encode())]  # type: ignore[method-assign]
    tokenize_files([text], tmp_path / "local", SlowEncoder(), options=OPTIONS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ray_1{suffix}").read_bytes() == (tmp_path / f"local_1{suffix}").read_bytes()


def test_arguments() -> None:
    assert issubclass(WorkerDiedError, RuntimeError)
    with pytest.raises(ValueError, match="`workers` must be at least 1"):
        RayExecutor(0)
