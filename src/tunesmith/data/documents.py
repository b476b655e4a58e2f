"""Documents for retrieval: reads them, cuts them into passages, and keeps these as a record."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Discriminator, Field, Tag, model_validator

from tunesmith.core.access import Caller, Labels, Name, OptionalName
from tunesmith.core.digests import canonical_lines, digest_of, short
from tunesmith.core.errors import Refused, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.text.names import Scope
from tunesmith.core.values import Frozen, Settings
from tunesmith.data.dataset import read_lines
from tunesmith.data.governance.licences import spelled
from tunesmith.data.governance.withdrawn import Withdrawn
from tunesmith.data.privacy.scan import Scan, Scanner
from tunesmith.data.settings import Privacy, Source
from tunesmith.data.sources.document_readers import Paragraphs
from tunesmith.data.sources.file_types import DOCUMENT_FILES
from tunesmith.data.sources.files import OpenSource, SourceFile, find_files, open_source
from tunesmith.records.dataset import DocumentFile, DocumentsBody, DocumentsScan, ReadDocuments
from tunesmith.store.store import Store

PASSAGES = "passages.jsonl"
_LARGEST = 64 << 20
_BETWEEN = "\n\n"  # paragraphs, whose spacing is plain
_LONGEST_WORD = 1000  # characters: a file without spaces would be one passage


class LabelledPath(Labels):
    """Documents that not everybody may see."""

    path: str = Field(min_length=1, description="path or glob of the documents that carry these labels")

    @model_validator(mode="after")
    def _labelled(self) -> LabelledPath:
        if self.labels == Labels():
            raise ValueError("give it a tenant, a region or groups; documents for everybody are named by a path alone")
        return self

    @property
    def labels(self) -> Labels:
        """The labels without the path."""
        groups = None if self.groups is None else tuple(sorted(set(self.groups)))
        return Labels(tenant=self.tenant, region=self.region, groups=groups)


class AskedAs(Settings):
    """The caller that evaluations and `tunesmith chat` stand for. {}: one who sees only documents without labels."""

    tenant: OptionalName = Field(default="", description="its tenant")
    region: OptionalName = Field(default="", description="its region")
    groups: tuple[Name, ...] = Field(default=(), description="its groups")

    @property
    def caller(self) -> Caller:
        """As the caller of a request."""
        return Caller(Scope(self.tenant, self.region), frozenset(self.groups))


# Told apart by hand, so that an error of one is not reported as an error of the other.
_Path = Annotated[
    Annotated[str, Field(min_length=1), Tag("path")] | Annotated[LabelledPath, Tag("labelled")],
    Discriminator(lambda given: "path" if isinstance(given, str) else "labelled"),
]


class DocumentSettings(Settings):
    """`documents:` of the project file."""

    paths: tuple[_Path, ...] = Field(
        min_length=1,
        description="paths or globs of .md, .txt, .html or .pdf files, relative to the project. Everybody may see "
        "a document, unless it is named by a path with labels",
    )
    asked_as: AskedAs | None = Field(
        default=None,
        description="the caller that evaluations and `tunesmith chat` stand for; needed where a path has labels. "
        "Training rows get only documents without labels",
    )
    licence: str | None = Field(default=None, description="SPDX licence expression, kept in the record")
    words: int = Field(default=160, ge=20, le=1000, description="maximum words of a passage")
    overlap: int = Field(default=24, ge=0, le=500, description="words that a passage repeats from the one before it")

    @model_validator(mode="after")
    def _unambiguous(self) -> DocumentSettings:
        if len(self.labels) < len(self.paths):
            raise ValueError("paths name the same path twice, so its labels are unclear")
        if self.asked_as is None and any(isinstance(each, LabelledPath) for each in self.paths):
            raise ValueError(
                "paths have labels: say with asked_as whose view evaluations and chats have, such as "
                "{tenant: acme, groups: [support]}, or {} for documents without labels only"
            )
        return self

    @property
    def labels(self) -> dict[str, Labels]:
        """Path -> the labels of its documents."""
        return dict((each, Labels()) if isinstance(each, str) else (each.path, each.labels) for each in self.paths)


class Passage(Frozen):
    """A piece of a document. title: the headings above it. id: a digest of its text, title and source.

    labels: who may see it. There is no default, so that a passage whose labels were lost is not shown to everybody.
    """

    id: str
    source: str
    title: str
    text: str
    labels: Labels


class Documents:
    """A documents record and its passages."""

    def __init__(self, store: Store, digest: str) -> None:
        self.digest, self._store = digest, store
        self.record = store.record(digest, kind="documents")

    @property
    def asked_as(self) -> Caller:
        """The caller that evaluations and `tunesmith chat` stand for."""
        return AskedAs.model_validate(DocumentsBody.of(self.record).settings.asked_as or {}).caller

    @cached_property
    def passages(self) -> list[Passage]:
        """All passages, in the order of the files and their text. Raises Refused where the record is damaged."""
        return read_lines(self._store, self.record, PASSAGES, Passage)


def document_files(settings: DocumentSettings, root: Path) -> list[SourceFile]:
    """The files that the settings name.

    Raises UsageError for a pattern that matches none, for a file that two patterns match (its labels would be unclear)
    and for other file types.
    """
    files = find_files([Source(path=path, licence=settings.licence) for path in settings.labels], root)
    for file in files:
        if file.path is None:
            raise UsageError("documents must be local files", where=file.name, fix="download it first")
        if Path(file.name).suffix.lower() not in DOCUMENT_FILES:
            known = ", ".join(sorted(DOCUMENT_FILES))
            raise UsageError("documents of this type cannot be read", where=file.name, fix=f"use one of {known}")
    return files


def build_documents(
    store: Store,
    settings: DocumentSettings,
    root: Path,
    privacy: Privacy,
    control_tokens: Sequence[str] = (),
    withdrawn: Withdrawn = Withdrawn(),
) -> str:
    """Read, scan and cut the documents; returns the digest of their record. The same input gives the same digest.

    Personal data is treated as in rows (data.privacy); under `remove` a paragraph that holds some is left out and
    counted. control_tokens: those of the chat template, with which a document could start another speaker's turn.
    withdrawn: recalled documents are left out. Raises UsageError for documents that cannot be read or hold no text;
    Refused for control tokens, for a recalled licence, and for personal data under `refuse`.
    """
    settings = _with_standing_licence(settings, withdrawn)
    scanner, labels_of = Scanner(privacy), settings.labels
    values: Counter[str] = Counter()
    passages: dict[str, Passage] = {}
    described, left_out, removed = [], [], 0
    for file in document_files(settings, root):
        if withdrawn.names("source", file.name):
            left_out.append(file.name)
            continue
        with open_source(file) as opened:
            blocks = list(_read(opened))
        texts = "\n".join(itertools.chain.from_iterable(blocks))
        if token := next((token for token in control_tokens if token in texts), None):
            what, fix = f"a document holds the base's control token {token!r}", "remove it from the text"
            raise Refused(what, where=file.name, fix=fix)
        left = list[tuple[str, str]]()
        for title, section in itertools.groupby(blocks, key=lambda block: block[0]):
            paragraphs = [text for _, text in section]
            whole = _BETWEEN.join(paragraphs)  # scanned before it is cut: a cut may part a value
            scan = scanner.scan([Message(role="system", content=title), Message(role="user", content=whole)])
            values.update(scan.counts)
            if scan.counts and privacy.action == "refuse":
                fix = "clean it, or set data.privacy.action to pseudonymise or remove"
                raise Refused(f"a document holds {', '.join(sorted(scan.counts))}", where=file.name, fix=fix)
            standing = _standing(title, paragraphs, scan, privacy.action)
            removed += len(paragraphs) - len(standing) if privacy.action == "remove" else 0
            left += standing
        pieces = list(cut(left, settings.words, settings.overlap))
        for title, text in pieces:
            name = short(digest_of({"source": file.name, "title": title, "text": text}), 20)
            labels = labels_of[file.source.path]
            passages.setdefault(name, Passage(id=name, source=file.name, title=title, text=text, labels=labels))
        if not blocks:
            raise UsageError("the document holds no text", where=file.name, fix="remove it, or add its text as .txt")
        described.append(DocumentFile(path=file.name, digest=opened.digest, bytes=opened.bytes, passages=len(pieces)))
    if not passages:
        fix = "add documents that were not recalled" if left_out else "check data.privacy.action"
        raise UsageError("no passage is left to retrieve from", where="documents", fix=fix)
    asked_as = (settings.asked_as or AskedAs()).caller
    if not any(passage.labels.visible_to(asked_as) for passage in passages.values()):
        raise UsageError(
            "the caller of evaluations sees none of the documents, so retrieval would not be measured",
            where="documents.asked_as",
            fix="give it the tenant, region or groups of some documents",
        )
    body = DocumentsBody(
        settings=ReadDocuments.model_validate(settings.model_dump(mode="json")),
        files=tuple(described),
        passages=len(passages),
        removed=removed,
        privacy=DocumentsScan(action=privacy.action, found=values),
        withdrawn=tuple(left_out),
    )
    data = canonical_lines(passage.model_dump(mode="json") for passage in passages.values())
    return store.put_record(body.record({}, {PASSAGES: store.put_bytes(data)}))


def _with_standing_licence(settings: DocumentSettings, withdrawn: Withdrawn) -> DocumentSettings:
    """The settings with the licence in SPDX's spelling, by which it is recalled. Raises Refused where it was."""
    if settings.licence is None:
        return settings
    licence = spelled(settings.licence)
    if withdrawn.names("licence", licence):
        raise Refused(
            f"all documents have the licence {licence}, which was recalled, or needs one that was",
            where="documents.licence",
            fix="remove these documents, or state the licence that they have",
        )
    return settings.model_copy(update={"licence": licence})


