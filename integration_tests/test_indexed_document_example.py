"""Section 1.5's own example runs, and `mc-preprocess tokenize --encoder cpm1` gives the same data."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from model_center.dataset import DistributedMMapIndexedDataset
from model_center.tools import CPM1Encoder, tokenize_files

EXAMPLE = Path(__file__).parent / "indexed_document_example.py"


def test_the_documents_example_runs(shared_dir: Path, tmp_path: Path) -> None:
    vocabulary = shared_dir / "data" / "modelcenter_configs" / "cpm1" / "cpm1-large" / "vocab.txt"
    (tmp_path / "vocab.txt").write_text(vocabulary.read_text())
    poems = (shared_dir / "data" / "corpora" / "zh" / "quan_tang_shi_0-6k.txt").read_text().split("\n\n")[:60]
    lines = ["<n>".join(poem.split("\n")) for poem in poems]
    for i in range(3):
        (tmp_path / f"data_{i + 1}.txt").write_text("".join(f"{line}\n" for line in lines[i * 20 : i * 20 + 20]))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    shown = Counter(done.stdout.splitlines())

    inputs = [tmp_path / f"data_{i}.txt" for i in (1, 2, 3)]
    encoder = CPM1Encoder(str(tmp_path / "vocab.txt"), append_eod=False)
    tokenize_files(inputs, tmp_path / "ours", encoder)
    ours = DistributedMMapIndexedDataset(tmp_path, "ours", 0, 1)
    assert shown == Counter(" ".join(map(str, item)) for item in ours)
    assert sum(shown.values()) > 30
