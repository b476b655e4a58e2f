"""Copied fields: which values a request's grammar lets through, and which settings are refused."""

import base64
import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.hf_models import base_of_family
from tunesmith.candidates.candidate import Candidate
from tunesmith.candidates.grammars.copying import (
    Constraint,
    CopyGrammars,
    check_constraint,
    copied_fields,
    invented,
    texts_of,
)
from tunesmith.candidates.grammars.words import is_copied, pieces
from tunesmith.core.errors import UsageError
from tunesmith.core.messages import Message
from tunesmith.engines.decoding.constraint import Guide
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Generation

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
FIELDS = ("slots.who", "slots.when", "slots.tags[]")


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False}


SLOTS: Schema = _object(
    intent={"enum": ["meet", "call"]},
    slots=_object(
        who=TEXT,
        count={"type": "number"},
        kind={"enum": ["a", "b"]},
        when={"type": ["string", "null"]},
        tags={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
    ),
)
SLOTS["required"] = ["intent", "slots"]
TREE = {
    **_object(name=TEXT, kids={"$ref": "#/$defs/kids"}),
    "$defs": {"kids": {"type": "array", "items": {"$ref": "#"}}},
}
KEY = base64.b32encode(b"".join(hashlib.sha256(bytes([number])).digest() for number in range(30))).decode()
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
MARIA = "Call Maria Novak, don't wait: 7pm."


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def fits(grammar: str, answer: str) -> bool:
    """Whether an answer matches a Lark grammar, byte by byte."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    data = list(answer.encode())
    return matcher.try_consume_tokens(data) == len(data) and bool(matcher.is_accepting())


def held(request: str | Sequence[str], slots: Schema | str) -> bool:
    """Whether an answer with these slots is allowed for a request."""
    texts = [request] if isinstance(request, str) else request
    written = slots if isinstance(slots, str) else json.dumps(slots, ensure_ascii=False)
    grammar = CopyGrammars(json.dumps(SLOTS), FIELDS).grammar(texts)
    return fits(grammar, f'{{"intent": "meet", "slots": {written}}}')


def candidate(schema: Schema, copied: Sequence[str] = (), **more: Any) -> Candidate:
    return Candidate(name="c", base="b", max_tokens=9, answer_schema=json.dumps(schema), copied=tuple(copied), **more)


@pytest.mark.parametrize(
    ("request_text", "copied", "refused"),
    [
        (MARIA, ["Maria Novak", "Maria Novak, don't", "7pm", "7pm."], ["Mario", "Mari", "maria", "Novak Maria", "7"]),
        (MARIA, [], ["", " ", "Maria ", " Maria"]),
        ("pay 1,000.50 at 10:30 for 20mg, 5.", ["1,000.50", "20mg", "5"], ["1", "10"]),
        ('say "hi\\there" now', ['"hi\\there"'], []),
        ("zum Cafe\u0301", ["Cafe\u0301"], ["Cafe"]),
        (decomposed("서울에서"), [decomposed("서울")], [decomposed("서울")[:-1]]),
        ("コーヒー2つ", ["コーヒー", "2"], []),
        ("１０：３０に１，０００円", ["１０：３０"], ["１０", "１"]),
        ("๑๒ คน ٥٫٥", [], ["๑", "٥"]),
        ("react with 👍🏽 please", ["👍🏽"], ["👍"]),
        ("from \U0001f1eb\U0001f1f7\U0001f1fa\U0001f1f8", ["\U0001f1fa\U0001f1f8"], ["\U0001f1f7\U0001f1fa"]),  # Russia
        (f"we are {FAMILY}", [FAMILY], ["\U0001f467"]),
        ("\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", [], ["\U0001f3f4"]),
        ("<|im_end|> \x1b[0m x", ["<|im_end|>"], []),
        ("half \ud800 a pair", ["half"], ["half a"]),
    ],
)
def test_a_copied_value_is_words_of_the_request(request_text: str, copied: list[str], refused: list[str]) -> None:
    for value in (*copied, *refused):
        assert held(request_text, {"who": value}) is (value in copied), value
        known = is_copied(value, pieces([request_text]))
        assert known is (value in copied), "init and the counts of rows use the same rule"


def test_other_values_follow_the_schema() -> None:
    for slots in (
        *({}, {"when": None}, {"count": 3.5, "kind": "b", "tags": ["Maria", "Maria", "7pm"]}),
        *('{"who":"Maria","count":1}', {"when": "7pm", "who": "Maria"}),
    ):
        assert held(MARIA, slots), "keys come in any order"
    for refused in ({"kind": "Maria"}, {"tags": []}, {"tags": ["Maria"] * 4}, {"new": "Maria"}):
        assert not held(MARIA, refused)
    assert not held(MARIA, '{"who": "Maria", "who": "Maria"}'), "each once"
    turns = ["book a room", "for Maria"]
    assert held(turns, {"who": "for Maria"})
    assert not held(turns, {"who": "room for"}), "no value goes across two turns"


@pytest.mark.parametrize(
    ("bounds", "without", "fitting"),
    [
        ({"minLength": 8, "maxLength": 8}, "call Maria", "12345678"),
        ({"maxLength": 2}, "from Germany", "DE"),
        ({"minLength": 4}, "a b", "a b c"),
        ({"minLength": 2}, "a \ud800b", "ab"),
        ({"minLength": 3, "maxLength": 3}, "ab - cd", "a b"),
    ],
)
def test_fields_that_no_words_of_the_request_fit_are_left_out(bounds: Schema, without: str, fitting: str) -> None:
    """Else decoding could begin such a field, and then find no value for it."""
    schema = _object(code={"type": "string", **bounds}, who=TEXT)
    for known, request_text in ((False, without), (True, f"{fitting} {without}")):
        grammar = CopyGrammars(json.dumps(schema), ("code", "who")).grammar([request_text])
        matcher, begun = LLMatcher(LLTokenizer("byte"), grammar, log_level=0), list(b'{"code": "')
        assert (matcher.try_consume_tokens(begun) == len(begun)) is known
        assert fits(grammar, "{}")
    assert fits(grammar, json.dumps({"code": fitting}))
    for wordless in ("", "  \n", "\ud800"):
        alone = CopyGrammars(json.dumps(_object(slots=_object(who=TEXT))), ["slots.who"]).grammar([wordless])
        assert fits(alone, '{"slots": {}}'), "an object of copied fields alone is empty"
        assert not fits(alone, '{"slots": {"who": "a"}}')
    needed = {**schema, "required": ["code"]}
    with pytest.raises(UsageError, match="holds no words"):
        CopyGrammars(json.dumps(needed), ["code"]).grammar([""])
    with pytest.raises(UsageError, match="no words of the length that the schema asks for"):
        CopyGrammars(json.dumps(needed), ["code"]).grammar([without])
    check_constraint(candidate(needed, ["code"]))


def test_a_required_key_that_is_not_among_the_properties_is_copied_too() -> None:
    schema = {"type": "object", "required": ["who"], "additionalProperties": {"type": "string"}}
    grammar = CopyGrammars(json.dumps(schema), copied_fields(schema, ["*"], "copy")).grammar([MARIA])
    assert fits(grammar, '{"who": "Maria", "when": "7pm"}')
    assert not fits(grammar, '{"who": "Mario"}')
    assert not fits(grammar, '{"who": "Maria", "who": "Novak"}')
    assert not fits(grammar, '{"when": "7pm"}')


def test_only_the_user_turns_of_the_request_count() -> None:
    said = {"system": "Mario", "user": "call Maria", "assistant": "Luigi?"}
    own = [Message(role=role, content=text) for role, text in said.items()]  # type: ignore[arg-type]
    own.append(Message(role="user", content="no"))
    shown = (Message(role="user", content="call Peach"), Message(role="assistant", content="{}"), *own)
    request = Constraint(candidate(SLOTS, FIELDS)).hold(Generation(shown), own)
    assert request.grammar is not None
    assert request.schema is None
    for name in ("Maria", "Mario", "Luigi", "Peach", "no"):
        answer = json.dumps({"intent": "call", "slots": {"who": name}})
        assert fits(request.grammar, answer) is (name in ("Maria", "no")), name


def test_nested_schemas() -> None:
    people: Schema = {"type": "array", "items": {"$ref": "#/$defs/person"}}
    schema: Schema = {
        "type": "object",
        "properties": {
            'odd "key\\/é\n': {"$ref": "#/$defs/person"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "map": {"type": "object", "additionalProperties": {"type": "string"}},
            "list": people,
            "free": people,
        },
        "required": ["maybe"],
        "$defs": {
            "person": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "friends": people},
                "required": ["name"],
            }
        },
    }
    fields = copied_fields(schema, ["odd*.name", "maybe", "map.*", "list[].name"], "copy")
    grammar = CopyGrammars(json.dumps(schema), fields).grammar(["x y z"])
    person = {"name": "x y", "friends": [{"name": "anything"}], "further": 1}
    full: Schema = {'odd "key\\/é\n': person, "maybe": "y", "map": {"a": "z", "b": "x"}, "list": [person, person]}
    assert fits(grammar, json.dumps(full | {"free": [{"name": "anything"}], "more": [1]}, ensure_ascii=False))
    assert fits(grammar, '{"maybe": null}')
    for changed in ({"maybe": "q"}, {"map": {"a": "q"}}, {"list": [{"name": "q"}]}, {"list": [{}]}):
        assert not fits(grammar, json.dumps(full | changed, ensure_ascii=False)), changed
    assert not fits(grammar, '{"maybe": "x", "maybe": "q"}'), "a listed key is not a further key"
    assert not fits(grammar, '{"maybe": "x", "m\\u0061ybe": "q"}'), "in no spelling"


@pytest.mark.parametrize(
    ("schema", "pattern", "said"),
    [
        (SLOTS, "slots.whom", "no field 'slots.whom'; did you mean 'slots.who'"),
        (SLOTS, "slots.count", "'slots.count' cannot be copied: it is not a text but number"),
        (SLOTS, "slots.kind", "the schema lists its values"),
        (SLOTS, "slots.tags", "it is a list: name its items"),
        (SLOTS, "slots", "not a text but object"),
        ({"type": "object", "properties": {"a": TEXT}}, "*", "any value there"),
        (_object(a={"type": ["null", "number"]}), "a", "null or number"),
        (_object(a={**TEXT, "pattern": "x"}), "a", "limits it by pattern"),
        ({"properties": {"a": TEXT}}, "a", "a schema without type is not supported"),
        ({"type": "array", "items": TEXT, "uniqueItems": True}, "[]", "uniqueItems is not supported"),
        (_object(a=TEXT, on={"type": "string", "format": "date"}), "*", "'on' cannot be copied: the schema limits"),
        (_object(a=TEXT, b={"type": "array", "items": TEXT}), "*", "'*' does not name 'b[]', which may be any text"),
        (_object(a=TEXT, b={"type": "array"}), "*", "'b[]' cannot be copied: the schema allows any value there"),
        (_object(a=TEXT, b=_object(c=TEXT)), "*", "'*' does not name 'b.c', which may be any text"),
        (_object(a=TEXT, b={"type": "object"}), "*", r"'b.*' cannot be copied: the schema allows any value there"),
        (TREE, "*", "'*' does not name 'kids[].name'"),
        ({**_object(code={"type": "string", "maxLength": 0}), "required": ["code"]}, "code", "no answer is possible"),
        (TREE, "name", "kids: $ref: # is not supported"),
    ],
)
def test_fields_that_cannot_be_copied_are_refused(schema: Schema, pattern: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        copied_fields(schema, [pattern], "copy")
    assert said in caught.value.what
    assert caught.value.where == "copy"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]\n'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead and look-behind, is not supported\n"),
        ({"type": "integer", "minimum": 10**30}, "integer range"),
    ],
)
def test_parts_of_a_schema_that_decoding_cannot_follow_are_named(part: Schema, said: str) -> None:
    for copied in ((), ("name",)):
        check_constraint(candidate(_object(name=TEXT, tags={"type": "string", "pattern": "^a+$"}), copied))
        with pytest.raises(UsageError, match=said) as caught:
            check_constraint(candidate({**_object(name=TEXT, tags=part), "required": ["name"]}, copied))
        assert caught.value.where == "task.schema"


def test_a_wildcard_holds_every_text_that_the_schema_does_not_list() -> None:
    assert copied_fields(SLOTS, ["slots.*", "slots.tags[]"], "copy") == FIELDS
    schema = _object(
        who={**TEXT, "readOnly": True, "description": "a person", "x-note": 1},
        code={"type": "string", "minLength": 2, "maxLength": 6},
        size={"type": ["string", "number"], "minimum": 0},
        room={"anyOf": [{"type": "string", "enum": ["home"]}, TEXT]},
        kind={"type": "string", "enum": ["a"]},
        count={"type": "integer"},
        **{"start.time": TEXT},
    )
    fields = copied_fields(schema, ["*"], "copy")
    assert fields == ("who", "code", "size", "room", "start.time")
    grammar = CopyGrammars(json.dumps(schema), fields).grammar([f'{MARIA} "ab" \\'])
    allowed = {"who": "7pm", "code": '"ab" \\', "size": "Novak", "room": "Maria", "kind": "a", "count": 1}
    assert fits(grammar, json.dumps({**allowed, "start.time": "7pm"}))
    for same in ({"size": 3}, {"room": "home"}, {"code": "Call"}):
        assert fits(grammar, json.dumps(allowed | same)), same
    refused = ("who", "Mario"), ("code", "Maria Novak"), ("code", ":"), ("size", "big"), ("start.time", "noon")
    for key, value in refused:
        assert not fits(grammar, json.dumps(allowed | {key: value})), (key, value)
    own = [Message(role="user", content=MARIA)]
    assert invented('{"start.time": "noon"}', ["*"], own) == ["start.time"]
    assert copied_fields(schema, ["start.time"], "copy") == ("start.time",)


@pytest.mark.parametrize(
    ("least", "most", "allowed"), [(0, 1, {0, 1}), (1, 1, {1}), (0, 0, {0}), (2, 1, set()), (2, None, {2, 3})]
)
def test_a_list_of_copied_values_has_so_many_items(least: int, most: int | None, allowed: set[int]) -> None:
    bounds = ({"minItems": least} if least else {}) | ({} if most is None else {"maxItems": most})
    schema = _object(tags={"type": "array", "items": TEXT, **bounds})
    grammar = CopyGrammars(json.dumps(schema), ["tags[]"]).grammar([MARIA])
    assert {count for count in range(4) if fits(grammar, json.dumps({"tags": ["Maria"] * count}))} == allowed
    check_constraint(candidate(schema, ["tags[]"]))


def test_answers_that_decoding_cannot_give_are_known() -> None:
    own = [Message(role="user", content="call Maria at 7pm.")]
    schema = _object(at={"type": "string", "format": "date-time"}, count={"type": "integer"}, who=TEXT)
    for copied in ((), ("who",)):
        constraint = Constraint(candidate(schema, copied))
        assert constraint.forbids('{"who": "Maria", "at": "2024-05-01T10:00:00Z", "count": 1}', own) is None
        assert constraint.forbids('{"at": "2024-05-01T10:00:00"}', own) == "form", "as datetime.isoformat() writes it"
        assert constraint.forbids('{"count": 1.0}', own) == "form"
        assert constraint.forbids('{"who": "Mario"}', own) == ("copy" if copied else None)
    listed = Constraint(candidate(_object(room={"anyOf": [{"enum": ["home"]}, TEXT]}), ["room"]))
    assert listed.forbids('{"room": "home"}', own) is None, "a value that the schema lists needs no copying"
    assert listed.forbids('{"room": "hall"}', own) == "copy"
    assert invented('{"slots": {"who": "Maria", "when": "7pm", "kind": "zzz"}}', FIELDS, own) == []
    assert invented('{"slots": {"who": "Mario", "tags": ["Maria", "x"]}}', FIELDS, own) == ["slots.who", "slots.tags[]"]
    assert invented("not JSON", FIELDS, own) == []
    free = Candidate(name="c", base="b", max_tokens=9)
    assert Constraint(free).forbids("anything", own) is None
    assert Constraint(free.model_copy(update={"answer_grammar": 'start: "a"\n'})).forbids("b", own) == "form"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> NativeEngine:
    return NativeEngine(base_of_family(tmp_path_factory.mktemp("base"), "qwen3"))


def asked(texts: Sequence[str], **how: Any) -> Generation:
    own = tuple(Message(role="user", content=text) for text in texts)
    return Constraint(candidate(SLOTS, FIELDS)).hold(Generation(own, **how), own)


@pytest.mark.parametrize(
    "texts", [["a a a a a"], ['"\\" \\n \x00\x1f\x7f \u2028'], ["a" * 99 + "\u0301" * 2 + "b" * 99 + "3,5" * 40]]
)
def test_random_weights_invent_nothing(engine: NativeEngine, texts: list[str]) -> None:
    for seed in range(4):
        (given,) = engine.generate([asked(texts, max_tokens=900, temperature=3.0, seed=seed)])
        assert given.finish == "stop"
        answer = json.loads(given.text)
        jsonschema.validate(answer, SLOTS)
        for path, value in texts_of(answer):
            assert path not in FIELDS or is_copied(value, pieces(texts)), (path, value)


def test_a_request_that_cannot_be_followed_is_at_fault_itself(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is too long to copy from; or its tokens cannot be computed, when a matcher allows the end token alone."""
    long = asked(["word " + " ".join(map(str, range(80_000)))])
    for request in (dataclasses.replace(long, messages=(Message(role="user", content="x"),)), asked(["call Maria"])):
        with pytest.raises(UsageError, match="cannot be held to the words of this request") as caught:
            engine.generate([request])
        assert caught.value.where == "messages", "the request is at fault, not the version"
        monkeypatch.setattr(Guide, "follow", lambda guide, _token: guide.matcher.consume_token(5))


@pytest.mark.attack("serving", "a user turn with one very long word, copied fields", "an answer")
@pytest.mark.parametrize("word", ["a" * 1500, KEY, "\u043f" * 3000, "7" * 1500], ids=["a", "key", "cyrillic", "digits"])
def test_a_pasted_key_gets_an_answer(engine: NativeEngine, word: str) -> None:
    grammar = asked([f"my key is {word}"]).grammar
    question = (Message(role="user", content="x"),)  # the tiny model's context has no room for the whole request
    engine.generate([Generation(question, max_tokens=100, grammar=grammar, temperature=3.0, seed=5)])
    assert is_copied(word, pieces([word]))
    assert held(f"my key is {word}", {"who": word}), "it can be copied as a whole"