def _standing(title: str, paragraphs: Sequence[str], scan: Scan, action: str) -> list[tuple[str, str]]:
    """What stays of a section's paragraphs after a scan that found something, or nothing."""
    if not scan.counts or action == "report":
        return [(title, text) for text in paragraphs]
    if scan.messages is None:
        return []
    heading, text = (message.content for message in scan.messages)
    changed = text.split(_BETWEEN)
    if action == "pseudonymise":
        return [(heading, each) for each in changed]
    if heading != title or len(changed) != len(paragraphs):  # in the heading, or over several paragraphs
        return []
    return [(title, each) for each, now in zip(paragraphs, changed, strict=True) if each == now]


def cut(blocks: Sequence[tuple[str, str]], words: int, overlap: int) -> Paragraphs:
    """(title, text) passages of at most `words` words, cut from (title, paragraph) blocks.

    Paragraphs under one heading are joined while they fit. A longer paragraph is cut, and each piece repeats the last
    `overlap` words of the piece before. A word of more than _LONGEST_WORD characters is cut too.
    """
    overlap = min(overlap, words // 2)
    title, held = "", list[str]()
    for heading, paragraph in [*blocks, ("", "")]:
        pieces = [
            word[at : at + _LONGEST_WORD] for word in paragraph.split() for at in range(0, len(word), _LONGEST_WORD)
        ]
        if held and (heading != title or len(held) + len(pieces) > words):
            yield title, " ".join(held)
            held = []
        title = heading
        start = 0
        while len(pieces) - start > words:
            yield title, " ".join(pieces[start : start + words])
            start += words - overlap
        held += pieces[start:]
    if held:
        yield title, " ".join(held)


def _read(opened: OpenSource) -> Paragraphs:
    """(headings above, paragraph) in order, in plain spacing."""
    if opened.bytes > _LARGEST:
        raise UsageError(
            f"the document is larger than {_LARGEST >> 20} MB", where=opened.file.name, fix="split it into several"
        )
    for title, text in opened.paragraphs():
        plain = " ".join(text.encode("utf-8", "ignore").decode().replace("\0", " ").split())
        if plain:
            yield title, plain
