"""Papers: every field follows its record or names a person, other programs accept them, and bad ones are refused."""

import base64
import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from tests.attack_table import Happened
from tests.fabricate import Chain, approve, put_chain, put_recall
from tests.registry.test_cli import PROJECT, document, run
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.core.errors import Forbidden, Refused, UsageError
from tunesmith.data.dataset import load_dataset
from tunesmith.evaluation.report.data import report_data
from tunesmith.records.version import PAPERS
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.papers.ai_act import ai_act
from tunesmith.registry.papers.bom import bom
from tunesmith.registry.papers.card import card
from tunesmith.registry.papers.facts import ENTRIES as KNOWN
from tunesmith.registry.papers.facts import INSTALLED, PERSON_FILE, Draft, read_person, records_behind
from tunesmith.registry.papers.provenance import statements
from tunesmith.registry.papers.writing import FILES, paper_text, papers_of, read_paper, write_papers
from tunesmith.registry.registration import register
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.store.people import identities
from tunesmith.store.records import Record
from tunesmith.store.store import Store

WRITES: Mapping[str, Callable[[Draft], bytes]] = {
    "card": card, "bom": bom, "ai-act": ai_act, "provenance": lambda draft: canonical(statements(draft)),
}  # fmt: skip
ENTRIES: dict[str, Any] = {
    **{key: f"we say {key}" for key in KNOWN},
    "languages": ["en"], "hub_datasets": ["we/rows"], "base_hub_id": "we/base",
    "base_parameters": 1e9, "base_training_compute": 1e24,
    "licence": "CC-BY-4.0", "base_licence": "LicenseRef-Ours",
}  # fmt: skip
_SPECIAL: Mapping[str, Any] = {
    "version.created_at": "2029-01-01T00:00:00Z", "version.expires_at": "2030-01-31T00:00:00Z",
    "version.override": "agreed", "version.marks": ["trained with canaries"], "verdict.verdict": "inconclusive",
    "dataset.licences": {"MIT": 5}, "dataset.decontaminated": [{"path": "set", "digest": "d", "rows": 7}],
    "evaluation.primary": "exact",
    "version.blobs": {"model.safetensors": digest_bytes(b"whole")},
}  # fmt: skip


def entries(**changes: Any) -> bytes:
    return yaml.safe_dump({**ENTRIES, **changes}).encode()


def whole(store: Store, version: Version) -> dict[str, Record]:
    """The version's records with everything that a paper reads: probes, documents, a base of the Hub."""
    records = records_behind(store, version.digest)
    named = {record.kind: digest for digest, record in records.items()}

    def change(kind: str, **body: Any) -> None:
        record = records[named[kind]]
        records[named[kind]] = record.model_copy(update={"body": {**record.body, **body}})

    environment = {**records[named["training"]].body["environment"], "torch": version_of("torch")}
    change("training", base_parameters=7, environment=environment)
    names = ("config.json", "tokenizer.json")
    change("base", spec="hf:org/base@main", files={name: {"digest": digest_bytes(b"x"), "bytes": 1} for name in names})
    measured = records[named["evaluation"]].body["candidates"]
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    tuned = {**measured["tuned"], "metrics": {**measured["tuned"]["metrics"], "exact": interval}}
    arm = {"n": 9, "before": 0.1, "after": 0.2}
    fall = {"mean": 0.01, "low": 0.0, "high": 0.02}
    general = {"suite": "s", "n": 3, "scores": {}, "drops": {"tuned": fall}}
    change(
        "evaluation",
        candidates={"tuned": tuned},
        risks={"swap/100": {"tuned": {"arms": {"names": arm}}}},
        probes={"general": general},
    )
    body = {"settings": {"asked_as": None, "licence": None}, "files": [], "passages": 0, "removed": 0}
    made = Record(
        kind="documents",
        blobs={"passages.jsonl": digest_bytes(b"p")},
        body={**body, "privacy": {"action": "", "found": {}}},
    )
    records[made.digest] = made
    candidate = records[named["candidate"]]
    parents = {**candidate.parents, "documents": made.digest}
    return {**records, named["candidate"]: candidate.model_copy(update={"parents": parents})}


