"""The README's blocks run, in their order, and print what the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
WORDS = (
    "the lord of rings is an epic high fantasy novel by j r tolkien little prince i thought that was rich with a flower"
)
MORE_WORDS = "unique in all world hobbit hole ground there lived rose n < > - . , ##s"


def make_tokenizer(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*special, *WORDS.split(), *MORE_WORDS.split()])) + "\n")


def test_the_readme_runs(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {"sh", "python", "text"}
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    printed = ""
    for number, (kind, block) in enumerate(blocks):
        if kind == "text":
            assert printed == block
            continue
        script = tmp_path / f"block_{number}.{kind}"
        script.write_text(block)
        command = [sys.executable, script.name] if kind == "python" else ["bash", "-euo", "pipefail", script.name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        printed = done.stdout
    assert len((tmp_path / "shuffled.txt").read_text().splitlines()) == 3
    assert (tmp_path / "tokenized" / "part_3.idx").exists()
    assert (tmp_path / "lengths.png").exists()
