"""Where constrained answers may end, which is at every token on which decoding stops, and how they are laid out."""

import json
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.tiny import write_model
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_json import as_decoded
from tunesmith.engines.decoding.answers import Answer
from tunesmith.engines.decoding.constraint import Constraints, mask_disallowed_
from tunesmith.engines.protocol import Generation, Streamed
from tunesmith.models.rendering import Renderer

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
WHOLE = '{"a": "hi"}'


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A base with three end tokens: its tokenizer's, another control token, and a token that text may hold too."""
    folder: Path = write_model(tmp_path_factory.mktemp("ends") / "m")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ends = [vocabulary["<|im_start|>"], vocabulary["!"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    found = Renderer(folder)
    assert found.stop_ids == {*ends, vocabulary["<|im_end|>"]}
    return found


@pytest.mark.parametrize(
    ("held", "more"),
    [
        ({"schema": json.dumps(SCHEMA)}, 0),
        ({"grammar": 'start: "{\\"a\\": \\"" /[^"]*/ "\\"}"\n'}, 0),
        ({"schema": json.dumps(SCHEMA)}, 1),
        ({"schema": json.dumps(SCHEMA)}, 40),
    ],
)
def test_an_answer_may_end_at_every_end_token_once_it_is_whole(
    renderer: Renderer, held: dict[str, Any], more: int, tmp_path: Path
) -> None:
    """more: tokens that the tokenizer knows and the model cannot give, as with Gemma 3's text models."""
    vocabulary = len(renderer.tokenizer)
    renderer.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"<image {number}>" for number in range(more)])
    assert len(tokenizer) == vocabulary + more
    guide = Constraints(tokenizer, vocabulary, renderer.stop_ids).guide(Generation((), **held))
    for token in [*renderer.tokenizer.encode(WHOLE, add_special_tokens=False), None]:
        scores = torch.zeros(2, vocabulary)
        mask_disallowed_(scores, [None, guide])
        assert scores[0].isfinite().all(), "a row without a guide is left alone"
        allowed = set(scores[1].isfinite().nonzero()[:, 0].tolist())
        if token is None:
            assert allowed == renderer.stop_ids
            return
        assert token in allowed
        assert allowed.isdisjoint(renderer.stop_ids), "half an answer, as decoding would stop here"
        guide.follow(token)


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": "x: y,  {z"}',
        '{"a":"\\" : \\\\"}',
        '{"a": "Ren\u00e9e \\u0001"}',
        '{"a":  "x"}',
        '{ "a": "x"}',
        '{"a" : "x"}',
        '{"a": "x" }',
        '{\n  "a": "x"\n}',
        json.dumps({"a": "x"}, indent=4),
        json.dumps({"a": "Ren\u00e9e"}),
        '{"a": "1\\/2"}',
        '{"a": "\x7f"}',
    ],
)
def test_answers_of_rows_are_spelled_as_constrained_answers_can_be(renderer: Renderer, answer: str) -> None:
    guide = Constraints(renderer.tokenizer, len(renderer.tokenizer), renderer.stop_ids).guide(
        Generation((), schema=json.dumps(SCHEMA))
    )

    def possible(text: str) -> bool:
        tokens = renderer.tokenizer.encode(text, add_special_tokens=False)
        return bool(guide.matcher.validate_tokens(tokens) == len(tokens))

    assert possible(answer) is (as_decoded(answer) == answer), "only what decoding cannot write is changed"
    assert possible(as_decoded(answer))
    assert json.loads(as_decoded(answer)) == json.loads(answer)


def test_an_answer_may_end_or_go_on(renderer: Renderer) -> None:
    vocabulary = len(renderer.tokenizer)
    guides = Constraints(renderer.tokenizer, vocabulary, renderer.stop_ids)
    with pytest.raises(UsageError, match=r"task\.schema, task\.pattern or task\.grammar"):
        guides.guide(Generation((), grammar="start: nothing\n"))
    guide = guides.guide(Generation((), grammar="start: /[a-z]+/\n"))
    guide.follow(renderer.tokenizer.convert_tokens_to_ids("a"))
    scores = torch.zeros(1, vocabulary)
    mask_disallowed_(scores, [guide])
    allowed = set(scores[0].isfinite().nonzero()[:, 0].tolist())
    assert renderer.stop_ids < allowed
    assert renderer.tokenizer.convert_tokens_to_ids("b") in allowed


# Stop texts: found where a plain search finds them, at a cost that does not grow with their length


class Spelled:
    """A renderer whose tokens are texts."""

    def reader(self) -> Any:
        return str

    def text(self, ids: list[Any]) -> str:
        return "".join(ids)


def answered(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """(text, finish, what was streamed before the end) of an answer that decodes to these pieces."""
    events: SimpleQueue[Streamed | None] = SimpleQueue()
    answer = Answer(Spelled(), Generation((), stop=stops), 0, lambda _: b"", events, streams=True)  # type: ignore[arg-type]
    for piece in pieces:
        if answer.take(piece, None):  # type: ignore[arg-type]
            break
        seen = events.qsize()
    streamed = [events.get() for _ in range(seen)] if pieces else []
    answer.end(stopped=False)
    completion = answer.completion()
    return completion.text, completion.finish, streamed  # type: ignore[return-value]


AB = st.text("ab", max_size=4)


@given(st.lists(AB, min_size=1, max_size=14), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
def test_stop_texts_cut_where_a_plain_search_does(pieces: list[str], stops: list[str]) -> None:
    text, finish, streamed = answered(["", *pieces], tuple(stops))
    whole, ended = "", False
    for piece in pieces:
        whole += piece
        ended = any(stop in whole for stop in stops)
        if ended:
            break
    cut = min((whole.index(stop) for stop in stops if stop in whole), default=len(whole))
    assert (text, finish) == (whole[:cut], "stop" if ended else "length")
    assert whole.startswith("".join(streamed))
    assert len("".join(streamed)) <= cut


@pytest.mark.attack("serving", "stop texts of 240,000 characters, in the engine", "answered at the usual cost")
@pytest.mark.parametrize("stop", ["a" * 240_000, "a" * 239_999 + "b", "ab" * 120_000, "b" + "a" * 239_999])
def test_long_stop_texts_do_not_slow_decoding(stop: str) -> None:
    """A check of every beginning of the stop text would take hours."""
    text, finish, _ = answered(["aaaa", "abab"] * 2000, (stop,) * 4)
    assert (len(text), finish) == (16_000, "length")
