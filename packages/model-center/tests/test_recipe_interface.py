"""The public names, which are imported on first use."""

import subprocess
import sys

from model_center import recipe

PROGRAM = """
import sys
from model_center.recipe import PretrainConfig
print(PretrainConfig.__name__, "torch" in sys.modules, "transformers" in sys.modules)
"""


def test_every_public_name_is_there() -> None:
    assert "pretrain" in recipe.__all__
    assert all(getattr(recipe, name) is not None for name in recipe.__all__)


def test_configurations_need_no_pytorch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "PretrainConfig False False\n"
