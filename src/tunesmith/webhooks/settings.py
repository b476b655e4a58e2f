"""The project file's `webhooks:`."""

from __future__ import annotations

from typing import Final, Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tunesmith.core.system.http_clients import is_private
from tunesmith.core.values import Settings

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "drift.detected",
    "retraining.queued",
    "version.waiting_for_approval",
    "version.approved",
    "version.refused",
    "rollout.started",
    "rollout.promoted",
    "rollout.aborted",
    "rollout.rolled_back",
    "champion.refused",
    "champion.restored",
    "recall.started",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
# What `tunesmith webhooks test` sends; no webhook need ask for it.
TEST: Final = "webhook.test"


class WebhookSettings(Settings):
    """Where events are sent, and which."""

    url: str = Field(max_length=2000, description="where events are sent by POST: https://HOST/PATH")
    events: tuple[EventType, ...] = Field(
        default=EVENT_TYPES, min_length=1, description="the events that are sent; by default all"
    )
    secret: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="the environment variable with the secret that signs: whsec_ and 24 to 64 bytes in base64",
    )
    plain_http: bool = Field(
        default=False, description="allow http:// to another machine, where everybody on the way reads the events"
    )

    @field_validator("url")
    @classmethod
    def _a_web_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"it is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
            raise ValueError("write https://HOST/PATH")
        if parts.username is not None or parts.password is not None:
            raise ValueError("leave user and password out of it: the receiver knows the sender by its signature")
        return url

    @model_validator(mode="after")
    def _encrypted(self) -> WebhookSettings:
        if not (self.plain_http or is_private(self.url)):
            raise ValueError("url: write https://, or add plain_http: true")
        return self

    @property
    def host(self) -> str:
        """The URL's host. The rest of the URL may hold a secret, and is not shown."""
        return urlsplit(self.url).hostname or ""
