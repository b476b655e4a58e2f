"""Writes tensors as a safetensors file without copying them in memory first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

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
    hasher = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in _pieces(tensors, metadata):
            hasher.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return f"sha256:{hasher.hexdigest()}"


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