def other(value: Any) -> Any:
    """Another value of the same kind, different in every part."""
    match value:
        case bool():
            return not value
        case int() | float():
            return 2 * value + 1
        case str() if value.startswith("sha256:"):
            return digest_bytes(value.encode())
        case "pass" | "commercial":
            return {"pass": "fail", "commercial": "non-commercial"}[value]
        case str():
            return f"{value}x"
        case list() | tuple():
            return [other(each) for each in value]
        case dict():
            return {key: other(each) for key, each in value.items()}
    return value


def changed(record: Record, path: str) -> Record:
    """The record with another value at a path."""
    rest = path.partition(".")[2]
    if rest == "blobs":
        return record.model_copy(update={"blobs": _SPECIAL.get(path, other(dict(record.blobs)))})
    body = json.loads(canonical(record.body))
    *above, last = rest.split(".")
    inside = body
    for key in above:
        inside = inside[key]
    before = inside.get(last)
    inside[last] = _SPECIAL.get(path, other(before))
    assert inside[last] != before, path
    return record.model_copy(update={"body": body})


@pytest.mark.parametrize("paper", PAPERS)
def test_every_field_changes_with_the_record_that_it_names(store: Store, version: Version, paper: str) -> None:
    records = whole(store, version)

    def draft(changes: Mapping[str, Record] = {}, **people: Any) -> Draft:
        return Draft(version.digest, {**records, **changes}, entries(**people))

    first = draft()
    before = WRITES[paper](first)
    assert WRITES[paper](draft()) == before, "the same records, the same paper"
    origins = list(first.origins())
    installed = [field for field, one in origins if one.kind == INSTALLED]
    assert installed == (["library torch"] if paper == "bom" else [])
    origins = [(field, one) for field, one in origins if one.kind != INSTALLED]
    assert {one.record for _, one in origins} <= {*records, digest_bytes(entries())}, "no field without a record"
    assert (first.missing, len(origins) > 8) == ([], True)
    for field, one in origins:
        if one.kind == PERSON_FILE:
            after = draft(**{one.field: other(ENTRIES[one.field])})
        else:
            after = draft({one.record: changed(records[one.record], f"{one.kind}.{one.field}")})
        assert WRITES[paper](after) != before, (field, one)


def test_what_nobody_filled_in_is_named_and_nothing_is_put_in_its_place(store: Store, version: Version) -> None:
    records, asked, read = records_behind(store, version.digest), set[str](), dict[str, str]()
    for paper, write in WRITES.items():
        draft = Draft(version.digest, records, b"contact: ''\n")
        read[paper] = write(draft).decode()
        assert all(key in read[paper] for key in draft.missing), paper
        assert not [field for field, one in draft.origins() if one.kind == PERSON_FILE]
        asked.update(draft.missing)
    assert asked == KNOWN.keys()
    page = (Path(__file__).parents[2] / "docs/how-to/papers.md").read_text()
    assert read_person(re.findall(r"```\n(.*?)```", page, re.DOTALL)[1].encode(), "page")["contact"]
    assert [key for key in asked if f"`{key}`" not in page] == []
    metadata = ModelCard(read["card"]).data.to_dict()
    assert metadata.keys().isdisjoint({"license", "base_model", "language", "datasets"})
    assert "**unknown: a person must say**" in read["ai-act"]


@pytest.mark.parametrize(
    ("compute", "answer"),
    [
        (1e23, "**no, as a rule: 1.4e-07 of the base's training compute, where a third counts**"),
        (3e16, "**no, as a rule: 4.4148e+16 operations in all, and such models have 1e+23 or more**"),
        (None, "**unknown: a person must say**"),
    ],
)
def test_a_provider_is_told_by_a_third_of_the_bases_compute(
    store: Store, version: Version, compute: float | None, answer: str
) -> None:
    records = records_behind(store, version.digest)  # 235,800 tokens
    drafted = Draft(version.digest, records, entries(base_parameters=1e10, base_training_compute=compute))
    assert answer in ai_act(drafted).decode()
    counted = ai_act(Draft(version.digest, whole(store, version), b"")).decode()
    assert "at most 9.9036e+06" in counted, "6 x 7 parameters of the record x tokens"
    more = Draft(version.digest, records, entries(base_parameters=3e16, base_training_compute=1e23))
    assert "**yes, as a rule: 0.42 of the base's" in ai_act(more).decode()


