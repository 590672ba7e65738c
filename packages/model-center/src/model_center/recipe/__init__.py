"""Training recipes and the model-center command.

Names are imported on first use, so that the command's `--help` does not wait for PyTorch and Transformers. Which ones
there are, and from where, is told by the stub beside this file.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("model-center")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
