"""PyTorch for the parts of this package that need it, or an error that says how to install it."""

try:
    import torch as torch
    import torch.distributed
    import torch.utils.data  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        'the loader and the task data sets need PyTorch: pip install "mc-data[torch]" (indexed data sets do not)'
    ) from error
