"""Read and write GGUF files, and read the tensors of a transformers folder.

Invariant: metadata that nobody changes is copied byte for byte. The `gguf` package's reader keeps no such bytes and
takes two seconds for a header of 100,000 strings, which are read in a tenth of a second here; its block formats are
used. Nothing here needs torch, which whoever only serves a model need not have.
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
# The number that `general.file_type` gives a type of the matrices.
FILE_TYPES: dict[GGUFType, int] = {"F32": 0, "F16": 1, "Q8_0": 7}
# numpy knows no BF16, which is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a file: `shape` as in numpy (rows first), `kind` its ggml type, `offset` from the data's start."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUF:
    """The header of a GGUF file: metadata and `tensors` by name.

    values: key -> a number, a bool, a string, or a list of these. fields: key -> the same as the file has it, encoded
    with its type first.

    Raises:
        UsageError: the file is missing or is no GGUF of version 2 or 3.
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
        """The value of a metadata key: a number, a bool, a string, or a list of these."""
        return self.values.get(key, default)

    def __getitem__(self, key: str) -> Any:
        """The value of a metadata key that the file must have.

        Raises:
            UsageError: it does not.
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
    """Write a GGUF file (version 3), its matrices at a type and its vectors in F32.

    Args:
        path: overwritten.
        fields: the metadata, as in `GGUF.fields`.
        alignment: of the tensors, as the metadata say.
        shapes: of the tensors, by name, in the file's order.
        read: gives a tensor as float32; called once for each, in order, so that one is in memory at a time.
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
    """The files that hold a folder's tensors, as transformers chooses them: `model.safetensors`, else those that
    `model.safetensors.index.json` names, whether they are there or not; none where the folder has neither.

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
    """The tensors of a transformers folder, by name, on disk until they are used; BF16 as uint16.

    Raises:
        UsageError: the index of the weights' files is damaged.
        CotreeError: a file is damaged, or has a tensor that is not of floating point.
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
    """The values of a tensor from `stored_tensors`, of whatever type, in float32."""
    if values.dtype == np.uint16:  # BF16
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def packed(value: Any) -> bytes:
    """A metadata value as a file has it, its type first: a bool, number, string, or list of integers or strings."""
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
    """The next values of a file, little-endian, by their `struct` letters."""
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_string(file: BinaryIO) -> str:
    """The string that comes next; bytes that are no UTF-8 (some vocabularies have them) become lone surrogates."""
    return file.read(_unpack(file, "Q")[0]).decode("utf-8", "surrogateescape")


def _read_value(file: BinaryIO, kind: int) -> Any:
    """The metadata value of type `kind` that comes next."""
    if kind == _STRING:
        return _read_string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    element, count = _unpack(file, "IQ")
    if element in _SCALARS:
        return list(_unpack(file, f"{count}{_SCALARS[element]}"))
    return [_read_value(file, element) for _ in range(count)]
