"""Versions: register, verify, decide on, export, list and show them.

A person sees the versions of their tenant and region, and those that are for all; one without a tenant sees all."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Base64Bytes, BeforeValidator, Field
from sqlalchemy import ColumnElement, Select, or_, select
from sqlalchemy.orm import Session

from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.candidates.grammars.copying import Constraint
from tunesmith.core.errors import NextStep, NotThere, Refused, TunesmithError, UsageError
from tunesmith.core.reading.strict_json import JsonObject, parse_json
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.core.system.files import write_atomic
from tunesmith.core.system.http_clients import is_private
from tunesmith.core.text.names import Scope, VersionRef, is_number
from tunesmith.core.values import Digest, Page, ScopedView, View
from tunesmith.evaluation.summary import VerdictSummary, verdict_summary
from tunesmith.models.base import open_base
from tunesmith.pipeline.verdicts import changed_since, latest
from tunesmith.records.version import PAPERS, Decision, Dtype, ExportBody, Form, Paper, Requirement
from tunesmith.registry import registration, serving, versions
from tunesmith.registry.approvals import RecordedApproval, prepare_approval, submit_approval
from tunesmith.registry.licence_duties import NOTICE
from tunesmith.registry.papers.facts import ENTRIES, PERSON_FILE
from tunesmith.registry.papers.writing import PaperState, paper_text, papers_of, write_papers
from tunesmith.registry.risk import Approvals, missing
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import (
    ENVELOPE,
    envelope_of,
    fingerprint_of,
    read_statement,
    seal,
    signed_bytes,
)
from tunesmith.registry.signing.release import Version
from tunesmith.registry.verification import Verification, verify_version
from tunesmith.registry.versions import Alias, list_aliases, resolve
from tunesmith.services import evaluations
from tunesmith.services.actions import Acting, Action, Because, Named, Number, Reason, Request, ScopedRequest, action
from tunesmith.services.datasets import datasheet
from tunesmith.store.database import paged, within
from tunesmith.store.people.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, LIVE, AuditRow, KeyRow, RecordRow, RolloutRow, VersionRow

LISTED = 100  # versions in a list, unless told otherwise
PAGE = 50
State = Literal["serving", "rolling out", "approved", "waiting", "refused", "recalled", "expired", "untrusted"]
STATES: tuple[State, ...] = get_args(State)
Document = Literal[
    "report.html", "report.md", "datasheet.md", "NOTICE.md",
    "card.md", "bom.json", "provenance.intoto.jsonl", "ai-act.md",
]  # fmt: skip
_REASONS: dict[str | None, State] = {
    None: "approved",
    "not_approved": "waiting",
    "refused": "refused",
    "recalled": "recalled",
    "expired": "expired",
}


class RegisteredVersion(Version):
    """A version as the registry keeps it. version: its label, NAME@v3."""

    version: str

    @property
    def needs(self) -> tuple[str, ...]:
        """What its risk class takes before it may serve, one phrase each."""
        return missing(self.risk, {})


class VersionList(View):
    """Versions by name and number, and the aliases that point at them. total: how many there are with older ones."""

    versions: tuple[RegisteredVersion, ...]
    aliases: tuple[Alias, ...]
    total: int


class ListedVersion(ScopedView):
    """A version in a list. version: NAME@v3. state, why: whether it may serve, and what stands against it."""

    version: str
    name: str
    number: int
    digest: str
    signer: str
    created_at: str
    expires_at: str | None
    override: str | None
    marks: tuple[str, ...]
    state: State
    why: str


class VersionPage(Page):
    """A page of a list, the newest versions first."""

    versions: tuple[ListedVersion, ...]


class Decided(View):
    """A decision on a version, as the audit log has it. entry: its number there. key: the label of the key that signed.

    counts: whether it is among those that say now whether the version may serve.
    """

    entry: int
    at: str
    approver: str
    decision: Decision
    reason: str
    key: str
    counts: bool


class VersionDetails(View):
    """One version. candidate, evaluation: digests. approvals: what it still takes; decisions: the newest
    first. may_decide: whether the person who looks may approve or refuse it; not_because: why not, if they are an
    approver. notice: whether it has a NOTICE.md. dataset: of its rows, None without. papers: which were written.
    """

    listed: ListedVersion
    candidate: str
    evaluation: str
    judged: VerdictSummary | None
    approvals: Approvals | None
    decisions: tuple[Decided, ...]
    may_decide: bool
    not_because: str
    notice: bool
    dataset: str | None
    papers: tuple[PaperState, ...]


class Notice(View):
    """The text of a version's NOTICE.md."""

    version: str
    notice: str


