"""The bill of materials: CycloneDX 1.6, with a `modelCard`, which cyclonedx-python-lib validates but does not write."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License, LicenseExpression
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Refused
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.text.display import printable
from tunesmith.records.version import PaperField
from tunesmith.registry.papers.card import label_of
from tunesmith.registry.papers.facts import INSTALLED, NOT_ADVICE, Draft

_LIBRARIES = ("torch", "transformers", "peft")  # of a training's environment, what is a package
_LONGEST = 300  # characters of a package's licence
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def bom(draft: Draft) -> bytes:
    """The bill of materials as JSON. Raises Refused where the library's validator objects."""

    def component(kind: str, name: str, what: ComponentType, files: Mapping[str, str], **more: Any) -> Component:
        """A component for a record of the version, with its files inside."""
        return Component(
            name=printable(name),
            type=what,
            bom_ref=f"{kind}:{draft.digest(kind)}",
            components=[_file(f"{kind}:{draft.digest(kind)}", *each) for each in files.items()],
            properties=[Property(name="tunesmith:record", value=draft.digest(kind))],
            **more,
        )

    label, model, rows = label_of(draft), ComponentType.MACHINE_LEARNING_MODEL, ComponentType.DATA
    root = component(
        "version", label, model, draft.take("files", "version.blobs"), version=draft.digest("version"),
        licenses=_licence(draft, "licence"), publisher=draft.ask("publisher", "legal_entity"),
    )  # fmt: skip
    inside = {name: file.digest for name, file in draft.take("files of the base", "base.files").items()}
    tokenizer = {name: inside.pop(name) for name in _TOKENIZER if name in inside}
    spec, licences = draft.take("base", "base.spec"), _licence(draft, "base_licence")
    parts = [component("base", spec, model, inside, licenses=licences, purl=_hub(spec))]
    parts += [_file(f"base:{draft.digest('base')}", *each) for each in tokenizer.items()]
    joined = " AND ".join(f"({each})" for each in sorted(draft.take("licences of the rows", "dataset.licences") or ()))
    for kind, licence in (("dataset", joined), ("documents", "")):
        if (files := draft.take(f"files of {kind}", f"{kind}.blobs")) is not None:
            stated = [LicenseExpression(licence)] if licence else ()
            parts.append(component(kind, f"{kind} of {label}", rows, files, licenses=stated))
    environment = draft.take("libraries", "training.environment")
    for name in _LIBRARIES:
        if (version := getattr(environment, name, None)) is not None:
            parts.append(_library(draft, name, version))
    made = Bom(components=parts)
    made.metadata.timestamp = datetime.fromisoformat(draft.take("timestamp", "version.created_at"))
    made.metadata.component = root
    made.register_dependency(root, parts)
    document = parse_json(JsonV1Dot6(made).output_as_string().encode())
    document["metadata"]["component"]["modelCard"] = _model_card(draft)
    del document["serialNumber"]  # drawn at random: the same content has the same one
    document["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, digest_bytes(canonical(document))).urn
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise Refused(f"the bill of materials is not valid: {str(wrong.data)[:300]}", where=label)
    return text.encode() + b"\n"


def _library(draft: Draft, name: str, version: str) -> Component:
    """A library of the training. Where this version is installed here: its licence, and the list of its files."""
    url = PackageURL("pypi", None, name, version)
    licences, files = list[License](), list[Component]()
    with suppress(metadata.PackageNotFoundError):
        found = metadata.distribution(name)
        records = [each for each in found.files or () if each.name == "RECORD"]
        if records and found.version == version:
            record = digest_bytes(records[0].read_binary())
            files.append(_file(url.to_string(), "RECORD", record))
            key = next((key for key in ("License-Expression", "License") if key in found.metadata), None)
            draft.note(f"library {name}", PaperField(kind=INSTALLED, record=record, field=key or "RECORD"))
            if key is not None and len(found.metadata[key]) <= _LONGEST:  # some state the whole text
                licences.append(LicenseFactory().make_from_string(found.metadata[key]))
    return Component(name=name, version=version, bom_ref=url.to_string(), purl=url, components=files, licenses=licences)


def _licence(draft: Draft, key: str) -> list[License]:
    """A licence that a person entered; empty where nobody did."""
    entered = draft.ask(key, key)
    return [] if entered is None else [LicenseFactory().make_from_string(entered)]


def _hub(spec: str) -> PackageURL | None:
    """The package URL of a base on the Hugging Face Hub; None for any other."""
    if not spec.startswith("hf:"):
        return None
    repository, _, revision = spec.removeprefix("hf:").partition("@")
    owner, _, name = repository.partition("/")
    return PackageURL("huggingface", owner, name, revision)


def _file(inside: str, name: str, digest: str) -> Component:
    """A file with its SHA-256. inside: the reference of the component that it is a part of."""
    hashed = HashType(alg=HashAlgorithm.SHA_256, content=digest.removeprefix("sha256:"))
    return Component(name=printable(name), type=ComponentType.FILE, bom_ref=f"{inside}/{name}", hashes=[hashed])


def _model_card(draft: Draft) -> JsonObject:
    """CycloneDX's modelCard."""
    level, use = draft.take("confidence", "evaluation.confidence"), draft.ask("useCases", "intended_use")
    measured = [
        {
            "type": printable(metric), "value": str(one.mean), "slice": f"held-out rows, {level:g} intervals",
            "confidenceInterval": {"lowerBound": str(one.low), "upperBound": str(one.high)},
        }
        for metric, one in draft.take("performance", "evaluation.candidates.*.metrics").items()
    ]  # fmt: skip
    parameters = {
        "task": "text-generation", "architectureFamily": draft.take("family", "base.family"),
        "inputs": [{"format": "text"}], "outputs": [{"format": "text"}],
        **({"approach": {"type": "supervised"}} if draft.has("training") else {}),
        **({"datasets": [{"ref": f"dataset:{draft.digest('dataset')}"}]} if draft.has("dataset") else {}),
    }  # fmt: skip
    missing = [{"name": "tunesmith:missing", "value": key} for key in draft.missing]
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": measured},
        "considerations": {} if use is None else {"useCases": [use]},
        "properties": [{"name": "tunesmith:note", "value": NOT_ADVICE}, *missing],
    }
