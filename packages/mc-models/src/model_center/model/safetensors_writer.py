"""Writing safetensors files tensor by tensor, so that no more than one is held."""

import ctypes
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ENTRY_BYTES = 192
"""Room for one tensor's entry in the header besides its name: type, up to eight dimensions, two offsets."""


class SafetensorsWriter:
    """A `.safetensors` file that takes one tensor after another.

    The format (https://github.com/huggingface/safetensors) begins with a header that lists all tensors. Its room is
    reserved from the names that may come, and it is written, padded with blanks, when the file is closed.

    Args:
        path: the file.
        names: all names that may be added.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        room = _ENTRY_BYTES + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._header_bytes = -(-room // 8) * 8  # so that tensors are aligned
        self._file = path.open("wb")
        self._file.seek(8 + self._header_bytes)
        self._header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.data_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor, from any device.

        Raises:
            ValueError: the file format has no such type.
        """
        if tensor.dtype not in _CODES:
            raise ValueError(f"tensor {name!r} must be of a type that safetensors has, but is {tensor.dtype}")
        tensor = tensor.detach().cpu().contiguous()
        end = self.data_bytes + tensor.nbytes
        entry = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self.data_bytes, end]}
        self._header[name] = entry
        if tensor.nbytes:
            self._file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
        self.data_bytes = end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        """Writes the header and closes the file; after an error the file stays unreadable."""
        with self._file:
            if kind is None:
                header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._header_bytes)
                assert len(header) == self._header_bytes
                self._file.seek(0)
                self._file.write(len(header).to_bytes(8, "little") + header)
