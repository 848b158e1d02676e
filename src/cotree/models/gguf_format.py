"""Read and write GGUF files: the header in one pass, tensors one at a time.

Invariant: metadata that nobody changes is copied byte for byte, so that vocabulary, merges and the chat template
of an exported student are those of its base. Values are decoded only when asked for: a header with 100,000 strings is
read in a tenth of a second. Needs numpy and `gguf` (for the block formats), no torch.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cotree.base.errors import UsageError
from cotree.models.settings import GGUFType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_UINT32, _F32 = 4, 0
# The ggml type of the matrices, and the number that `general.file_type` gives it.
_GGUF_TYPES: dict[GGUFType, tuple[int, int]] = {"F32": (_F32, 0), "F16": (1, 1), "Q8_0": (8, 7)}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `shape` as numpy has it (rows first), `kind` its ggml type, `offset` in the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUF:
    """The header of a GGUF file: `fields` (key -> encoded value, its type first) and `tensors` by name.

    Raises:
        UsageError: the file is missing or is no GGUF of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, bytes] = {}
        self.tensors: dict[str, Tensor] = {}
        try:
            with path.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
                self._read(data)
        except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path} as GGUF: {error}") from error

    def _read(self, data: mmap.mmap) -> None:
        magic, version, tensors, fields = struct.unpack_from("<4sIQQ", data, 0)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("no GGUF header of version 2 or 3 (a git-lfs pointer, or half a download?)")
        at = 24
        for _ in range(fields):
            key, at = _string(data, at)
            end = _skip(data, at + 4, *struct.unpack_from("<I", data, at))
            self.fields[key] = data[at:end]
            at = end
        table = []
        for _ in range(tensors):
            name, at = _string(data, at)
            (rank,) = struct.unpack_from("<I", data, at)
            *dims, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, at + 4)
            at += 4 + 8 * rank + 12
            table.append((name, tuple(reversed(dims)), kind, offset))
        start = _aligned(at, self.alignment)
        self.tensors = {name: Tensor(shape, kind, start + offset) for name, shape, kind, offset in table}

    @property
    def alignment(self) -> int:
        """The number of bytes at whose multiples tensor data starts."""
        return int(self.get("general.alignment", 32))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key: a number, a bool, a string, or a list of these."""
        if key not in self.fields:
            return default
        raw = self.fields[key]
        return _decode(raw, 4, *struct.unpack_from("<I", raw, 0))

    def __getitem__(self, key: str) -> Any:
        """The value of a metadata key that the file must have.

        Raises:
            UsageError: it does not.
        """
        value = self.get(key)
        if value is None:
            raise UsageError(f"{self.path} has no {key} in its metadata")
        return value

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        block, size = GGML_QUANT_SIZES[kind]
        count = prod(tensor.shape) // block * size
        rows = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, (count,))
        values: np.ndarray = dequantize(raw.reshape(rows), kind)
        return values.reshape(tensor.shape)


def is_at_type(file: GGUF, kind: GGUFType) -> bool:
    """Whether the matrices of a file are of a type."""
    return bool(file.get("general.file_type") == _GGUF_TYPES[kind][1])


def write_at_type(
    path: Path,
    base: GGUF,
    kind: GGUFType,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    values: Callable[[str], np.ndarray] | None = None,
) -> None:
    """Write a GGUF file with the metadata of `base`, its matrices at a type and its vectors in F32.

    Args:
        path: overwritten.
        shapes: of the tensors by name, by default those of `base`.
        values: gives a tensor as float32, by default that of `base`; called once for each, in order, so that one is in
            memory at a time.
    """
    matrices, number = _GGUF_TYPES[kind]
    fields = base.fields | {"general.file_type": _encode(_UINT32, number)}
    fields.setdefault("general.quantization_version", _encode(_UINT32, 2))
    shapes = shapes or {name: tensor.shape for name, tensor in base.tensors.items()}
    tensors = {name: (shape, matrices if len(shape) > 1 else _F32) for name, shape in shapes.items()}
    write_gguf(path, fields, tensors, values=values or base.array, alignment=base.alignment)


def write_gguf(
    path: Path,
    fields: Mapping[str, bytes],
    tensors: Mapping[str, tuple[tuple[int, ...], int]],
    *,
    values: Callable[[str], np.ndarray],
    alignment: int,
) -> None:
    """Write a GGUF file (version 3).

    Args:
        path: overwritten.
        fields: metadata by key, encoded with the type first (`GGUF.fields`).
        tensors: name -> (shape, ggml type F32, F16 or Q8_0).
        values: gives a tensor as float32; called once for each, in order.
        alignment: what `fields` says, or 32.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))]
    for key, raw in fields.items():
        header += [_pack_string(key), raw]
    offset = 0
    for name, (shape, kind) in tensors.items():
        dims = tuple(reversed(shape))
        header += [_pack_string(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)]
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        offset += _aligned(prod(shape) // block * size, alignment)
    weights = (quantize(values(name), GGMLQuantizationType(kind)).tobytes() for name, (_, kind) in tensors.items())
    with path.open("wb") as file:
        for raw in chain([b"".join(header)], weights):
            file.write(raw)
            file.write(bytes(-len(raw) % alignment))


def _encode(kind: int, value: float) -> bytes:
    """A scalar metadata value encoded as in a file, its type first."""
    return struct.pack(f"<I{_SCALARS[kind]}", kind, value)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pack_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _string(data: bytes | mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    return data[at + 8 : end].decode(), end


def _skip(data: mmap.mmap, at: int, kind: int) -> int:
    """Where the value of type `kind` that starts at `at` ends."""
    if kind == _STRING:
        return int(at + 8 + struct.unpack_from("<Q", data, at)[0])
    if kind != _ARRAY:
        return at + _width(kind)
    element, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if element not in (_STRING, _ARRAY):
        return int(at + count * _width(element))
    for _ in range(count):
        at = _skip(data, at, element)
    return at


def _decode(raw: bytes, at: int, kind: int) -> Any:
    if kind == _STRING:
        return _string(raw, at)[0]
    if kind != _ARRAY:
        return struct.unpack_from(f"<{_SCALARS[kind]}", raw, at)[0]
    element, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    if element != _STRING:
        return list(struct.unpack_from(f"<{count}{_SCALARS[element]}", raw, at))
    values = []
    for _ in range(count):
        value, at = _string(raw, at)
        values.append(value)
    return values


def _width(kind: int) -> int:
    if kind not in _SCALARS:
        raise ValueError(f"metadata of an unknown type {kind}")
    return struct.calcsize(f"<{_SCALARS[kind]}")
