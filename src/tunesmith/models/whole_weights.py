"""What the weights of a model trained in full must be before they are signed, and again before they are served.

The counterpart of adapters.py. That they have the base's own tensors is the engine's to check, which has them.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tunesmith.models.adapter_files import check_metadata, refusal

WHOLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TENSOR = re.compile(
    r"model\.embed_tokens\.weight|lm_head\.weight|model\.norm\.weight"
    r"|model\.layers\.\d{1,4}\.((self_attn|mlp)\.[a-z]_?[a-z_]{1,20}|[a-z_]{1,40}layernorm)\.(weight|bias)"
)
# A dtype's numbers as unsigned integers, and the bits that are all set in NaN and in an infinity alone.
_EXPONENTS: dict[str, tuple[Any, int]] = {
    "F32": (np.uint32, 0x7F800000),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}


def is_whole(folder: Path) -> bool:
    """Whether a training's folder holds a whole model's weights rather than an adapter's."""
    return (folder / WHOLE).is_file()


def check_whole(folder: Path, *, base: str, fingerprint: str) -> None:
    """Hold model.safetensors in folder against the base it must be of: digest of the base's record, fingerprint of its
    rendering. Raises Refused for another base, foreign tensors, other dtypes, NaN and infinities."""
    path = folder / WHOLE
    try:
        with safe_open(path, framework="numpy") as file:  # refuses headers that lie about sizes or offsets
            check_metadata(path, file.metadata() or {}, base, fingerprint)
            if not list(file.keys()):
                raise refusal(path, "there is no tensor in it")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
        for name in sorted(header.keys() - {"__metadata__"}):
            _check_tensor(path, name, header[name], data)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise refusal(path, f"not readable as safetensors: {error}") from error


def _check_tensor(path: Path, name: str, stated: dict[str, Any], data: np.ndarray) -> None:
    if _TENSOR.fullmatch(name) is None:
        raise refusal(path, f"{name[:120]!r} is no weight of a model that can be trained")
    if stated["dtype"] not in _EXPONENTS:
        raise refusal(path, f"{name} is {stated['dtype']}, weights are kept as {', '.join(_EXPONENTS)}")
    if len(stated["shape"]) not in (1, 2) or not math.prod(stated["shape"]):
        raise refusal(path, f"{name} has shape {stated['shape']}")
    kind, exponent = _EXPONENTS[stated["dtype"]]
    first, last = stated["data_offsets"]
    # Offsets are multiples of the number's size only where the writer took care: a copy is aligned in any case.
    numbers = np.frombuffer(data[first:last].tobytes(), dtype=kind)
    if ((numbers & exponent) == exponent).any():
        raise refusal(path, f"{name} holds NaN or an infinity")
