"""Answers with odd characters at their ends: a template keeps them, or the build removes and counts their row."""

import json
import re
from pathlib import Path

import pytest
import trl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data import rows as data
from tests.models.test_rendering import TEMPLATES
from tests.tiny import HYBRID, learned, write_tokenizer
from tunesmith.core.errors import Refused
from tunesmith.core.messages import Message
from tunesmith.models.rendering import Renderer, RowCounter

# The templates that TRL ships, with the token that ends their turns.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "nemotron_3_nano": "<|im_end|>",
    "phi3": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
}
SHIPPED = {name: (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text() for name in ENDS}
EVERY = TEMPLATES | {"hybrid": HYBRID} | SHIPPED
_SPECIAL = re.compile(r"<\|[A-Za-z_]+\|>|<\|[a-z]+>|<[a-z]+\|>|<(?:start|end)_of_turn>")
# As Qwen's and SmolLM2's tokenizers cut text: line breaks stay together, whoever wrote them.
_CUT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CORES = ("done", '{"on": true}', "7", "-", "é", "a b")
_WHITE = [" ", "  ", "\n", "\n\n", "\t", "\r", "\r\n", "\u00a0", "\u2028", "\x85", "\x0b", "\x1c", "\u3000"]
_READ = ["<think>", "</think>", "<|nope|>", "[INST]", "<0x0A>", "{{ x }}"]
_ODD = st.sampled_from([*_WHITE, *_READ, "\u200b", "\ufeff", "\u202e", "\u0301", "\U0001f3fd", "x"])
_ENDS = st.lists(_ODD, max_size=3).map("".join)


def _renderer(folder: Path, name: str) -> Renderer:
    """A template with a tokenizer that has its special tokens, and one token for two line breaks or spaces."""
    write_tokenizer(folder, EVERY[name])
    file = folder / "tokenizer.json"
    stated = json.loads(file.read_text())
    known, vocabulary = stated["added_tokens"][-1], stated["model"]["vocab"]
    for pair in ("\u010a\u010a", "\u0120\u0120", "\u010a\u0120", "\u010d\u010a"):
        vocabulary.setdefault(pair, len(vocabulary))
        stated["model"]["merges"].append(list(pair))
    named = {each["content"] for each in stated["added_tokens"]}
    for text in sorted({*_SPECIAL.findall(EVERY[name])} - named):
        stated["added_tokens"].append({**known, "id": len(vocabulary) + len(stated["added_tokens"]), "content": text})
    cut = {"type": "Split", "pattern": {"Regex": _CUT}, "behavior": "Isolated", "invert": False}
    stated["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [cut, {**stated["pre_tokenizer"], "use_regex": False}],
    }
    file.write_text(json.dumps(stated))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    begins = "<|startoftext|>" if name == "lfm2" else config["bos_token"]
    ends = {"eos_token": ENDS.get(name, "<|im_end|>"), "bos_token": begins}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ends))
    return Renderer(folder)


@pytest.fixture(scope="module", params=sorted(EVERY))
def renderer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder: Path = tmp_path_factory.mktemp("ends") / request.param
    folder.mkdir()
    return _renderer(folder, request.param)


def _row(answer: str) -> list[Message]:
    return [Message(role="user", content="turn on"), Message(role="assistant", content=answer)]


@given(before=_ENDS, core=st.sampled_from(_CORES), after=_ENDS)
@example(before="\n", core="done", after="")
@example(before="", core="done", after="\n")
@settings(max_examples=60, deadline=None)
def test_an_answer_is_learned_exactly_or_its_row_is_removed(
    renderer: Renderer, before: str, core: str, after: str
) -> None:
    answer, mark = before + core + after, "Q7Q"
    try:
        renderer.count_row(_row(answer), 1000)
    except Refused:
        assert before or after, "a plain answer is kept"
        return
    around = learned(renderer, _row(mark))
    assert around.strip() == mark
    assert learned(renderer, _row(answer)) == around.replace(mark, answer)


@pytest.mark.parametrize("overlong", ["drop", "refuse", "truncate"])
def test_one_such_answer_is_removed_with_its_row_and_reason(tmp_path: Path, overlong: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    _renderer(base, "chatml")
    odd = {"messages": data.turns("a", "b", "one", "\nbegins with a line break")}
    data.write_jsonl(tmp_path / "rows.jsonl", [*data.many_rows(30), odd])
    limits = {"count_tokens": RowCounter(base, ""), "max_tokens": 600}
    built = data.build(tmp_path, data.settings(overlong=overlong), **limits)
    reason = "answer changed by the base's chat template, such as by white space at its ends"
    assert built.record.body["rows"]["removed"] == {reason: 1}
    (base / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATES["chatml"])
    with pytest.raises(Refused, match="two beginning-of-text tokens") as caught:
        data.build(tmp_path, **limits | {"count_tokens": RowCounter(base, "another")})
    assert caught.value.where == "rows.jsonl, row 1, chat_template"
