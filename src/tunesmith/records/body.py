"""The base of the models of records' bodies: how they are read and written."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from tunesmith import records
from tunesmith.core.digests import short
from tunesmith.core.errors import Refused
from tunesmith.store.records import Record
from tunesmith.store.store import Store


class Part(BaseModel):
    """A part of a body. Keys that it does not name are kept when it is written again.

    A field that earlier versions did not write has a default, which is not written.
    """

    model_config = ConfigDict(frozen=True, extra="allow")


class Body(Part):
    """What a record of one kind states."""

    kind: ClassVar[str]

    @classmethod
    def of(cls, record: Record) -> Self:
        """What a record states. Raises Refused where that is not what a record of this kind states."""
        try:
            if record.kind != cls.kind:
                raise ValueError(f"it is a record of the kind {record.kind}")
            return cls.model_validate_json(to_json(record.body), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except ValueError as error:
            said = str(error)
        raise Refused(
            f"record {short(record.digest)} does not state what {cls.kind} records state: {said}",
            where=f"record {record.digest}",
            fix="restore it from a backup, or make it again where an earlier version wrote it",
        )

    @classmethod
    def read(cls, store: Store, digest: str) -> Self:
        """What a record of the store states. Raises Refused and UsageError as `Store.record` and `of` do."""
        return cls.of(store.record(digest, kind=cls.kind))

    @property
    def line(self) -> str:
        """One line that distinguishes the record from others of its kind."""
        return ""

    def record(self, parents: Mapping[str, str], blobs: Mapping[str, str] | None = None) -> Record:
        """A record that states this: exactly the fields that were set. parents, blobs: as `Record` has them."""
        body = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return Record(kind=self.kind, parents=parents, blobs=blobs or {}, body=body)


@cache
def bodies() -> Mapping[str, type[Body]]:
    """The models of all kinds of records, by kind. The records reference is generated from them."""
    for module in pkgutil.iter_modules(records.__path__):
        importlib.import_module(f"{records.__name__}.{module.name}")
    return {body.kind: body for body in Body.__subclasses__()}
