"""The `data:` part of the project file: where rows come from and what may become of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tunesmith.core.settings import Settings

Format = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt"]
Action = Literal["report", "pseudonymise", "remove", "refuse"]

# Licences that allow training and redistribution of the result with at most attribution. Share-alike (CC-BY-SA, ODbL)
# and any licence of one's own (LicenseRef-...) must be allowed by name; non-commercial and no-derivatives never are
# by default.
PERMISSIVE = (
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC0-1.0",
    "CDLA-Permissive-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "ODC-By-1.0",
    "PDDL-1.0",
    "Unlicense",
)

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


class Source(Settings):
    """Files of rows under one licence."""

    path: Annotated[str, Field(min_length=1, description="a file, or a glob such as data/*.jsonl, from the project")]
    licence: Annotated[str | None, Field(description="SPDX expression; rows may carry their own instead")] = None
    format: Annotated[Format, Field(description="the rows' shape; auto tells it from the first row's keys")] = "auto"
    rename: Annotated[dict[str, str], Field(description="a row's key -> the key that the format knows")] = {}  # noqa: RUF012
    licence_key: Annotated[str, Field(description="the row's key that holds its licence")] = "licence"
    subject_key: Annotated[str, Field(description="the row's key that names whose data it is")] = "subject"
    tenant_key: Annotated[str, Field(description="the row's key that names its tenant")] = "tenant"
    region_key: Annotated[str, Field(description="the row's key that names its region")] = "region"
    split: Annotated[
        Literal["test"] | None,
        Field(description="test holds these rows out, with all rows of their groups; null lets the group decide"),
    ] = None

    @model_serializer(mode="wrap")
    def _without_defaults_that_came_later(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A source that does not say its split reads as it did before there was one: datasets keep their digests."""
        stated: dict[str, Any] = serialise(self)
        return {key: value for key, value in stated.items() if key != "split" or value is not None}


class Licences(Settings):
    """What may be trained on."""

    allow: Annotated[tuple[str, ...], Field(description="SPDX licence ids that rows may stand under")] = PERMISSIVE


class Privacy(Settings):
    """What is done about personal data and secrets in the rows."""

    action: Annotated[
        Action,
        Field(description="report: count only; pseudonymise: replace; remove: leave the row out; refuse: stop"),
    ] = "pseudonymise"
    entities: Annotated[tuple[str, ...], Field(description="what is looked for")] = ENTITIES
    minimum_score: Annotated[float, Field(gt=0, le=1, description="presidio's least score that counts")] = 0.4


class Duplicates(Settings):
    """When two rows are one."""

    near: Annotated[
        float | None,
        Field(ge=0.5, le=1, description="Jaccard similarity of two requests' character trigrams; null looks for none"),
    ] = 0.8


class Split(Settings):
    """Which rows are held out. Whole groups are, and a group stays where it is when other rows come."""

    validation: Annotated[float, Field(ge=0, lt=1, description="share of groups for validation")] = 0.05
    test: Annotated[float, Field(gt=0, lt=1, description="share of groups for the test")] = 0.10
    group_by: Annotated[
        str | None, Field(description="the row's key that names its group; null groups by the request's wording")
    ] = None
    seed: Annotated[int, Field(ge=0, description="another seed holds out other groups")] = 0

    @model_validator(mode="after")
    def _leaves_rows_to_train_on(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must be less than 1")
        return self


class DataSettings(Settings):
    """How the dataset version is made."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1, description="where the rows are")]
    licences: Annotated[Licences, Field(description="what may be trained on")] = Licences()
    privacy: Annotated[Privacy, Field(description="personal data and secrets")] = Privacy()
    duplicates: Annotated[Duplicates, Field(description="repeated rows")] = Duplicates()
    split: Annotated[Split, Field(description="what is held out")] = Split()
    overlong: Annotated[
        Literal["refuse", "drop", "truncate"],
        Field(description="a row of more tokens than fit: stop, leave it out, or drop its oldest turns"),
    ] = "refuse"
