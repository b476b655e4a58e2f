"""The models of all kinds of records, by kind. The records reference is generated from them."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.records.body import Body
from tunesmith.records.search import SearchBody

BODIES: Mapping[str, type[Body]] = {body.kind: body for body in (SearchBody,)}
