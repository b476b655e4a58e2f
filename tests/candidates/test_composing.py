"""What a candidate asks and learns: prompts, shots, passages with labels; and baselines without a model."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.fabricate import example, put_base, put_dataset
from tests.models.test_rendering_tools import CALL, HERMES, TURNS
from tests.tiny import learned, write_model, write_tokenizer
from tests.tiny_project import write_project
from tunesmith.api import Project
from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.asking import _confidence, ask_rows
from tunesmith.candidates.baselines import make_baseline
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.composing import Composer, compose, count_prompts, describe_prompts, prompt_used
from tunesmith.candidates.retrieval import Embed, Index, PassageIndex, Vectors, choose_shots, draw_shots
from tunesmith.candidates.settings import CandidateSettings, Shots
from tunesmith.core.access import ANYONE, Caller, Labels
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.data.dataset import Example
from tunesmith.data.documents import DocumentSettings, Passage, build_documents
from tunesmith.data.settings import Privacy
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.models.rendering import Renderer
from tunesmith.records.candidate import Retrieve
from tunesmith.services import evaluations
from tunesmith.store.store import Store

SHOT = (Message(role="user", content="turn on the fan"), Message(role="assistant", content='{"shot":1}'))
OTHERS = [example(f"turn on the {thing} light", {"retrieved": thing}, thing) for thing in ("hall", "kitchen")]


def _own(weights: Sequence[int]) -> Example:
    """A row with one answer for each weight."""
    turns: list[Message] = []
    for place, weight in enumerate(weights):
        turns.append(Message(role="user", content=f"turn on the kitchen light {place}"))
        turns.append(Message.model_validate({"role": "assistant", "content": f'{{"own":{place}}}', "weight": weight}))
    return Example(id="own", messages=tuple(turns), source="rows.jsonl", licence="CC0-1.0", group="own")


def test_only_a_rows_own_answers_are_labels(tmp_path: Path) -> None:
    renderer, store, row = Renderer(write_model(tmp_path / "model")), Store(tmp_path / "store"), _own([1, 0, 1])
    candidate = Candidate(
        name="shown",
        base=put_base(store),
        max_tokens=8,
        prompt="Answer.",
        shots=(SHOT,),
        dataset=put_dataset(store, [*OTHERS, row]),
        retrieve=Retrieve(k=2),
    )
    composer = Composer(store, candidate)
    composed = composer.training_conversation(row)
    assert [turn.content for turn in composed if turn.role == "assistant"] == [
        '{"shot":1}', '{"retrieved": "hall"}', '{"retrieved": "kitchen"}', '{"own":0}', '{"own":1}', '{"own":2}'
    ]  # fmt: skip
    assert learned(renderer, composed) == '{"own":0}{"own":2}'
    # The model sees the same tokens as where the row is a request, and requests are composed as before.
    plain = compose(candidate, row.messages, composer.retrieved_without_group(row))
    assert renderer.conversation(composed).ids == renderer.conversation(plain).ids
    assert renderer.prompt(composed[:-1]) == renderer.prompt(plain[:-1])
    assert {turn.weight for turn in plain[:-6]} == {1}


# How long answers take, and how sure a base is of an answer that is a label


def test_calls_are_kept_in_the_form_of_a_row(tmp_path: Path) -> None:
    """Only where one is expected: a row may teach text that looks like a call."""
    write_tokenizer(tmp_path, HERMES)
    store = Store(tmp_path / "store")
    candidate = Candidate(name="zero", base=put_base(store), max_tokens=64)
    rows = [
        Example(id=group, group=group, messages=messages, source="s", licence="CC0-1.0")
        for group, messages in (("a", TURNS[:2]), ("b", (TURNS[0], Message(role="assistant", content=CALL))))
    ]
    engine: Any = SimpleNamespace(
        base=candidate.base, generate=lambda requests, _adapter: [Completion(CALL, "stop", 1, 1)] * len(requests)
    )
    found = ask_rows(Answerer(store, engine, candidate, renderer=Renderer(tmp_path)), rows, tmp_path / "work", "asked")
    assert [line["text"] for line in found.lines] == [row.answer for row in rows]


def test_the_row_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    """Among many rows, or the policy's requests, nobody would find it."""
    store = Store(tmp_path / "store")
    rows = [example(text, {"on": True}, text) for text in ("light on", "light " * 99, "12")]

    def generate(asked: Sequence[Generation], adapter: str | None) -> list[Completion]:
        if any(len(each.messages[-1].content) > 99 for each in asked):
            raise UsageError("the prompt is too long", where="messages", fix="shorten the request")
        return [Completion("{}", "stop", 1, 1)] * len(asked)

    engine: Any = SimpleNamespace(base=put_base(store), follows_grammars=True, generate=generate)
    schema = {"type": "object", "properties": {"who": {"type": "string", "minLength": 3}}, "required": ["who"]}
    free = Candidate(name="c", base=engine.base, max_tokens=8)
    held = free.model_copy(update={"answer_schema": json.dumps(schema), "copied": ("who",)})
    for candidate, asked, said in ((free, rows, "too long"), (held, rows[::2], "no words of the length")):
        with pytest.raises(UsageError, match=said) as caught:
            ask_rows(Answerer(store, engine, candidate), asked, tmp_path / said, "asked")
        assert caught.value.where == f"request {rows[1 if asked is rows else 2].id}, messages"


