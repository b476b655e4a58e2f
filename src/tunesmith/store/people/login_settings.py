"""The project file's `login:`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from tunesmith.core.access import Name
from tunesmith.core.system.http_clients import is_private
from tunesmith.core.values import Settings


class LoginSettings(Settings):
    """An identity provider (OpenID Connect) that people log in to the console with."""

    issuer: str = Field(description="the provider's issuer, such as https://id.example.org")
    client: str = Field(min_length=1, description="the client id that the provider knows this server by")
    secret: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="the environment variable with the client's secret"
    )
    url: str = Field(description="where people reach this server; the provider sends them to URL/console/oidc/done")
    claim: Literal["email", "sub"] = Field(
        default="email",
        description="what the provider says of a person that tells who they are; an email must be verified",
    )
    users: dict[Annotated[str, Field(min_length=1, max_length=256)], Name] = Field(
        min_length=1, description="the user whom each value of the claim is; nobody else can log in this way"
    )

    @field_validator("issuer", "url")
    @classmethod
    def _nobody_reads_it(cls, url: str) -> str:
        if not is_private(url):
            raise ValueError(f"{url!r} is neither https:// nor http:// on this machine")
        return url.rstrip("/")
