"""The command explains its recipes, with model-center and what it needs installed."""

import subprocess
import sys
from pathlib import Path

command = Path(sys.executable).parent / "model-center"
shown = subprocess.run([command, "--help"], capture_output=True, text=True)
assert shown.returncode == 0, shown.stderr
assert "finetune" in shown.stdout
assert "quickstart" in shown.stdout
refused = subprocess.run([command, "finetune", "--no-such-option"], capture_output=True, text=True)
assert refused.returncode == 2, refused
assert "no-such-option" in refused.stderr
