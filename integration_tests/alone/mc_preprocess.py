"""The tools import without torch and the command explains itself, with mc-preprocess and what it needs installed."""

import subprocess
import sys
from pathlib import Path

from model_center.tools import indexed_dataset

assert indexed_dataset.make_builder
shown = subprocess.run([Path(sys.executable).parent / "mc-preprocess", "--help"], capture_output=True, text=True)
assert shown.returncode == 0, shown.stderr
assert "mc-preprocess" in shown.stdout
assert "torch" not in sys.modules
