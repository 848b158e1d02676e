"""The tensors of a transformers folder, in one or several safetensors files, read one at a time without torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cotree.base.errors import CotreeError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `dtype` as the file names it, `offset` in bytes from the file's start."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The values as float32.

        Raises:
            CotreeError: the file is shorter than its header says, or the type is none of floating point.
        """
        if self.dtype not in _DTYPES:
            raise CotreeError(f"cannot read {self.path}: a tensor of type {self.dtype}; known: {', '.join(_DTYPES)}")
        try:
            raw = np.memmap(self.path, _DTYPES[self.dtype], "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise CotreeError(f"cannot read {self.path}: {error}") from error
        if self.dtype == "BF16":  # the upper half of a float32
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all `*.safetensors` files of a folder, by name.

    Raises:
        CotreeError: a file has no safetensors header.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, _ = entry["data_offsets"]
                found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + start)
        except (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError, MemoryError) as error:
            raise CotreeError(f"cannot read {path}: no safetensors header ({error})") from error
    return found
