"""The model card: Hugging Face's layout, with metadata that `huggingface_hub.ModelCard` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tunesmith.core.errors import Refused
from tunesmith.evaluation.probes.catalog import PROBES
from tunesmith.records.evaluation import GeneralSuite, MetricInterval, RiskResults
from tunesmith.registry.papers.facts import NOT_ADVICE, PERSON_FILE, Draft, data_file, plain
from tunesmith.registry.signing.release import ADAPTER_FILES

# Licences that the Hub knows by these ids; it takes any other one as `other` with a name.
_ON_HUB = re.compile(
    "0bsd|afl-3.0|apache-2.0|bsd-[23]-clause|bsl-1.0|cc0-1.0|cc-by(-nc)?(-sa)?-[34].0|cdla-permissive-[12].0|"
    "cdla-sharing-1.0|eupl-1.2|isc|mit|mpl-2.0|unlicense|wtfpl|zlib"
)


def card(draft: Draft) -> bytes:
    """The model card. Raises Refused where its metadata would not be read back as it is."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    label = label_of(draft)
    measured: Mapping[str, MetricInterval] = draft.take("model-index", "evaluation.candidates.*.metrics")
    rows = (draft.digest("evaluation"), f"held-out rows of {label}")
    adapter = draft.take("base_model_relation", "version.blobs").keys() >= ADAPTER_FILES
    licence = draft.ask("license", "licence")
    known = licence is None or _ON_HUB.fullmatch(licence.lower()) is not None
    data = ModelCardData(
        license=licence.lower() if licence and known else None if licence is None else "other",
        license_name=None if known else licence,
        language=draft.ask("language", "languages"),
        base_model=_hub_id(draft),
        base_model_relation=("adapter" if adapter else "finetune") if draft.has("training") else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        datasets=draft.ask("datasets", "hub_datasets") or None,
        tags=["tunesmith"],
        eval_results=[EvalResult("text-generation", *rows, metric, one.mean) for metric, one in measured.items()],
        model_name=label,
    )
    own = {"Evaluation": lambda: _scores(measured), "Limits": lambda: _limits(draft)}
    parts = [f"# {plain(label)}", NOT_ADVICE]
    for one in data_file("card.yaml"):
        parts += [f"## {one['title']}", draft.answers(one)]
        parts += ["\n".join(own[one["title"]]())] if one["title"] in own else []
    whole = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join([*parts, _origins(draft)]) + "\n"
    if ModelCard(whole).data.to_dict() != data.to_dict():
        raise Refused("the card's metadata is not read back as it was written", where=label)
    return whole.encode()


def label_of(draft: Draft) -> str:
    """NAME@v3, noted as a field of the paper."""
    return f"{draft.take('version', 'version.name')}@v{draft.take('version', 'version.number')}"


def _hub_id(draft: Draft) -> str | None:
    """The base's id on the Hub; None where nobody said it."""
    spec = str(draft.read("base.spec"))
    if not spec.startswith("hf:"):
        return draft.ask("base_model", "base_hub_id")  # type: ignore[no-any-return]
    draft.take("base_model", "base.spec")
    return spec.removeprefix("hf:").partition("@")[0]


def _scores(measured: Mapping[str, MetricInterval]) -> list[str]:
    lines = [f"| {plain(name)} | {one.mean:.4g} | {one.low:.4g} to {one.high:.4g} |" for name, one in measured.items()]
    return ["| metric | mean | interval |", "|---|---|---|", *lines]


def _limits(draft: Draft) -> list[str]:
    """Lines about gates, probes and general ability."""
    lines = list[str]()
    for gate in draft.take("gates", "verdict.gates"):
        between = "" if gate.low is None else f", interval {gate.low:.4g} to {gate.high:.4g}"
        value = "nothing" if gate.value is None else f"{gate.value:.4g}{between}"
        lines.append(f"- gate {plain(gate.name)}: {gate.outcome}; measured {value}; bound {gate.bound:.4g}")
    suites: Mapping[str, Mapping[str, RiskResults]] = draft.take("probes", "evaluation.risks")
    for suite, by_candidate in suites.items():
        probe, result = PROBES.get(suite.partition("/")[0]), by_candidate.get(draft.name)
        said = f"- probe {plain(suite)}" + (f", {plain(probe.measures)}" if probe else "")
        if result is None or result.unusable is not None:
            lines.append(f"{said}: not measured")
        for arm, means in (result.arms or {}).items() if result is not None else ():
            before = "" if means.before is None else f", {means.before:.4g} before tuning"
            lines.append(f"{said}: {plain(arm)}: {means.after:.4g}{before}, {means.n} items")
    general: Mapping[str, GeneralSuite] = draft.take("general ability", "evaluation.probes")
    for suite, ability in general.items():
        if (fall := ability.drops.get(draft.name)) is not None:
            interval = f"{fall.mean:.3f} ({fall.low:.3f} to {fall.high:.3f})"
            lines.append(f"- fall of {plain(suite)} ability by tuning: {interval}, {ability.n} questions")
    return lines if suites else [*lines, "- probes of risks: none was measured"]


def _origins(draft: Draft) -> str:
    lines = [f"| {plain(field)} | {one.kind} {one.record} | {plain(one.field)} |" for field, one in draft.origins()]
    missing = [f"- `{key}`" for key in draft.missing] or ["- nothing"]
    heads = ["\n## Where each field comes from\n", "| field | record | its field |", "|---|---|---|"]
    return "\n".join([f"## What nobody filled in\n\nIn {PERSON_FILE}:\n", *missing, *heads, *lines])
