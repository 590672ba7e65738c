"""A data set of 20 GB, most of it a hole in the file, read in little memory."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model_center.dataset.indexed.format import IndexHeader, pointers_from_sizes

READ = """
import resource, sys
import numpy as np
from model_center.dataset.indexed import MMapIndexedDataset, make_builder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = MMapIndexedDataset(sys.argv[1])
kept = dataset[12345]
chosen = np.random.default_rng(0).integers(0, len(dataset), 3000)
total = sum(int(dataset[number][0]) for number in chosen.tolist())
total += sum(int(sequence[-1]) for some in chosen.reshape(-1, 100) for sequence in dataset.gather(some))
total += sum(int(dataset[number].max()) for number in range(130_000))  # half a GB in order
assert (total, int(kept[0])) == (12, 12)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_sparse_20_gb_data_set_needs_little_memory(tmp_path: Path) -> None:
    sequences, length = 5_000_000, 2048
    dtype = np.dtype("<u2")
    sizes = np.full(sequences, length, dtype="<i4")
    with (tmp_path / "sparse.idx").open("wb") as index:
        index.write(IndexHeader(dtype, sequences, 2).pack())
        for part in (sizes, pointers_from_sizes(sizes, dtype), np.array([0, sequences])):
            index.write(part.astype(part.dtype.newbyteorder("<")).tobytes())
    with (tmp_path / "sparse.bin").open("wb") as data:
        data.seek(12345 * length * 2)
        data.write(struct.pack("<H", 12))
        data.truncate(sequences * length * 2)
    assert (tmp_path / "sparse.bin").stat().st_size > 20e9
    command = [sys.executable, "-c", READ, str(tmp_path / "sparse")]
    kilobytes = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert kilobytes < 450 << 10
