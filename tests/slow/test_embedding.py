"""The packaged MiniLM: its vectors are those of the model's own library's recipe, and find what words alone do not."""

from pathlib import Path

import numpy as np
import pytest

from tunesmith.candidates.retrieval import Index
from tunesmith.core.errors import Refused
from tunesmith.models.embedding import Embedder, find_embedder, open_embedder

pytestmark = pytest.mark.slow
TEXTS = ["How do I get my money back?", "The store opens at nine.", "Refunds are paid within ten days.", "x " * 400]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return find_embedder()


def test_vectors_do_not_depend_on_what_they_are_made_with(embedder: Embedder, tmp_path: Path) -> None:
    together = embedder.embed(TEXTS, tmp_path)
    assert together.shape == (4, 384)
    assert np.allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.allclose(embedder.embed([text])[0], vector, atol=1e-5)
    assert np.array_equal(embedder.embed(TEXTS, tmp_path), together), "out of the kept file"


def test_meaning_is_found_where_no_word_is_shared(embedder: Embedder) -> None:
    # The model card's own measure is the cosine; a refund is money that comes back.
    index = Index(TEXTS[1:3], "dense", embedder.embed)
    assert index.nearest("How do I get my money back?", 1) == [1]


def test_another_model_than_the_one_evaluated_is_refused() -> None:
    with pytest.raises(Refused, match="differs from the one"):
        open_embedder("sha256:" + "0" * 64)