class RegisterVersion(ScopedRequest):
    """A judged candidate that becomes the next version of a name.

    verdict: the digest of its verdict or the start of it, by default the newest. name: by default the project's.
    override: an admin's reason to register one that did not pass, or whose gates or policy checks changed since.
    expires_at: when its use ends, as 2030-01-31T00:00:00Z. tenant, region: by default those of whoever registers it.
    """

    verdict: Annotated[str, Field(pattern="^(sha256:)?[0-9a-f]{4,64}$")] | None = None
    name: Named | None = None
    override: Because | None = None
    expires_at: Named | None = None


class VerifyVersion(Request):
    """A version to verify on the server that has it."""

    name: Named
    number: Number


@action(
    "version.register", says="registered a version", permission="version.register", tokens=("jobs",), at="/versions",
    form=True, reads_files=True,
)  # fmt: skip
def register(acting: Acting, asked: RegisterVersion) -> RegisteredVersion:
    """Sign a judged candidate and keep it as the next version of a name, as a run does.

    It states the project's risk class from now on.
    """
    acting.unchanged()
    project, risk = acting.project, acting.project.settings.risk
    verdict = asked.verdict or latest(project, "verdict", acting.user.scope)
    if verdict is None:
        raise UsageError("nothing was judged yet", where=str(acting.store.root), fix=NextStep("judge one", "gate"))
    digest = evaluations.find_verdict(acting, verdict)
    version = registration.register(
        acting.store,
        name=asked.name or project.settings.name,
        verdict=digest,
        changed=changed_since(project, digest),
        actor=acting.actor,
        scope=acting.scope(asked),
        override=asked.override,
        expires_at=asked.expires_at,
        risk=None if risk is None else risk.requirement,
        papers=project.settings.papers,
    )
    return registered(version)


@action("version.verify", tokens=("read",), at="/versions/{name}/{number}/verification", form=True, reads_files=True)
def verify(acting: Acting, asked: VerifyVersion) -> Verification:
    """Verify a version and what it was made from now."""
    version = find_version(acting, asked.name, asked.number)
    return verify_version(acting.store, version.label, whole_store=False)


def verify_offline(
    store: Store,
    version: str,
    *,
    trust: Path | None = None,
    base: Path | None = None,
    lineage_only: bool = False,
    scope: Scope = Scope(),
) -> Verification:
    """Recompute the digests and signatures of a version and of everything that it was made from.

    NAME@v3 is verified from files alone, without the database. trust: a list of trusted keys in place of the store's.
    base: the base model's folder, verified too. lineage_only: do not verify the rest of the store.
    """
    label = version if "@v" in version else resolve(store, version, scope=scope).label
    return verify_version(store, label, trust=trust, base_folder=base, whole_store=not lineage_only)


def list_versions(store: Store, *, name: str = "", limit: int = LISTED) -> VersionList:
    """Versions, and the aliases that point at them.

    name: only versions whose name contains this text. limit: only the last so many that were registered; 0: all.
    """
    shown = tuple(registered(one) for one in versions.list_versions(store, containing=name, newest=limit or None))
    listed = {version.digest for version in shown}
    aliases = tuple(alias for alias in list_aliases(store) if alias.version in listed)
    return VersionList(versions=shown, aliases=aliases, total=versions.count_versions(store, containing=name))


def registered(version: Version) -> RegisteredVersion:
    """A version as lists and pages show it."""
    return RegisteredVersion(version=version.label, **version.model_dump())


