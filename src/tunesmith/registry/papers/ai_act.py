"""Drafts for the EU AI Act. What is asked is a data file, with the source and date of each list: laws change."""

from __future__ import annotations

from typing import Any

from tunesmith.registry.papers.card import label_of
from tunesmith.registry.papers.facts import NOT_ADVICE, Draft, data_file, plain, shown

_PER_PARAMETER = 6  # operations a token that training a dense model takes, as the Commission's guidelines count


def ai_act(draft: Draft) -> bytes:
    """The drafts as one Markdown text: whether the one who tuned is a provider, then each list of what is asked."""
    asked = data_file("ai_act.yaml")
    parts = [f"# {plain(label_of(draft))} and the EU AI Act", NOT_ADVICE, *_provider(draft, asked["provider"])]
    for one in asked["lists"]:
        parts += _heading(one)
        for each in one["asks"]:
            place = f" ({one['title']} {each['id']})"
            parts.append(f"### {each['id']} {each['asks']}\n\n{draft.answers(each, place)}")
    return ("\n\n".join(parts) + "\n").encode()


def _heading(one: dict[str, Any]) -> list[str]:
    return [f"## {one['title']}", f"Source: {one['source']}, {one['date']}; read {one['read']}. {one['note']}"]


def _provider(draft: Draft, one: dict[str, Any]) -> list[str]:
    """Whether whoever tuned the model is a provider, by the indicative criterion of training compute."""
    lines, answer, floor = [], "no: nothing was trained, the base is used as it is", one["general_purpose"]
    if draft.has("training"):
        keys = ("base_parameters", "base_training_compute")
        lines = [draft.line("tokens computed", "training.tokens_computed"), *map(draft.asked, keys)]
        parameters, original = (draft.ask(key, key) for key in keys)
        tokens, answer = draft.read("training.tokens_computed"), "unknown: a person must say"
        ours = None if parameters is None else _PER_PARAMETER * float(parameters) * tokens
        if ours is not None:
            lines.append(f"- compute of this training, {_PER_PARAMETER} x parameters x tokens: at most {shown(ours)}")
        if ours is not None and original is None:
            side = "above" if ours > floor / 3 else "below"
            lines.append(f"- {one['without']} {shown(floor / 3)}: this training's is {side}")
        elif ours is not None and (whole := ours + original) < floor:
            answer = f"no, as a rule: {shown(whole)} operations in all, and such models have {shown(floor)} or more"
        elif ours is not None:
            share = f"{ours / original:.2g} of the base's training compute, where a third counts"
            answer = f"yes, as a rule: {share}" if ours > original / 3 else f"no, as a rule: {share}"
    return [*_heading(one), f"**{answer}**", "\n".join(lines) or "- there is no training"]