def test_a_label_s_confidence_depends_neither_on_case_nor_on_spaces() -> None:
    """As its score does not: Positive is right where the reference is positive."""
    sums = {"positive": math.log(0.5), "Positive": math.log(0.25), "negative": math.log(0.25)}
    given = {"positive": 0.75, "Positive": 0.75, " POSITIVE ": 0.75, "negative": 0.25, "none of them": 0.0}
    assert {text: _confidence(text, sums) for text in given} == pytest.approx(given, abs=1e-6)


# Passages with labels: who sees which, and that what a caller may not see changes nothing of what they get


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


def test_more_views_than_are_kept_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.candidates.retrieval._VIEWS", 2)
    index = PassageIndex(_passages([(f"iron {name}", Labels(tenant=name)) for name in "abcd"]))
    for name in "abcdabcd":
        assert [one.text for one in index.nearest("iron", 4, Caller(Scope(tenant=name)))] == [f"iron {name}"]
    assert index.nearest("iron", 4, ANYONE) == []


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


# Which system prompt a request gets: the candidate's, the request's own system turn, or none


USER = Message(role="user", content="turn on the light")
SYSTEM = Message(role="system", content="You are a house.")


def candidate(prompt: str = "", **more: object) -> Candidate:
    return Candidate.model_validate({"name": "c", "base": "b", "max_tokens": 8, "prompt": prompt, **more})


@pytest.mark.parametrize(
    ("prompt", "request_turns", "system", "used"),
    [
        ("Answer.", (USER,), "Answer.", "candidate"),
        ("Answer.", (SYSTEM, USER), "Answer.", "replaced"),
        ("", (SYSTEM, USER), "You are a house.", "request"),
        ("", (USER,), None, "none"),
    ],
)
def test_system_prompt(prompt: str, request_turns: tuple[Message, ...], system: str | None, used: str) -> None:
    composed = compose(candidate(prompt), request_turns)
    assert [turn.content for turn in composed if turn.role == "system"] == ([system] if system else [])
    assert prompt_used(candidate(prompt), request_turns) == used
    assert prompt_used(candidate(method="nearest"), request_turns) == "none", "baselines use none"


def test_counts_in_words() -> None:
    requests = [(SYSTEM, USER), (USER,), (USER,)]
    assert count_prompts(candidate("Answer."), requests) == {"candidate": 2, "replaced": 1}
    said = [describe_prompts(count_prompts(candidate(prompt), requests)) for prompt in ("Answer.", "")]
    assert said == [
        "the candidate's prompt, which replaces the system turn of 1 of 3 rows",
        "the system turn of 1 of 3 rows, no system prompt for the others",
    ]


def test_empty_prompt_file_is_refused(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "p", candidates={"plain": {"prompt": "prompt.txt", "max_tokens": 8}})
    (folder / "prompt.txt").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        evaluations.evaluate(Project.load(folder))


# Baselines, which answer without a language model; shots, searches and settings of candidates


def numbered(request: str, answer: str, number: int = 0, group: str = "g") -> Example:
    turns = (Message(role="user", content=request), Message(role="assistant", content=answer))
    return Example(id=f"{number:04d}", messages=turns, source="s", licence="MIT", group=group)


REQUESTS = {
    "balance": ["what is my balance", "show the balance of my account", "how much money is in the account"],
    "card": ["block my card", "my card was stolen please block it", "i lost the card"],
}
ROWS = [numbered(text, label, number) for label, texts in REQUESTS.items() for number, text in enumerate(texts)]
USER_CARD = (Message(role="user", content="block my card"),)


def _ask(method: str, text: str) -> Completion:
    return make_baseline(method, ROWS).generate([Generation(messages=(Message(role="user", content=text),))])[0]


@pytest.mark.parametrize("method", ["nearest", "classifier"])
def test_it_answers_as_the_rows_like_the_request(method: str) -> None:
    assert _ask(method, "please block the stolen card").text == "card"
    assert _ask(method, "the balance of the account").text == "balance"
    assert _ask(method, "x").prompt_tokens == 0
    assert _ask(method, "balance card") == _ask(method, "balance card")
    baseline = make_baseline(method, ROWS)
    assert [*baseline.stream(Generation(USER_CARD))] == ["card", *baseline.generate([Generation(USER_CARD)])]
    with pytest.raises(UsageError, match="no user message"):
        baseline.generate([Generation(messages=(SYSTEM,))])


