"""Passages with labels: who sees which, and that what a caller may not see changes nothing of what they get."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fabricate import example, put_base
from tunesmith.candidates.candidate import Candidate, Retrieve
from tunesmith.candidates.composing import Composer
from tunesmith.candidates.retrieval import Embed, PassageIndex, Vectors
from tunesmith.core.access import ANYONE, Caller, Labels
from tunesmith.core.scope import Scope
from tunesmith.data.documents import DocumentSettings, Passage, build_documents
from tunesmith.data.settings import Privacy
from tunesmith.store.store import Store

names = st.sampled_from(["", "a", "b"])
groups = st.lists(st.sampled_from(["g", "h", "i"]), max_size=2, unique=True).map(tuple)
labels = st.builds(Labels, tenant=names, region=names, groups=groups.map(lambda given: given or None))
callers = st.builds(lambda t, r, g: Caller(Scope(t, r), frozenset(g)), names, names, groups)
texts = st.lists(st.sampled_from(["red", "bench", "iron", "lamp", "garage"]), min_size=1, max_size=5).map(" ".join)
documents = st.lists(st.tuples(texts, labels), min_size=1, max_size=12)


def _may_see(label: Labels, caller: Caller) -> bool:
    """The rule, as the documentation says it."""
    if label.tenant and label.tenant != caller.scope.tenant:
        return False
    if label.region and label.region != caller.scope.region:
        return False
    return label.groups is None or any(group in caller.groups for group in label.groups)


def _passages(made: Sequence[tuple[str, Labels]]) -> list[Passage]:
    return [
        Passage(id=str(place), source=f"{place}.md", title="", text=text, labels=label)
        for place, (text, label) in enumerate(made)
    ]


def _embed(given_texts: Sequence[str]) -> Vectors:
    rows = [np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8) for text in given_texts]
    vectors = np.stack(rows).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@pytest.mark.parametrize(("by", "embed"), [("bm25", None), ("dense", _embed), ("fused", _embed)])
@settings(max_examples=40, deadline=None)
@given(documents, st.lists(callers, min_size=1, max_size=4), texts, st.integers(1, 6))
def test_a_caller_gets_what_an_index_of_their_passages_gives(
    by: str, embed: Embed | None, made: list[tuple[str, Labels]], asking: list[Caller], asked: str, k: int
) -> None:
    passages = _passages(made)
    shared = PassageIndex(passages, by, embed)
    for caller in asking:  # one after another, as on a server
        found = shared.nearest(asked, k, caller)
        visible = [passage for passage in passages if _may_see(passage.labels, caller)]
        assert len(found) == min(k, len(visible))
        assert all(passage in visible for passage in found)
        public = [passage.model_copy(update={"labels": Labels()}) for passage in visible]
        alone = PassageIndex(public, by, embed).nearest(asked, k, ANYONE) if public else []
        assert [passage.id for passage in found] == [passage.id for passage in alone]


def test_training_rows_get_no_passage_with_labels_and_evaluations_those_of_their_caller(tmp_path: Path) -> None:
    for name in ("public", "acme", "globex"):
        (tmp_path / f"{name}.md").write_text(f"The lamp of {name} is in the hall.\n")
    named = {
        "paths": ["public.md", {"path": "acme.md", "tenant": "acme"}, {"path": "globex.md", "tenant": "globex"}],
        "asked_as": {"tenant": "acme"},
    }
    store = Store(tmp_path / "store")
    settings = DocumentSettings.model_validate(named)
    documents = build_documents(store, settings, tmp_path, Privacy(action="report"))
    retrieve = Retrieve.model_validate({"from": "documents", "k": 5})
    candidate = Candidate(name="rag", base=put_base(store), max_tokens=9, retrieve=retrieve, documents=documents)
    composer = Composer(store, candidate)
    row = example("where is the lamp", "in the hall", "g")
    assert set(composer.retrieved(row.request, composer.asked_as).sources) == {"public.md", "acme.md"}
    trained = "".join(turn.content for turn in composer.training_conversation(row))
    assert "lamp of public" in trained
    assert "lamp of acme" not in trained
    assert "lamp of globex" not in trained
