"""Writes tensors as a safetensors file without copying them in memory first, and reads rows of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.core.digests import digest_pieces
from tunesmith.engines.ranks import first_row, held

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors to a safetensors file and sync it to the disk; returns the digest of its bytes.

    The safetensors library copies all tensors into memory once more before it writes them, and they may be most of the
    memory that there is. metadata: at most one key, so that the same input gives the same bytes as with the library.
    Wide numbers come first, so that all of them are aligned.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    with path.open("wb") as stream:
        digest = digest_pieces(_pieces(tensors, metadata), stream)
        stream.flush()
        os.fsync(stream.fileno())
    return digest


class SavedTensors:
    """Tensors in safetensors files: each in one of them, or its rows in several, in the files' order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[Any] = [safe_open(str(path), framework="pt") for path in paths]
        self._names = [frozenset(file.keys()) for file in self._files]

    def __contains__(self, name: str) -> bool:
        return name in self._names[0]

    @torch.no_grad()
    def like(self, name: str, other: Tensor) -> Tensor:
        """The tensor of this name on other's device, sharded over the ranks as other is, with other's shape and dtype.
        Only this rank's rows are read."""
        found = torch.empty_like(other, requires_grad=False)
        mine = held(found)
        if not mine.dim():
            return found.copy_(self._files[0].get_tensor(name))
        first, at = first_row(other), 0
        for file, names in zip(self._files, self._names, strict=True):
            part = file.get_slice(name) if name in names else None
            rows = 0 if part is None else part.get_shape()[0]
            low, high = max(first, at), min(first + len(mine), at + rows)
            if part is not None and low < high:
                mine[low - first : high - first] = part[low - at : high - at]
            at += rows
        return found


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    """The header's length, the header, and each tensor's bytes."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the numbers after it are aligned
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