def test_papers_are_written_signed_and_accepted_by_other_programs(
    store: Store, version: Version, tmp_path: Path
) -> None:
    assert [state.record for state in papers_of(store, version)] == [None] * 4
    (tmp_path / PERSON_FILE).write_bytes(entries(intended_use="<script>alert(1)</script> | [x](javascript:y)\n## Not"))
    done = document(store, "papers", "intents@v1", "--to", str(tmp_path / "out"))
    assert ([each["paper"] for each in done["papers"]], done["asks"]) == ([*PAPERS], {})
    (key,) = [user for user in identities.trusted_keys(store) if user.user == "olive"]
    public = SSlibKey.from_crypto(load_pem_public_key(key.public_key.encode()), keyid=key.fingerprint[7:])
    signed = [(tmp_path / "out" / f"{file}.dsse.json").read_bytes() for file in FILES.values()]
    signed += (tmp_path / "out" / FILES["provenance"]).read_bytes().splitlines()
    kinds = []
    for raw in signed:
        Envelope.from_dict(json.loads(raw)).verify([public], threshold=1)
        stated = json.loads(base64.b64decode(json.loads(raw)["payload"]))
        Statement.copy_from_pb(_read(stated)).validate()
        kinds.append(stated["predicateType"])
    test = "https://in-toto.io/attestation/test-result/v0.1"
    assert kinds == ["urn:tunesmith:paper:v1"] * 4 + ["https://slsa.dev/provenance/v1", test, test]
    metadata = ModelCard.load(tmp_path / "out" / "card.md").data
    assert (metadata.license, metadata.base_model, metadata.eval_results[0].metric_value) == (
        "cc-by-4.0", "we/base", 1.0,
    )  # fmt: skip
    made = (tmp_path / "out" / "bom.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(made) is None
    text = (tmp_path / "out" / "card.md").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\[x\\](javascript:y) \\#\\# Not" in text
    dataset = load_dataset(
        store, next(d for d, r in records_behind(store, version.digest).items() if r.kind == "dataset")
    )
    rows = [turn.content for split in ("train", "test") for row in dataset.examples(split) for turn in row.messages[1:]]
    for file in FILES.values():
        assert not [row for row in rows if row in (tmp_path / "out" / file).read_text()], file
    assert "paper card: signed by olive" in run(store, "show", "intents@v1").stdout
    assert "paper card by olive" in verify_version(store, version.label).notes
    report = report_data(store, version.evaluation, version.verdict, version.digest)
    assert {"card by olive", "bom by olive"} <= {node.label for node in report.lineage}


def _read(stated: Mapping[str, Any]) -> Any:
    from google.protobuf import json_format
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    return json_format.ParseDict(dict(stated), Message())


def write(store: Store, version: Version, *papers: Any, actor: str = "olive") -> None:
    write_papers(store, version, papers or PAPERS, person=b"", where=PERSON_FILE, actor=actor)


def test_an_approval_waits_for_the_papers_that_the_project_takes(store: Store, chain: Chain) -> None:
    project = PROJECT.replace("gates: {", "papers: [card, bom], gates: {")
    run(store, "register", "--name", "intents", project=project)
    run(store, "papers", "intents@v1", "--for", "card", project=project)
    with pytest.raises(Refused, match=r"intents@v1 has no papers of these kinds: bom"):
        run(store, "approve", "intents@v1", "--as", "ann")
    run(store, "papers", "intents@v1", "--for", "bom", project=project)
    assert document(store, "approve", "intents@v1", "--as", "ann")["approver"] == "ann"


@pytest.mark.attack("people", "papers with gaps, written again after the approval, or by somebody who left")
def test_an_approval_is_of_the_papers_that_were_seen(store: Store, chain: Chain, happened: Happened) -> None:
    version = register(store, name="acts", verdict=chain.verdict, actor="olive", papers=("ai-act",))

    def write(actor: str = "olive", **changes: Any) -> None:
        write_papers(store, version, ["ai-act"], person=entries(**changes), where=PERSON_FILE, actor=actor)

    write_papers(store, version, ["ai-act"], person=b"", where=PERSON_FILE, actor="olive")
    with pytest.raises(Refused, match=r"the paper ai-act of acts@v1 lacks \d+ entries, such as "):
        approve(store, version, approver="ann")
    happened("refused")
    identities.add_user(store, "sid", ["steward"], actor="olive")
    write(actor="sid")
    approve(store, version, approver="ann")
    assert require_approved(store, version).papers == {"ai-act": papers_of(store, version)[3].record}
    write(contact="somebody else")
    with pytest.raises(Refused, match="the papers of acts@v1 are not those that ann saw"):
        require_approved(store, version)
    happened("refused")
    write(actor="sid")
    identities.deactivate(store, "sid", actor="olive")
    state = papers_of(store, version)[3]
    assert (state.by, "signed by sid, who is deactivated" in state.why) == ("olive", True)
    happened("refused")


def test_papers_of_another_version_and_of_what_was_recalled_are_refused(store: Store, version: Version) -> None:
    write(store, version)
    (state, *_) = papers_of(store, version)
    assert state.record is not None
    paper, trusted = store.record(state.record), identities.trusted_keys(store)
    second = register(store, name="other", verdict=put_chain(store, seed=2).verdict, actor="olive")
    moved = paper.model_copy(update={"parents": {"version": second.digest}})
    edited = paper.model_copy(update={"blobs": {**paper.blobs, "card.md": store.put_bytes(b"# all is well")}})
    for record, of in ((moved, second), (edited, version), (paper, second)):
        with pytest.raises(Refused, match="a paper of another version, or not the text that was signed"):
            read_paper(store, record, of, trusted)
    store.put_record(moved)
    shown = papers_of(store, second)[0]
    assert (shown.record, "another version" in shown.why) == (None, True)
    with pytest.raises(Forbidden, match="ann"):
        write(store, version, actor="ann")
    put_recall(store, store.record(version.candidate).parents["training"])
    for refused in (lambda: write(store, version), lambda: paper_text(store, version, "card.md")):
        with pytest.raises(Refused, match="was recalled: consent withdrawn"):
            refused()


def test_a_version_without_weights_says_so(store: Store) -> None:
    verdict = put_chain(store, tuned=False, seed=3).verdict
    version = register(store, name="plain", verdict=verdict, actor="olive")
    records = records_behind(store, version.digest)
    read = {paper: made(Draft(version.digest, records, entries())).decode() for paper, made in WRITES.items()}
    assert "base_model_relation" not in ModelCard(read["card"]).data.to_dict()
    assert "tokens that were read: there is none, since the version was made without a training record" in read["card"]
    assert "**no: nothing was trained, the base is used as it is**" in read["ai-act"]
    assert "slsa" not in read["provenance"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"contct: me", "contct: Extra inputs are not permitted; did you mean 'contact'"),
        (
            b"hub_datasets: [we/rows, 'javascript:alert(1)']",
            r"hub_datasets\.1: .javascript:alert\(1\). cannot be the name of a repository",
        ),
        (b"hub_datasets: [../../etc]", r"hub_datasets\.0: .\.\./\.\./etc. cannot be"),
        (b"base_hub_id: https://huggingface.co/we/base", "base_hub_id: .*write OWNER/NAME"),
        (b"base_parameters: many", "base_parameters: Input should be a valid number"),
        (b"- contact", "Input should be a valid dictionary"),
        (b"contact: [", "not valid YAML"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_entries_that_cannot_be_read_are_refused(store: Store, version: Version, given: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        write_papers(store, version, ["card"], person=given, where=PERSON_FILE, actor="olive")