def page_of_versions(acting: Acting, *, text: str = "", state: str = "", page: int = 1) -> VersionPage:
    """A page of the versions that a user may see. text: a part of the name, NAME@v3, or the start of a digest.

    state: only versions in this state; then all that fit the text are looked at. Raises UsageError for an unknown one.
    """
    if state and state not in STATES:
        raise UsageError(f"{state[:40]!r} is no state of a version", fix=f"one of {', '.join(STATES)}")
    query, store = _visible(acting.user.scope, text), acting.store
    with store.reading() as session:
        if state:
            every = _listed(store, session, session.scalars(query))
            at, listed = Page.cut([one for one in every if one.state == state], page, PAGE)
        else:
            at, query = paged(session, query, page, PAGE)
            listed = _listed(store, session, session.scalars(query))
    return VersionPage(**dict(at), versions=tuple(listed))


def find_version(acting: Acting, name: str, number: int) -> RegisteredVersion:
    """A version that a user may see. Raises NotThere for any other."""
    query = _visible(acting.user.scope, "").where(VersionRow.name == name, VersionRow.number == number)
    with acting.store.reading() as session:
        digest = session.scalars(query.with_only_columns(VersionRow.digest)).first()
    if digest is None:
        raise NotThere("there is no such version")
    return registered(versions.load_version(acting.store, digest))


def details(acting: Acting, version: Version) -> VersionDetails:
    """What a version's page shows."""
    store = acting.store
    with store.reading() as session:
        row = session.get_one(VersionRow, (version.name, version.number))
        (listed,) = _listed(store, session, [row])
    try:
        approvals = approvals_for(store, version)
        judged = verdict_summary(store, version.verdict)
    except (TunesmithError, KeyError):  # the state says what is wrong with its signature or evidence
        approvals, judged = None, None
    not_because = _not_because(acting.user, version)
    return VersionDetails.of(
        version,
        listed=listed,
        judged=judged,
        approvals=approvals,
        decisions=_decisions(store, version, approvals),
        may_decide=acting.user.may("version.approve") and not not_because,
        not_because=not_because,
        notice=NOTICE in store.record(version.digest).blobs,
        papers=papers_of(store, version),
        dataset=_dataset(store, version),
    )


def notice(store: Store, version: str, *, scope: Scope = Scope()) -> Notice:
    """What the licences of a version's rows ask for. Raises Refused where it was made from no rows."""
    named = resolve(store, version, scope=scope)
    return Notice(version=named.label, notice=_notice(store, named))


def _notice(store: Store, version: Version) -> str:
    """The text of a version's NOTICE.md. Raises Refused where it has none."""
    blob = store.record(version.digest).blobs.get(NOTICE)
    if blob is None:
        raise Refused(f"{version.label} was made from no rows, so it has no {NOTICE}", where=version.label)
    return store.read_blob(blob).decode()


def document_of(acting: Acting, version: Version, document: Document) -> str:
    """A document of a version, as a user may see it. Raises Refused for one about rows where it was made from none."""
    if document == "NOTICE.md":
        return _notice(acting.store, version)
    if document == "report.html" or document == "report.md":
        return evaluations.page_of(evaluations.version_report(acting, version), document)
    if document != "datasheet.md":
        return paper_text(acting.store, version, document).decode()
    dataset = _dataset(acting.store, version)
    if dataset is None:
        raise Refused(f"{version.label} was made from no rows", where=version.label)
    return datasheet(acting.store, dataset, version.name)[1]


def _dataset(store: Store, version: Version) -> str | None:
    """The digest of the rows that a version was trained on, or else answers with."""
    parents = store.record(version.candidate).parents
    if "training" in parents:
        return store.record(parents["training"]).parents.get("dataset")
    return parents.get("dataset")


def _not_because(user: User, version: Version) -> str:
    if user.name == version.signer:
        return "You registered this version: another person decides on it."
    if not user.scope.covers(version.scope):
        return "This version is for more than your tenant or region: somebody who speaks for all of it decides."
    return ""