def test_the_classifier_says_how_sure_it_is() -> None:
    """As scikit-learn's TF-IDF of words and pairs and its logistic regression with C=10 gave."""
    given = _ask("classifier", "block the card of my account")
    assert given.confidence == pytest.approx(0.5036, abs=1e-4)


def test_rows_that_are_nothing_to_classify() -> None:
    for rows, said in (
        ([numbered("\U0001f600" * (n + 1), "ab"[n % 2], n) for n in range(6)], "have no words"),
        ([numbered(f"q {n}", f"a {n}", n) for n in range(6)], "not a classification task"),
        ([numbered(f"q {n}", "a", n) for n in range(6)], "not a classification task"),
    ):
        with pytest.raises(UsageError, match=said):
            make_baseline("classifier", rows)


# Shots, searches and settings of candidates


LIKE = [numbered(f"turn on the lamp in room {n}", "on", n, f"g{n}") for n in range(30)]
ODD = [numbered("play some music please", "music", 90, "h"), numbered("was soll das", "unklar", 91, "i")]


def test_diverse_shots_hold_what_is_unlike_the_rest() -> None:
    chosen = choose_shots([*LIKE, *ODD], 3, "diverse")
    assert {one.id for one in ODD} < {one.id for one in chosen}
    assert chosen == choose_shots([*reversed(LIKE), *ODD], 3, "diverse"), "whatever the rows' order"
    assert draw_shots(LIKE, 5, 1) == draw_shots(list(reversed(LIKE)), 5, 1) != draw_shots(LIKE, 5, 2)


@given(st.integers(1, 12), st.integers(0, 5), st.sampled_from(["fixed", "diverse"]))
def test_as_many_as_asked_and_none_twice(count: int, rows: int, how: str) -> None:
    chosen = choose_shots(LIKE[:rows], count, how)
    assert len(chosen) == min(count, rows) == len({one.id for one in chosen})


def test_fused_ranks_what_both_find_above_what_one_finds() -> None:
    texts = ["alpha beta", "alpha gamma", "delta"]
    vectors = {"alpha beta": [0.6, 0.8], "alpha gamma": [1.0, 0.0], "delta": [0.9, 0.44], "alpha": [1.0, 0.0]}

    def embed(some: Any) -> Any:
        return np.array([vectors[text] for text in some], dtype=np.float32)

    # By vectors gamma, delta, beta; by words beta and gamma alike, beta first, delta last.
    assert Index(texts, "dense", embed).nearest("alpha", 3) == [0, 2, 1]
    assert Index(texts, "fused", embed).nearest("alpha", 1) == [1]
    assert Index(texts).nearest("alpha", 2) == [1, 0]
    assert Index(texts).nearest("???", 2) == [1, 0], "no known word: the first ones"
    assert Index(texts).similarity("???") == 0.0
    assert Index(texts).nearest("alpha", 2, frozenset({0})) == [2, 1]


URL = {"url": "http://h/v1", "model": "m"}
PRICED = {**URL, "price": {"prompt": 1, "answer": 2}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "nearest", "prompt": "p"}, "remove prompt"),
        ({"method": "classifier", "constrain": True}, "remove constrain"),
        ({"prompt": "p", "endpoint": URL, "train": {}}, "remove train"),
        ({"prompt": "p", "weights": "x", "train": {}}, "remove train"),
        ({"prompt": "p", "endpoint": URL, "constrain": {"copy": ["a"]}}, "cannot say"),
        ({"prompt": "p", "optimise": {}, "train": {}}, "remove train"),
        ({"prompt": "p", "optimise": {}, "prompt_of": "x"}, "remove optimise and prompt"),
        ({"optimise": {"rewriter": URL}}, "a rewriter needs `prompt`"),
        ({"prompt": "p", "optimise": {"cost": 1}}, "belong together"),
        ({"prompt": "p", "optimise": {"cost": 1, "rewriter": URL}, "endpoint": PRICED}, "belong together"),
        ({"prompt": "p", "optimise": {}, "endpoint": PRICED}, "belong together"),
        ({"prompt": "p", "shots": 65}, "64"),
        ({"prompt": "p", "shots": {"count": 4, "choose": "test"}}, "diverse"),
        ({"prompt": "p", "optimise": {"calls": 119, "rows": 30}}, "four calls for each"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CandidateSettings.model_validate(settings)
    assert CandidateSettings(prompt="p", shots=8).wanted_shots == Shots(count=8), "a number is of fixed ones"
    assert CandidateSettings(prompt="p").wanted_shots is None
