"""Write and sign a version's papers, and read them again: each is a record whose envelope names the version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from tunesmith.core.clock import stamp
from tunesmith.core.digests import short
from tunesmith.core.errors import NextStep, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.core.values import View
from tunesmith.records.version import PAPERS, Paper, PaperBody
from tunesmith.registry.opening import check_not_recalled
from tunesmith.registry.papers.ai_act import ai_act
from tunesmith.registry.papers.card import card
from tunesmith.registry.papers.facts import PERSON_FILE, Draft, records_behind
from tunesmith.registry.papers.provenance import statements
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import ENVELOPE, fingerprint_of, open_envelope, seal, stated
from tunesmith.registry.signing.release import Version, read_version
from tunesmith.registry.signing.signatures import check_may_sign
from tunesmith.store.people import identities
from tunesmith.store.people.trust import TrustedKey, signature_entry
from tunesmith.store.records import Record
from tunesmith.store.store import Store

FILES: Mapping[Paper, str] = {
    "card": "card.md",
    "bom": "bom.json",
    "provenance": "provenance.intoto.jsonl",
    "ai-act": "ai-act.md",
}
_STATEMENT = "urn:tunesmith:paper:v1"


class PaperState(View):
    """A paper of a version. record: of the newest one that counts, None where there is none; by, at: who signed it, and
    when. lacks: entries of papers.yaml that it needs and nobody made. why: the newest one does not count.
    """

    paper: Paper
    file: str
    record: str | None = None
    by: str = ""
    at: str = ""
    lacks: tuple[str, ...] = ()
    why: str = ""


def write_papers(
    store: Store, version: Version, papers: Sequence[Paper], *, person: bytes, where: str, actor: str
) -> None:
    """Write papers of a version from its records, sign them and keep them.

    person: the content of papers.yaml; where: its place, for messages. Raises Refused if the version, or something that
    it was made from, was recalled, or if a paper is not valid; UsageError for a papers.yaml with an error.
    """
    identities.require(store, actor, "paper.write", scope=version.scope)
    _check_recall(store, version)
    records, made = records_behind(store, version.digest), []
    signer = keys.ensure_key(store, actor)
    key = keys.load_signing_key(store, signer)
    for paper in papers:
        draft = Draft(version.digest, records, person, where)
        text = _written(paper, draft, key)
        fields = {field: tuple(origins) for field, origins in draft.fields.items()}
        body = PaperBody(paper=paper, by=actor, at=stamp(), fields=fields, missing=tuple(draft.missing))
        blobs = {FILES[paper]: store.put_bytes(text), PERSON_FILE: store.put_bytes(person)}
        envelope = store.put_bytes(seal(_statement(version, body, blobs), key))
        made.append(body.record({"version": version.digest}, {**blobs, ENVELOPE: envelope}))
    fingerprint = fingerprint_of(key)
    for record in made:
        detail = {"paper": record.body["paper"], **signature_entry(fingerprint, record.digest)}
        with store.change(actor, "version.papers", version.digest, detail) as session:
            identities.require(session, actor, "paper.write", scope=version.scope)
            check_not_recalled(session, version, read_version(records[version.digest], version.label)[1])
            store.put_record(record, session)
    identities.publish_trust(store)


def _written(paper: Paper, draft: Draft, key: EllipticCurvePrivateKey) -> bytes:
    """The text of a paper. key: signs the statements of its provenance one by one, as other programs read them."""
    if paper == "provenance":
        return b"".join(seal(each, key) + b"\n" for each in statements(draft))
    if paper != "bom":
        return card(draft) if paper == "card" else ai_act(draft)
    try:
        from tunesmith.registry.papers.bom import bom
    except ModuleNotFoundError as error:
        what = f"a bill of materials needs {error.name}"
        raise UsageError(what, where="bom", fix="pip install 'tunesmith[papers]'") from error
    return bom(draft)


def read_paper(store: Store, record: Record, version: Version, trusted: Sequence[TrustedKey]) -> PaperBody:
    """What a paper of a version states, its signature verified. Raises Refused for one of another version, with another
    text than was signed, or signed by somebody who may not; UsageError where it is no paper.
    """
    where = f"paper {short(record.digest)}"
    body = PaperBody.of(record)
    blobs = dict(record.blobs)
    statement, key = open_envelope(store.read_blob(blobs.pop(ENVELOPE, "")), trusted, where)
    about = record.parents == {"version": version.digest} and FILES[body.paper] in blobs
    if not about or statement != _statement(version, body, blobs):
        raise Refused("a paper of another version, or not the text that was signed", where=where)
    if key.user != body.by:
        raise Refused(f"the paper says {body.by}, the key is {key.user}'s", where=where)
    check_may_sign(key, "paper.write", record.digest, where, version.scope)
    return body


def papers_of(store: Store, version: Version) -> tuple[PaperState, ...]:
    """The state of each paper of a version. Looks at signatures, not at recalls."""
    trusted = identities.trusted_keys(store)
    found: dict[str, PaperState] = {}
    written = [digest for _, kind, digest in store.children(version.digest) if kind == "paper"]
    for _, digest in sorted((at, digest) for digest, at in store.times_of(written).items()):
        record = store.record(digest)
        for paper in (each for each in PAPERS if FILES[each] in record.blobs):
            try:
                body = read_paper(store, record, version, trusted)
            except TunesmithError as error:
                before = found.get(paper, PaperState(paper=paper, file=FILES[paper]))
                found[paper] = before.model_copy(update={"why": error.what})
            else:
                found[body.paper] = PaperState.of(body, file=FILES[body.paper], record=digest, lacks=body.missing)
    return tuple(found.get(paper, PaperState(paper=paper, file=FILES[paper])) for paper in PAPERS)


def paper_text(store: Store, version: Version, file: str, kept: str = "") -> bytes:
    """The text of a version's paper. file: its name; kept: another file of its record, such as the envelope.

    Raises Refused where nobody wrote it, or where the version or something that it was made from was recalled.
    """
    _check_recall(store, version)
    state = next(state for state in papers_of(store, version) if state.file == file)
    if state.record is None:
        raise NotWritten(version, [state])
    return store.read_blob(store.record(state.record).blobs[kept or file])


def require_papers(store: Store, version: Version) -> dict[Paper, str]:
    """The records of the papers that a version takes before its approval.

    Raises Refused where one is not there, and for a draft for the AI Act with gaps: what it asks is a provider's duty.
    """
    taken = [each for each in papers_of(store, version) if each.paper in version.papers]
    if lacking := [each for each in taken if each.record is None]:
        raise NotWritten(version, lacking)
    for each in taken:
        if each.paper == "ai-act" and each.lacks:
            what = f"the paper ai-act of {version.label} lacks {len(each.lacks)} entries, such as {each.lacks[0]}"
            fix = NextStep(f"fill them in in {PERSON_FILE}, and write it again", "papers", version=version.label)
            raise Refused(what, where=version.label, fix=fix)
    return {each.paper: each.record for each in taken if each.record is not None}


class NotWritten(Refused):
    """A version has no such papers, or none that count."""

    def __init__(self, version: Version, papers: Sequence[PaperState]) -> None:
        said = ", ".join(each.paper + (f" ({each.why})" if each.why else "") for each in papers)
        fix = NextStep("write and sign them", "papers", version=version.label)
        super().__init__(f"{version.label} has no papers of these kinds: {said}", where=version.label, fix=fix)


def _check_recall(store: Store, version: Version) -> None:
    _, statement = read_version(store.record(version.digest), version.label)
    with store.reading() as session:
        check_not_recalled(session, version, statement)


def _statement(version: Version, body: PaperBody, blobs: Mapping[str, str]) -> JsonObject:
    """What a paper's envelope signs: its record's body, about the version and the paper's files."""
    subjects = {version.label: version.digest, **dict(sorted(blobs.items()))}
    return stated(subjects, _STATEMENT, body.model_dump(mode="json"))