def _decisions(store: Store, version: Version, approvals: Approvals | None) -> tuple[Decided, ...]:
    entries = select(AuditRow).where(AuditRow.subject == version.digest, AuditRow.action.in_(serving.DECIDED))
    with store.reading() as session:
        rows = list(session.scalars(entries.order_by(AuditRow.seq.desc())))
        prints = [str(row.detail.get("signature", {}).get("key")) for row in rows]
        known = {key.fingerprint: key for key in session.scalars(select(KeyRow).where(KeyRow.fingerprint.in_(prints)))}
    decided = list[Decided]()
    for row, fingerprint in zip(rows, prints, strict=True):
        refused, key = row.action == "version.refuse", known.get(fingerprint)
        counts = False
        if approvals is not None and key is not None and (key.until is None or row.seq < key.until):
            counts = approvals.refused_by == row.actor if refused else row.actor in approvals.approvers
            approvals = None if refused else approvals  # a refusal overturns what was decided before it
        decision, label = "refuse" if refused else "approve", key.label if key else ""
        what = {"entry": row.seq, "approver": row.actor, "decision": decision, "key": label, "counts": counts}
        decided.append(Decided.of(row, **what, reason=str(row.detail.get("reason", ""))))
    return tuple(decided)


def _listed(store: Store, session: Session, rows: Iterable[VersionRow]) -> list[ListedVersion]:
    known = [versions.version_of(store, row) for row in rows]
    permissions = serving.permissions(session, known)
    aliases = list_aliases(store)
    champions = {alias.version: alias for alias in aliases if alias.alias == CHAMPION}
    canaries = set(session.scalars(select(RolloutRow.canary).where(RolloutRow.status.in_(LIVE))))
    listed = []
    for version in known:
        permission = permissions[version.digest]
        state = _REASONS.get(permission.reason, "untrusted")
        champion = champions.get(version.digest)
        if champion is not None and (state == "approved" or (state == "waiting" and champion.override_by)):
            state = "serving"
        elif version.digest in canaries and state in ("approved", "waiting"):
            state = "rolling out"
        listed.append(ListedVersion.of(version, version=version.label, state=state, why=permission.message))
    return listed


def _visible(scope: Scope, text: str) -> Select[VersionRow]:
    """The versions that a scope may see and that fit a text, the newest first."""
    query = select(VersionRow).join(RecordRow, RecordRow.digest == VersionRow.digest)
    query = query.where(*within(VersionRow, scope, or_all=True))
    query = query.order_by(RecordRow.created_at.desc(), VersionRow.name, VersionRow.number.desc())
    return query.where(_fits(text.strip())) if text.strip() else query


def _fits(text: str) -> ColumnElement[bool]:
    name, _, number = text.partition("@v")
    if is_number(number) and len(number) < 10:
        return (VersionRow.name == name) & (VersionRow.number == int(number))
    start = f"sha256:{text.removeprefix('sha256:').lower()}"
    return or_(VersionRow.name.contains(text, autoescape=True), VersionRow.digest.startswith(start, autoescape=True))


class WritePapers(ScopedRequest):
    """Papers about a version to write and sign, from its records and the project's papers.yaml.

    version: `NAME@v3`, an alias or the start of a digest. papers: by default all. tenant, region: the version's; by
    default those of whoever writes them.
    """

    version: Named
    papers: tuple[Paper, ...] = Field(default=PAPERS, min_length=1)


class WrittenPapers(View):
    """A version's papers. asks: each entry of papers.yaml that one of them misses -> what it is."""

    version: str
    papers: tuple[PaperState, ...]
    asks: dict[str, str]


@action(
    "version.papers", says="wrote a paper about a version", permission="paper.write", tokens=("jobs",), at="/papers",
    form=True, reads_files=True,
)  # fmt: skip
def papers(acting: Acting, asked: WritePapers) -> WrittenPapers:
    """Write and sign papers about a version: model card, bill of materials, provenance, drafts for the EU AI Act."""
    version, file = resolve(acting.store, asked.version, scope=acting.scope(asked)), acting.project.root / PERSON_FILE
    person = read_text_file(file, PERSON_FILE).encode() if file.exists() else b""
    chosen = tuple(dict.fromkeys(asked.papers))
    write_papers(acting.store, version, chosen, person=person, where=str(file), actor=acting.actor)
    states = papers_of(acting.store, version)
    asks = {key: ENTRIES[key] for state in states for key in state.lacks}
    return WrittenPapers(version=version.label, papers=states, asks=asks)


