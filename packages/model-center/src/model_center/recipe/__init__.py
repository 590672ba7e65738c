"""Training recipes and the model-center command."""

from importlib.metadata import version

__version__ = version("model-center")
__all__ = ["__version__"]
