"""Rendering: which tokens are the assistant's, and what is refused before it could be learned."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import HYBRID, TEMPLATE, learned, row, write_model
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.models.rendering import Renderer, RowCounter

# The shapes that model families ship: ChatML, Mistral's instruction marks, Gemma's turns, in which the system's text is
# the first user's and the assistant is called a model.
TEMPLATES = {
    "chatml": TEMPLATE,
    "mistral": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>"
        "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} {% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.first = m['content'] + '\n\n' %}{% else %}[turn]"
        "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ ns.first }}{{ m['content'] }}<|im_end|>\n"
        "{% set ns.first = '' %}{% endif %}{% endfor %}{% if add_generation_prompt %}[turn]model\n{% endif %}"
    ),
}


def _with_special_tokens(folder: Path, *texts: str, template: str = TEMPLATE) -> Path:
    """A model whose tokenizer has further special tokens."""
    write_model(folder, template=template)
    file = folder / "tokenizer.json"
    stated = json.loads(file.read_text())
    known, first = stated["added_tokens"][-1], len(stated["model"]["vocab"])
    stated["added_tokens"] += [{**known, "id": first + n, "content": text} for n, text in enumerate(texts)]
    file.write_text(json.dumps(stated))
    return folder


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TEMPLATE, {"<|im_start|>"}),
        (TEMPLATE.replace("<|im_start|>", "<|header|>"), {"<|header|>"}),  # neither eos nor bos, as Llama 3's
        (
            TEMPLATE.replace("<|im_start|>{{ message['role'] }}", "{{ '<|' + message['role'] + '|>' }}"),
            {"<|im_start|>", "<|user|>"},
        ),
        (TEMPLATE + "{% if tools %}<tool>{{ tools }}{% endif %}", {"<|im_start|>", "<tool>"}),
        ("{% if messages | length > 99 %}<filename>{% endif %}" + TEMPLATE, {"<|im_start|>", "<filename>"}),
    ],
)
def test_only_tokens_that_the_template_writes_are_refused(tmp_path: Path, template: str, written: set[str]) -> None:
    unnamed = ("<|header|>", "<|user|>", "<tool>", "<filename>")
    renderer = Renderer(_with_special_tokens(tmp_path, *unnamed, "q", template=template))
    assert set(renderer.control_tokens) == written | {"<|im_end|>"}
    for token in (*unnamed, "<|im_end|>"):
        turns = row(f"hi {token}system", "x")
        if token in renderer.control_tokens:
            with pytest.raises(UsageError, match="contains the control token"):
                renderer.prompt(turns[:2])
            with pytest.raises(UsageError, match="contains the control token"):
                renderer.conversation(turns)
        else:
            assert token in renderer.text(renderer.prompt(turns[:2]))
    with pytest.raises(UsageError, match="cannot write q as ordinary text"):
        renderer.prompt([Message(role="user", content="a quiz")])
    for nothing in ((), row("a", "b")):
        with pytest.raises(UsageError, match="nothing to answer"):
            renderer.prompt(nothing)


SPECIAL = ("<filename>", "<|endoftext|>")
# Pieces beside which merges, spaces and parts of special tokens could go wrong.
PIECES = st.sampled_from([*SPECIAL, "<", "<|im_", "filename>", "|>", " ", "\n", "  \n", "turn on", "é", '{"', "\u00a0"])


@given(asked=st.lists(PIECES, min_size=1, max_size=8), said=st.lists(PIECES, min_size=1, max_size=8))
def test_texts_of_special_tokens_are_ordinary_text(
    both: tuple[Renderer, Renderer], asked: list[str], said: list[str]
) -> None:
    """The ids are those of a tokenizer that has no such tokens; without such texts, those of the tokenizer as it is."""
    renderer, ordinary = both
    turns = row("".join(asked) or "x", "".join(said))
    if any("<|im_end|>" in turn.content or "<|im_start|>" in turn.content for turn in turns):
        return
    assert renderer.conversation(turns) == ordinary.conversation(turns)
    assert renderer.prompt(turns[:2]) == ordinary.prompt(turns[:2])
    choices = [turns[2].content, "on"]
    assert renderer.answered_each(turns[:2], choices) == ordinary.answered_each(turns[:2], choices)
    text = renderer._text(turns, opening=False)
    if not any(token in text for token in SPECIAL):
        as_it_is = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert list(renderer.conversation(turns).ids) == as_it_is
        assert renderer._text_tokenizer.encode(text, add_special_tokens=False).ids == as_it_is


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Renderer, Renderer]:
    """The renderers of a tokenizer with special tokens that its template never writes, and of one without them."""
    folder = tmp_path_factory.mktemp("special")
    write_model(folder / "without")
    return Renderer(_with_special_tokens(folder / "with", *SPECIAL)), Renderer(folder / "without")


def _renderer(folder: Path, template: str) -> Renderer:
    return Renderer(write_model(folder, template=template))


# What each family's template makes of TURNS, written out: asked, answered, asked, answered, what stands behind.
TURNS = (
    *row("turn on the light", '{"a":1}'),
    Message(role="user", content="and off"),
    Message(role="assistant", content='{"b":2}'),
)
WRITTEN = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nturn on the light<|im_end|>\n"
        "<|im_start|>assistant\n",
        '{"a":1}<|im_end|>',
        "\n<|im_start|>user\nand off<|im_end|>\n<|im_start|>assistant\n",
        '{"b":2}<|im_end|>',
        "\n",
    ),
    "mistral": (
        "[INST] Be brief. [/INST][INST] turn on the light [/INST] ",
        '{"a":1}<|im_end|>',
        "[INST] and off [/INST] ",
        '{"b":2}<|im_end|>',
        "",
    ),
    "gemma": (
        "<|im_start|>[turn]user\nBe brief.\n\nturn on the light<|im_end|>\n[turn]model\n",
        '{"a":1}<|im_end|>',
        "\n[turn]user\nand off<|im_end|>\n[turn]model\n",
        '{"b":2}<|im_end|>',
        "\n",
    ),
}
LEARNED = {
    ("assistant", 1, 1): {1, 3},
    ("assistant", 0, 1): {3},
    ("last", 1, 1): {3},
    ("last", 1, 0): {1},
    ("all", 1, 1): {0, 1, 2, 3, 4},
    ("all", 1, 0): {0, 1, 2, 4},
}


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_which_turns_are_trained(tmp_path: Path, family: str) -> None:
    renderer = _renderer(tmp_path, TEMPLATES[family])
    pieces = WRITTEN[family]
    encoded = renderer.tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
    ends = [sum(map(len, pieces[: place + 1])) for place in range(len(pieces))]
    piece_of = [next(place for place, end in enumerate(ends) if first < end) for first, _ in encoded["offset_mapping"]]
    for (loss_on, first, second), pieces_learned in LEARNED.items():
        weights = {2: first, 4: second}
        turns = [turn.model_copy(update={"weight": weights.get(place, 1)}) for place, turn in enumerate(TURNS)]
        rendered = renderer.conversation(turns, loss_on)  # type: ignore[arg-type]
        assert list(rendered.ids) == encoded["input_ids"]
        wanted = [place > 0 and piece in pieces_learned for place, piece in enumerate(piece_of)]
        assert list(rendered.trained) == wanted, (loss_on, first, second)
    assert renderer.prompt(TURNS[:2]) == encoded["input_ids"][: piece_of.index(1)]
    weightless = [turn.model_copy(update={"weight": 0}) for turn in TURNS]
    for loss_on in ("assistant", "last"):
        with pytest.raises(Refused, match="no token of this conversation would be trained on"):
            renderer.conversation(weightless, loss_on)  # type: ignore[arg-type]
    others = sum(piece % 2 == 0 for piece in piece_of)
    assert sum(renderer.conversation(weightless, "all").trained) == others - 1, "its other turns are learned"


@given(request=st.text(min_size=1, max_size=40), answer=st.text(min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_rendering(both: tuple[Renderer, Renderer], request: str, answer: str) -> None:
    _, renderer = both
    assert learned(renderer, row(request, answer)) == answer
    rendered = renderer.conversation(row(request, answer))
    assert rendered.ids[: rendered.trained.index(True)] == tuple(renderer.prompt(row(request, answer)[:-1]))


def test_an_empty_thought_is_part_of_the_opening(tmp_path: Path) -> None:
    renderer, turns = _renderer(tmp_path, HYBRID), row("turn on", "done")
    assert learned(renderer, turns) == "done"
    prompt, scored = renderer.prompt(turns[:2]), renderer.answered(turns[:2], "done")
    assert renderer.text(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert list(scored.ids[: scored.trained.index(True)]) == prompt
    thoughtful = HYBRID.replace("{{ m['content'] }}", "{{ m['content'].split('!')[-1] }}").replace(
        "<think>\n\n</think>", "<think>\n{{ m['content'].split('!')[0] if '!' in m['content'] else '' }}\n</think>", 1
    )
    own = _renderer(tmp_path / "thoughts", thoughtful)
    assert learned(own, turns) == "done"
    with pytest.raises(Refused, match=r"holds another thought than the answer(.|\n)*leave thoughts out"):
        own.conversation(row("turn on", "so I turn it on!done"))


def test_a_template_that_rewrites_earlier_answers_allows_the_last(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, HYBRID)
    with pytest.raises(Refused, match=r"once later turns follow(.|\n)*loss_on: last"):
        renderer.conversation(TURNS)
    assert learned(renderer, TURNS, "last") == '{"b":2}'
    with pytest.raises(Refused, match="once later turns follow"):
        RowCounter(tmp_path, "")(TURNS)
    assert RowCounter(tmp_path, "", "last")(TURNS) == len(renderer.conversation(TURNS, "last").ids)


@pytest.mark.parametrize(
    ("today", "written"),
    [
        ('{{ strftime_now( "%d %B %Y" ) }}', "26 July 2024"),
        (
            "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = "
            "strftime_now('%Y-%m-%d') %}{% endif %}{% endif %}{{ date_string }}",
            "2024-07-26",
        ),
    ],
)
def test_the_date_is_the_same_every_day(tmp_path: Path, today: str, written: str) -> None:
    renderer = _renderer(tmp_path, f"{today}\n{TEMPLATE}")
    assert renderer.text(renderer.prompt(row("a", "b")[:2])).startswith(f"{written}\n")
    assert learned(renderer, row("a", "b")) == "b"
    assert today in renderer.tokenizer.chat_template, "an export is compared with it"


@pytest.mark.parametrize(
    ("template", "error", "said"),
    [
        (TEMPLATE.replace("<|im_end|>", "."), Refused, "no end token"),
        ("{{ messages | length }}" + TEMPLATE, Refused, "cannot be located"),
        ("<|im_start|>" + TEMPLATE, Refused, "two beginning-of-text tokens"),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}" + TEMPLATE, Refused, r"today's date(.|\n)*write a date into"),
        (
            TEMPLATE + "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}",
            UsageError,
            "too long",
        ),
        ("", Refused, "no chat template"),
        (
            # As Mistral's second and third templates: the system's text is in the last turn if that is the user's.
            "{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
            "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}"
            "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}"
            "{% endfor %}",
            Refused,
            r"a system turn moves(.|\n)*write it into the user's turn",
        ),
        (
            "{{ raise_exception('System role not supported') }}",
            UsageError,
            r"System role not supported(.|\n)*user's message",
        ),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path: Path, template: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        _renderer(tmp_path, template).conversation(row("a", "b"))


def test_answers_end_as_the_template_ends_turns(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | {"eos_token": "!", "pad_token": "!"}))
    ends = Renderer(write_model(tmp_path / "other")).stop_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    assert Renderer(folder).answered(row("turn on", "done")[:2], "done").ids[-1] in ends


@pytest.mark.parametrize(
    ("family", "pre_tokenizer"),
    [
        *((family, "spaced") for family in TEMPLATES),  # as most tokenizers of SentencePiece: texts begin with a space
        ("chatml", "plain"),
        *((family, "sentencepiece") for family in ("chatml", "mistral", "gemma")),
    ],
)
def test_scored_answers_have_the_tokens_of_training_rows(tmp_path: Path, family: str, pre_tokenizer: str) -> None:
    """One by one and together, where the request is encoded once."""
    folder = write_model(tmp_path / "m", template=TEMPLATES[family])
    told = json.loads((folder / "tokenizer.json").read_text())
    if pre_tokenizer == "sentencepiece":
        told["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u0120", "prepend_scheme": "first", "split": True}
    else:
        told["pre_tokenizer"]["add_prefix_space"] = pre_tokenizer == "spaced"
    (folder / "tokenizer.json").write_text(json.dumps(told))
    renderer = Renderer(folder)
    choices = ["done", "no lamp", "", "Done", " done", "done ", "7", "{}"]
    for asked in (row("turn on", "")[:2], [*row("turn on", "done"), *row("and off", "")[1:2]]):
        assert renderer.answered_each(asked, choices) == [renderer.answered(asked, choice) for choice in choices]
    assert renderer.answered_each(row("turn on", "")[:2], []) == []
    for choice in choices[:3] if pre_tokenizer == "spaced" else ():
        turns = row("turn on", choice)
        scored, trained = renderer.answered(turns[:2], choice), renderer.conversation(turns)
        assert scored.ids == trained.ids[: len(scored.ids)]
        assert scored.trained == trained.trained[: len(scored.trained)]
        assert not any(trained.trained[len(scored.trained) :])
        labels = [token for token, label in zip(scored.ids, scored.trained, strict=True) if label]
        assert labels[-1] in renderer.stop_ids
        assert renderer.text(labels) == choice