def save_papers(store: Store, written: WrittenPapers, folder: Path) -> None:
    """Write a version's papers into a folder, each with the envelope that signs it."""
    version = resolve(store, written.version)
    folder.mkdir(parents=True, exist_ok=True)
    for state in written.papers:
        if state.record is not None:
            write_atomic(folder / state.file, paper_text(store, version, state.file))
            write_atomic(folder / f"{state.file}.dsse.json", paper_text(store, version, state.file, kept=ENVELOPE))


class ExportedVersion(ExportBody):
    """Exported weights and the comparison with those that were measured. export: the export record's digest.

    notes: what other programs do not do as they answer.
    """

    export: str
    folder: str
    version: str
    notes: tuple[str, ...] = ()


class ExportVersion(ScopedRequest):
    """An approved version whose weights are written to target, a new folder.

    form: peft (the adapter alone), merged (a Hugging Face folder), gguf (for llama.cpp) or ollama. dtype: of merged
    weights. tenant, region: the version's; by default those of whoever exports it.
    """

    version: Named
    target: Path
    form: Form
    dtype: Dtype = "bf16"


@action("version.export", says="exported a version", permission="version.export")
def export(acting: Acting, asked: ExportVersion) -> ExportedVersion:
    """Write an approved version's weights to a new folder, after comparing them with those that were measured.

    Raises Refused where log-probabilities differ by more than the tolerance.
    """
    from tunesmith.engines.factory import engine_kind, open_engine
    from tunesmith.models.export.gguf import check_supported
    from tunesmith.registry.export import export_version

    store, settings, progress = acting.store, acting.project.settings.engine, acting.progress
    version = resolve(store, asked.version, scope=acting.scope(asked))
    candidate = load_candidate(store, version.candidate)
    base = open_base(store, candidate.base)
    if asked.form in ("gguf", "ollama"):
        check_supported(base.folder)  # before anything slow
    done = export_version(
        store,
        version,
        asked.target.absolute(),
        form=asked.form,
        dtype=asked.dtype,
        base=base,
        engine=open_engine(base, settings, progress),
        engine_kind=engine_kind(base, settings),
        actor=acting.actor,
        progress=progress,
    )
    return ExportedVersion(
        **dict(done.body),
        export=done.record,
        folder=str(done.folder),
        version=version.label,
        notes=(*done.notes, *_notes(candidate)),
    )


def _notes(candidate: Candidate) -> tuple[str, ...]:
    if candidate.answer_schema is None and candidate.answer_grammar is None:
        return ()
    rule = "grammar" if candidate.answer_schema is None else "schema"
    said = f"the weights do not hold answers to the {rule}: give it, from tunesmith.json, to the program that answers"
    notes = [said]
    if candidate.copied:
        fields = ", ".join(candidate.copied)
        notes.append(f"no other program copies {fields} from the request: such values can be invented there")
    if Constraint(candidate).any_order:
        notes.append(
            "other programs write keys in the schema's order, in which a model that learned another one may leave some "
            "out; here keys come in any order: measure the answers there, or do not hold them to the schema"
        )
    return tuple(notes)


# Decisions on versions: with the key of this machine, or with a signature made elsewhere. Over HTTP an approver asks a
# server for the statement, checks it, signs it here and sends it back: `decide`.


Answer = TypeVar("Answer", bound=View)
_SECONDS = 300  # the server verifies the version first


class DecideVersion(ScopedRequest):
    """A version to approve or refuse, with the key of this machine.

    version: NAME@v3, an alias or the start of a digest. reason: signed with the decision; a refusal needs one. tenant,
    region: the version's; by default those of whoever decides.
    """

    version: Named
    reason: Reason = ""


class PrepareDecision(DecideVersion):
    """What is to be decided. version: `NAME@v3`, an alias or the start of a digest.

    reason: signed with the decision; a refusal needs one. tenant, region: the version's, by default the caller's.
    """

    decision: Decision


