"""The facts that papers state: each is a field of one of the version's records, or a person's entry in papers.yaml."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, create_model
from pydantic_core import to_jsonable_python

from tunesmith.core.digests import digest_bytes, short
from tunesmith.core.errors import UsageError
from tunesmith.core.reading.strict_yaml import read_yaml
from tunesmith.core.text.display import printable
from tunesmith.core.text.names import check_hub_id
from tunesmith.core.text.wording import detail_text
from tunesmith.core.values import Settings, first_problem
from tunesmith.records.body import bodies
from tunesmith.records.version import PaperField
from tunesmith.store.records import Record
from tunesmith.store.store import Store

PERSON_FILE = "papers.yaml"
INSTALLED = "installed package"
# Entries that a record states for newer versions: entry -> where.
_RECORDED: Mapping[str, str] = {"base_parameters": "training.base_parameters"}
NOT_ADVICE = "This paper is a draft made from records. It is not legal advice."
_MARKUP = re.compile(r"([\\`*_\[\]#|~$])")


@cache
def data_file(name: str) -> Any:
    """A YAML file beside this module: what papers ask."""
    return read_yaml((files("tunesmith.registry.papers") / name).read_text(encoding="utf-8"), name)


_HubId = Annotated[str, Field(max_length=200), AfterValidator(lambda text: text and check_hub_id(text))]
_KINDS: Mapping[str, Any] = {
    "texts": Annotated[str, Field(max_length=20_000)],
    "lists": list[Annotated[str, Field(max_length=200)]],
    "numbers": Annotated[float, Field(gt=0)],
    "hub_ids": _HubId,
    "lists_of_hub_ids": list[_HubId],
}
# What each entry of papers.yaml is. Nothing is required; a paper names each entry that it misses.
ENTRIES: Mapping[str, str] = {key: said for kind in _KINDS for key, said in data_file("person.yaml")[kind].items()}
_Entries: type[Settings] = create_model(  # type: ignore[call-overload]
    "PersonFields",
    __base__=Settings,
    **{key: (_KINDS[kind] | None, None) for kind in _KINDS for key in data_file("person.yaml")[kind]},
)


def read_person(data: bytes, where: str) -> dict[str, Any]:
    """The entries of a papers.yaml that say something. Raises UsageError, with the nearest entry for an unknown one."""
    try:
        read = read_yaml(data.decode(), where)
        entries = _Entries.model_validate({} if read is None else read).model_dump(exclude_none=True)
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason}", where=where) from error
    except ValidationError as error:
        key, said = first_problem(error)
        near = difflib.get_close_matches(key, ENTRIES, n=1, cutoff=0.5) if "not permitted" in said else ()
        said += "".join(f"; did you mean {each!r}?" for each in near)
        fix = f"the entries are {', '.join(ENTRIES)}"
        raise UsageError(f"{key}: {said}" if key else said, where=where, fix=fix) from error
    return {key: value for key, value in entries.items() if not isinstance(value, str) or value.strip()}


def records_behind(store: Store, version: str) -> dict[str, Record]:
    """Digest -> record: a version and the records that its papers are made from. Raises Refused for a missing one."""
    records = {version: store.record(version, kind="version")}
    named = [records[version].parents[role] for role in ("candidate", "evaluation", "verdict")]
    while named:
        digest = named.pop()
        records[digest] = store.record(digest)
        if records[digest].kind in ("candidate", "training"):
            named += records[digest].parents.values()
    return records


class Draft:
    """A paper while it is written. fields: its fields so far -> where each comes from; missing: entries of papers.yaml
    that it needs and nobody made.

    person: the content of papers.yaml; where: its place, for messages.
    """

    def __init__(self, version: str, records: Mapping[str, Record], person: bytes, where: str = PERSON_FILE) -> None:
        self._person, self._person_digest = read_person(person, where), digest_bytes(person)
        self.fields: dict[str, list[PaperField]] = {}
        self.missing: list[str] = []
        parents = records[version].parents
        named = {"version": version, **{role: parents[role] for role in ("candidate", "evaluation", "verdict")}}
        above = records[parents["candidate"]].parents
        named |= {role: above[role] for role in ("base", "training", "dataset", "documents") if role in above}
        if "training" in named:  # the rows that it learned from, not those that it may also answer with
            named["dataset"] = records[named["training"]].parents["dataset"]
        self._records = {role: (digest, records[digest]) for role, digest in named.items()}
        self._bodies = {role: bodies()[role].of(record) for role, (_, record) in self._records.items()}
        self.name = str(self.read("verdict.name"))

    def has(self, kind: str) -> bool:
        """Whether the version was made from a record of this kind."""
        return kind in self._records

    def digest(self, kind: str) -> str:
        """The digest of the version's record of a kind."""
        return self._records[kind][0]

    def read(self, path: str) -> Any:
        """What a record states at a path such as training.tokens; None without such a record. `*`: the candidate's name
        in the evaluation; blobs: the record's files."""
        kind, *steps = path.split(".")
        if not self.has(kind):
            return None
        value: Any = self._records[kind][1] if steps[0] == "blobs" else self._bodies[kind]
        for step in steps:
            key = self.name if step == "*" else step
            value = value[key] if isinstance(value, Mapping) else getattr(value, key)
        return value

    def take(self, field: str, path: str) -> Any:
        """As `read`, for a field of the paper: it is noted where it comes from."""
        kind, _, rest = path.partition(".")
        record = self.digest(kind) if self.has(kind) else ""
        self.note(field, PaperField(kind=kind, record=record, field=rest.replace("*", self.name)))
        return self.read(path)

    def ask(self, field: str, key: str) -> Any:
        """What a record states for an entry, or a person's entry. None where there is neither, which is noted."""
        if self._is_recorded(key):
            return self.take(field, _RECORDED[key])
        if key in self._person:
            self.note(field, PaperField(kind=PERSON_FILE, record=self._person_digest, field=key))
        elif key not in self.missing:
            self.missing.append(key)
        return self._person.get(key)

    def note(self, field: str, origin: PaperField) -> None:
        """Note where a field of the paper comes from."""
        if origin not in self.fields.setdefault(field, []):
            self.fields[field].append(origin)

    def line(self, label: str, path: str, place: str = "") -> str:
        """A line of a Markdown list: the label, what a record states, and which record that is. place: tells the field
        from others with this label."""
        value, (kind, _, field) = self.take(label + place, path), path.partition(".")
        if not self.has(kind):
            return f"- {plain(label)}: there is none, since the version was made without a {kind} record"
        return f"- {plain(label)}: {plain(shown(value))} ({kind} {short(self.digest(kind))}, {plain(field)})"

    def asked(self, key: str, place: str = "") -> str:
        """A line of a Markdown list: what a person entered, or that a person must."""
        label = key.replace("_", " ")
        if self._is_recorded(key):
            return self.line(label, _RECORDED[key], place)
        value = self.ask(label + place, key)
        if value is None:
            return f"- {label}: **a person must fill this in**: `{key}` in {PERSON_FILE}, {ENTRIES[key]}"
        return f"- {label}: {plain(shown(value))} ({PERSON_FILE}, {plain(key)})"

    def _is_recorded(self, key: str) -> bool:
        return key in _RECORDED and bool(self.read(_RECORDED[key]))

    def answers(self, one: Mapping[str, Any], place: str = "") -> str:
        """What a question or section of a data file asks: its text, and a line for each answer. place: as `line`."""
        lines = [one["text"], ""] if "text" in one else []
        lines += [self.line(label, path, place) for label, path in one.get("records", {}).items()]
        return "\n".join(lines + [self.asked(key, place) for key in one.get("person", ())])

    def origins(self) -> Iterator[tuple[str, PaperField]]:
        """Every field with each place that it comes from."""
        return ((field, origin) for field, several in self.fields.items() for origin in several)


def plain(text: str) -> str:
    """A text for Markdown in which nothing is markup: on one line, HTML and Markdown escaped, nothing hidden."""
    return _MARKUP.sub(r"\\\1", html.escape(printable(" ".join(str(text).split())), quote=False))


def shown(value: Any) -> str:
    """A value of a record in one line."""
    value = to_jsonable_python(value)
    if isinstance(value, list):
        return "; ".join(map(shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return detail_text(value) if value not in (None, {}) else "none"
