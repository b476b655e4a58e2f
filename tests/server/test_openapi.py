"""The OpenAPI document describes every route, and answers are as it says."""

from __future__ import annotations

from typing import Any

import openapi_spec_validator
import pytest

from tests.server.conftest import Served
from tests.server.test_access import OPEN, decisions
from tunesmith.server.app import openapi_document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi_document()


def test_the_document_is_valid_and_describes_every_route(document: dict[str, Any], shared: Served) -> None:
    openapi_spec_validator.validate(document)
    stated = {(path, method.upper()) for path, operations in document["paths"].items() for method in operations}
    taken = {
        (path.replace(":path", ""), method)
        for path, methods, made in decisions(shared.app.routes)
        for method in methods.split()
        if path in OPEN or not set(made) & {"public", "session"}
    }
    assert stated == taken
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("security" in operation) == (path not in OPEN), f"{method} {path}"