class Signature(Request):
    """A signature over what was prepared. key: the fingerprint of the key that signed. signature: in base64."""

    key: Digest
    signature: Base64Bytes = Field(min_length=8, max_length=200)


class SubmitDecision(Signature):
    """A statement to sign as it was prepared, and the signature over it.

    key: the fingerprint of the key that signed. signature: ECDSA with SHA-256 over the payload that came with it, in
    base64: DER, as openssl writes it, or r and s of 32 bytes each, as WebCrypto gives it.
    """

    # A form sends it as text.
    statement: Annotated[
        JsonObject, BeforeValidator(lambda given: parse_json(given.encode()) if isinstance(given, str) else given)
    ]


def sign_here(acting: Acting) -> Callable[[JsonObject], bytes]:
    """Signs statements with the key that whoever acts has on this machine; they get one where they have none."""
    key = keys.load_signing_key(acting.store, keys.ensure_key(acting.store, acting.actor))
    return lambda stated: seal(stated, key)


class Prepared(View):
    """What a person is to sign. statement: the in-toto statement, for people.

    payload: the bytes to sign, base64: DSSE's encoding of the statement. keys: fingerprints of the person's active
    keys, newest first.
    """

    statement: JsonObject
    payload: str
    keys: tuple[str, ...]

    @classmethod
    def by(cls, acting: Acting, statement: JsonObject, **more: Any) -> Self:
        """What whoever acts is to sign."""
        payload = base64.b64encode(signed_bytes(statement)).decode()
        own = tuple(key.fingerprint for key in acting.user.active_keys)
        return cls(statement=statement, payload=payload, keys=own, **more)


class PreparedDecision(Prepared):
    """What an approver is to sign. statement: the in-toto statement, for people and to be sent back with the signature.

    payload: the bytes to sign, base64: DSSE's encoding of the statement. keys: fingerprints of the approver's active
    keys, newest first. risk: the version's class and what it takes, None for one approver. missing: what it still takes
    before this decision.
    """

    risk: Requirement | None = None
    missing: tuple[str, ...] = ()


class RecordedDecision(View):
    """An approval or refusal that counts. record: its digest; digest: the version's.

    missing: what the version takes before it may serve, this decision counted. override: why the version's gates were
    overridden, "" if they were not; marks: why it is not meant for service.
    """

    record: str
    version: str
    digest: str
    decision: Decision
    approver: str
    reason: str
    missing: tuple[str, ...] = ()
    override: str = ""
    marks: tuple[str, ...] = ()


@action("version.approve", says="approved a version", permission="version.approve")
def approve(acting: Acting, asked: DecideVersion) -> RecordedDecision:
    """Verify a version and approve it with the actor's signature. The one who registered it may not approve it."""
    return _signed_here(acting, asked, "approve")


@action("version.refuse", says="refused a version", permission="version.approve")
def refuse(acting: Acting, asked: DecideVersion) -> RecordedDecision:
    """Refuse a version with the actor's signature: it serves no request until as many people approve it again as its
    risk class takes.
    """
    return _signed_here(acting, asked, "refuse")


_decides = partial(
    action, permission="version.approve", tokens=("decisions",), form=True, refused="decision_refused",
    reads_files=True,
)  # fmt: skip


@_decides("decision.prepare", at="/decisions/prepare")
def prepare_decision(acting: Acting, asked: PrepareDecision) -> PreparedDecision:
    """Verify a version, and state what its approver signs. Changes nothing."""
    if asked.decision == "approve":
        acting.unchanged()
    version, statement = _stated(acting, asked, asked.decision)
    missing = approvals_for(acting.store, version).missing
    return PreparedDecision.by(acting, statement, risk=version.risk, missing=missing)


@_decides("decision.submit", at="/decisions")
def submit_decision(acting: Acting, asked: SubmitDecision) -> RecordedDecision:
    """Check a decision that was signed elsewhere and record it. The caller must be the one who signed it."""
    _, digest, stated = read_statement(asked.statement)
    if stated.decision == "approve":
        acting.unchanged()
    envelope = envelope_of(asked.statement, asked.key, asked.signature)
    recorded = submit_approval(acting.store, envelope, by=acting.actor)
    return _recorded(acting.store, versions.load_version(acting.store, digest), recorded)


