"""Read and write GGUF files, and read the tensors of a transformers folder.

Invariant: unchanged metadata is copied byte for byte. The `gguf` package's reader does not keep the bytes and takes two
seconds for a header of 100,000 strings (here 0.1 s), so only its block formats are used. Imports no torch, which
serving does not need.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cotree.base.errors import CotreeError, UsageError
from cotree.models.settings import GGUFType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
# {type of the matrices: `general.file_type`}
FILE_TYPES: dict[GGUFType, int] = {"F32": 0, "F16": 1, "Q8_0": 7}
# numpy has no BF16 (the upper half of a float32), so it is read as uint16.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a file: `shape` as in numpy (rows first), `kind` its ggml type, `offset` from the data's start."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUF:
    """The header of a GGUF file: metadata and `tensors` by name.

    values: {key: number, bool, string, or list of these}. fields: {key: the raw bytes, type first}.

    Raises:
        UsageError: the file is missing or not a GGUF of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        self.fields: dict[str, bytes] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file)
        except (OSError, ValueError, KeyError, OverflowError, MemoryError, struct.error) as error:
            raise UsageError(f"cannot read {path} as GGUF: {error}") from error

    def _read_header(self, file: BinaryIO) -> None:
        magic, version, tensors, fields = _unpack(file, "4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("no GGUF header of version 2 or 3 (a git-lfs pointer, or half a download?)")
        for _ in range(fields):
            key, start = _read_string(file), file.tell()
            self.values[key] = _read_value(file, *_unpack(file, "I"))
            size = file.tell() - start
            file.seek(start)
            self.fields[key] = file.read(size)
        for _ in range(tensors):
            name = _read_string(file)
            *dims, kind, offset = _unpack(file, f"{_unpack(file, 'I')[0]}QIQ")
            self.tensors[name] = GGUFTensor(tuple(reversed(dims)), kind, offset)
        self.alignment = int(self.get("general.alignment", 32))
        self._data_start = file.tell() + -file.tell() % self.alignment

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, or a default."""
        return self.values.get(key, default)

    def __getitem__(self, key: str) -> Any:
        """The value of a required metadata key.

        Raises:
            UsageError: it is missing.
        """
        if key not in self.values:
            raise UsageError(f"{self.path} has no {key} in its metadata")
        return self.values[key]

    def array(self, name: str) -> np.ndarray:
        """A tensor as float32, dequantised."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        rows = quant_shape_to_byte_shape(tensor.shape, kind)
        raw = np.memmap(self.path, np.uint8, "r", self._data_start + tensor.offset, rows)
        values: np.ndarray = dequantize(raw, kind)
        return values.reshape(tensor.shape)


def write_gguf(
    path: Path,
    fields: Mapping[str, bytes],
    kind: GGUFType,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    alignment: int = 32,
) -> None:
    """Write a GGUF file (version 3), quantizing matrices to `kind` and vectors to F32.

    Args:
        path: overwritten.
        fields: the metadata, as in `GGUF.fields`.
        alignment: of the tensors, as in the metadata.
        shapes: {name: shape} of the tensors, in the file's order.
        read: loads a tensor as float32; called once per tensor, in order, so that memory holds one at a time.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape, quantize

    fields = {**fields, "general.file_type": struct.pack("<II", _UINT32, FILE_TYPES[kind])}
    fields.setdefault("general.quantization_version", struct.pack("<II", _UINT32, 2))
    header = [struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(fields))]
    header += [_pack_string(key) + raw for key, raw in fields.items()]
    kinds = {name: GGMLQuantizationType[kind if len(shape) > 1 else "F32"] for name, shape in shapes.items()}
    offset = 0
    for name, shape in shapes.items():
        layout = f"<I{len(shape)}QIQ"
        header += [_pack_string(name), struct.pack(layout, len(shape), *reversed(shape), kinds[name], offset)]
        size = prod(quant_shape_to_byte_shape(shape, kinds[name]))
        offset += size + -size % alignment
    with path.open("wb") as file:
        file.write(b"".join(header))
        for name in shapes:
            file.write(bytes(-file.tell() % alignment))
            file.write(quantize(read(name), kinds[name]).tobytes())
        file.write(bytes(-file.tell() % alignment))


def weight_files(folder: Path) -> list[Path]:
    """A folder's weight files as transformers chooses them: `model.safetensors`, else all files (existing or not) in
    `model.safetensors.index.json`, else none.

    Raises:
        UsageError: the index is damaged.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    try:
        return [folder / name for name in sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UsageError(f"{index} is no index of weights ({error}); copy it again") from None


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """{name: tensor} of a transformers folder, memory-mapped; BF16 as uint16.

    Raises:
        UsageError: the index of the weight files is damaged.
        CotreeError: a file is damaged, or has a tensor that is not floating-point.
    """
    found = {}
    for path in weight_files(folder):
        try:
            data = np.memmap(path, mode="r")
            start = 8 + int(data[:8].view("<u8")[0])
            header = json.loads(bytes(data[8:start]))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = (start + offset for offset in entry["data_offsets"])
                found[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except (OSError, ValueError, LookupError) as error:
            raise CotreeError(f"cannot read {path} as safetensors of floating point: {error}") from error
    return found


def as_float32(values: np.ndarray) -> np.ndarray:
    """Convert a tensor from `stored_tensors` to float32."""
    if values.dtype == np.uint16:  # BF16
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def packed(value: Any) -> bytes:
    """Encode a metadata value with its type: a bool, number, string, or list of integers or strings."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_string(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_pack_string, value))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)


def _pack_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    """Read little-endian values in a `struct` format."""
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_string(file: BinaryIO) -> str:
    """Read a string; bytes that are not UTF-8 (in some vocabularies) become lone surrogates."""
    return file.read(_unpack(file, "Q")[0]).decode("utf-8", "surrogateescape")


def _read_value(file: BinaryIO, kind: int) -> Any:
    """Read a metadata value of type `kind`."""
    if kind == _STRING:
        return _read_string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    element, count = _unpack(file, "IQ")
    if element in _SCALARS:
        return list(_unpack(file, f"{count}{_SCALARS[element]}"))
    return [_read_value(file, element) for _ in range(count)]
