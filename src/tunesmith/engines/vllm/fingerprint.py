"""Recognises a base on a server by the token ids of a fixed text and their log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.core.system.files import write_atomic
from tunesmith.engines.hf.libraries import transformers
from tunesmith.models.base import Base, cache_folder
from tunesmith.models.rendering import Renderer

# Words, numbers, code and other scripts, in which tokenizers and models differ.
TEXT = (
    'The quick brown fox jumps over 13 lazy dogs, then writes {"on": true, "n": 2048} into a file.\n'
    "def area(r):\n    return 3.14159 * r ** 2\n\nÄpfel fallen nicht weit vom Stamm; 水は低きに流れる。 "
    "Water boils at one hundred degrees Celsius, and the capital of France is Paris."
)
# Largest accepted mean difference in nats. Two bf16 computations of one model differ less; two models differ several
# times as much.
TOLERANCE = 0.15


def text_ids(renderer: Renderer) -> list[int]:
    """The fixed text in the base's tokens."""
    return list(renderer.tokenizer.encode(TEXT, add_special_tokens=False))


def places(ids: Sequence[int]) -> range:
    """The indices of ids that are compared: about two dozen, evenly spread."""
    return range(1, len(ids), max(1, len(ids) // 24))


@torch.inference_mode()
def expected_scores(base: Base, ids: Sequence[int]) -> list[float]:
    """The base's log-probabilities of the ids at places(). Computed once for a base and kept in the cache."""
    kept = cache_folder() / "fingerprints" / f"{base.digest.removeprefix('sha256:')}.json"
    if kept.is_file():
        known = json.loads(kept.read_bytes())
        if known["ids"] == list(ids):
            return [float(score) for score in known["scores"]]
    scores = _logits(base, ids).float().log_softmax(-1)
    each = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()  # of every id but the first
    found = [float(each[place - 1]) for place in places(ids)]
    write_atomic(kept, json.dumps({"ids": list(ids), "scores": found}).encode())
    return found


def _logits(base: Base, ids: Sequence[int]) -> Tensor:
    """Logits at every id but the last, by transformers' module in fp32. On the CPU: a GPU's memory is vLLM's."""
    load = transformers().AutoModelForCausalLM.from_pretrained
    module = load(base.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    found: Tensor = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return found


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean difference of two models' log-probabilities of the same tokens, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
