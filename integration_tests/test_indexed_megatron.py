"""Files move both ways between this reader and writer and Megatron-core's own, from the registry."""

import json
import os
import site
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from workspace_uv import find_uv, uv_environment

from model_center.dataset.indexed import MMapIndexedDataset, make_builder, repair_dataset

ROOT = Path(__file__).resolve().parents[1]
VERSION = "megatron-core==0.16.1"
ITEMS = [[5, 6, 7], [8], [], [9, 10], [60000]]

SCRIPT = """
import json, sys, numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder, items = sys.argv[1], json.loads(sys.argv[2])
seen = {}
for dtype in ("uint8", "int32", "int64", "uint16", "float32", "float64"):
    builder = IndexedDatasetBuilder(f"{folder}/theirs_{dtype}.bin", dtype=getattr(numpy, dtype))
    for i, item in enumerate(items):
        builder.add_item(torch.tensor([value % 200 for value in item]))
        if i in (1, 4):
            builder.end_document()
    builder.finalize(f"{folder}/theirs_{dtype}.idx")
    dataset = IndexedDataset(f"{folder}/ours_{dtype}")
    seen[dtype] = [[item.tolist() for item in dataset], dataset.document_indices.tolist(), str(dataset[0].dtype)]
seen["repaired"] = [[item.tolist() for item in IndexedDataset(f"{folder}/repaired")]]
print("seen", json.dumps(seen))
"""


@pytest.mark.registry
def test_files_move_both_ways(tmp_path: Path) -> None:
    uv = find_uv(ROOT)
    assert uv is not None, "needs uv"
    environment = os.environ | uv_environment(ROOT)
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run(
        [uv, "venv", "-q", "--python", sys.executable, tmp_path / "environment"], env=environment, check=True
    )
    subprocess.run([uv, "pip", "install", "-q", "--python", python, "--no-deps", VERSION], env=environment, check=True)
    # What Megatron-core needs, PyTorch above all, is in this environment already.
    (borrowed,) = (path for path in site.getsitepackages() if path.endswith("site-packages"))
    (installed,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (installed / "borrow.pth").write_text(f"{borrowed}\n")

    for dtype in ("uint8", "int32", "int64", "uint16", "float32", "float64"):
        with make_builder(tmp_path / f"ours_{dtype}", dtype=dtype) as builder:
            for i, item in enumerate(ITEMS):
                builder.add_item(np.array([value % 200 for value in item], dtype=np.int64))
                if i in (1, 4):
                    builder.end_document()
    with warnings.catch_warnings(action="ignore"), make_builder(tmp_path / "repaired") as builder:
        builder.add_item([1])
        builder.end_document()
        builder.add_item([2])
    repair_dataset(tmp_path / "repaired")

    command = [str(python), "-W", "ignore", "-c", SCRIPT, str(tmp_path), json.dumps(ITEMS)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.partition("seen ")[2])
    assert seen.pop("repaired") == [[[1], [2]]]
    expected = [[value % 200 for value in item] for item in ITEMS]
    for dtype, (items, documents, name) in seen.items():
        assert (items, documents, name) == (expected, [0, 2, 5], dtype)
        theirs = MMapIndexedDataset(tmp_path / f"theirs_{dtype}")
        assert [item.tolist() for item in theirs] == expected
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"ours_{dtype}{suffix}").read_bytes() == (
                tmp_path / f"theirs_{dtype}{suffix}"
            ).read_bytes()