def approvals_for(store: Store, version: Version) -> Approvals:
    """Who approved or refused a version, and what it still takes before it may serve."""
    with store.reading() as session:
        return serving.approvals_of(session, version)


def decide(server: str, key_file: Path | None, asked: PrepareDecision, *, actor: str | None = None) -> RecordedDecision:
    """Approve or refuse a version (NAME@v3) on a server, with a key that stays here. The token is $TUNESMITH_TOKEN.

    actor: the user whose token it must be; by default anybody. Raises UsageError for a server without TLS on another
    host, or without a token or key; Refused if the server says no, or asks for a signature over something else.
    """
    VersionRef.parse(asked.version)  # an alias may move between what was read and what is signed
    token = os.environ.get("TUNESMITH_TOKEN", "")
    if not token:
        raise UsageError("no token", where="$TUNESMITH_TOKEN", fix=NextStep("have an admin make one", "users token"))
    if key_file is None:
        raise UsageError("a decision on a server is signed with a key of yours", where="key", fix="name its file")
    private = keys.load_private_key(key_file)
    own = fingerprint_of(private)
    if not is_private(server):
        raise UsageError(
            f"{server[:80]!r} is no address, or would get the token without encryption",
            where="server",
            fix="https://HOST, or http://127.0.0.1:PORT",
        )
    with httpx.Client(base_url=server, timeout=_SECONDS, headers={"Authorization": f"Bearer {token}"}) as http:
        prepared = _sent(http, prepare_decision, asked.model_dump(mode="json", exclude_none=True))
        if own not in prepared.keys:
            raise Refused(
                "this key is not an active one of the token's user",
                where=str(key_file),
                fix=NextStep("enrol it", "keys enrol"),
            )
        statement = prepared.statement
        label, _, stated = read_statement(statement)
        if (label, stated.decision, stated.reason) != (asked.version, asked.decision, asked.reason):
            raise Refused(
                f"the server asks for another signature than you meant to give: {stated.decision} {label}",
                fix="tell the server's operator; nothing was signed",
            )
        if actor not in (None, stated.approver):
            raise Refused(f"the token is {stated.approver}'s, not {actor}'s", where="$TUNESMITH_TOKEN")
        signature = private.sign(signed_bytes(statement), ec.ECDSA(hashes.SHA256()))
        signed = {"statement": statement, "key": own, "signature": base64.b64encode(signature).decode()}
        return _sent(http, submit_decision, signed)


def _stated(acting: Acting, asked: DecideVersion, decision: Decision) -> tuple[Version, JsonObject]:
    """The version, and what the actor signs to decide on it."""
    version = resolve(acting.store, asked.version, scope=acting.scope(asked))
    return version, prepare_approval(acting.store, version, acting.actor, asked.reason, decision)


def _signed_here(acting: Acting, asked: DecideVersion, decision: Decision) -> RecordedDecision:
    version, statement = _stated(acting, asked, decision)
    key = keys.load_signing_key(acting.store, keys.ensure_key(acting.store, acting.actor))
    return _recorded(acting.store, version, submit_approval(acting.store, seal(statement, key)))


def _recorded(store: Store, version: Version, recorded: RecordedApproval) -> RecordedDecision:
    return RecordedDecision.of(
        recorded.approval,
        record=recorded.digest,
        version=version.label,
        digest=version.digest,
        missing=approvals_for(store, version).missing,
        override=version.override or "",
        marks=version.marks,
    )


def _sent(http: httpx.Client, to: Action[Any, Answer], asked: JsonObject) -> Answer:
    """What an action of the server returns."""
    try:
        answer = http.post(f"/api{to.at}", json=asked)
        if answer.is_success:
            return to.result.model_validate(answer.json())
        said = str(answer.json()["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"the server did not answer: {error or type(error).__name__}", where=str(http.base_url)
        ) from error
    raise Refused(f"the server said no ({answer.status_code}): {said}", where=str(http.base_url))
