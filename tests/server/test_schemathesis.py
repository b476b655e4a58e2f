"""Schemathesis sends what the OpenAPI document allows, and what it does not, to every route of a running server."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.attack_table import Happened
from tests.fabricate import NAME, Scene
from tests.server.conftest import Served, running_copy
from tunesmith.server.app import openapi_document

OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(openapi_document()).get_all_operations()]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
UNCHECKED = list(HealthCheck)


@pytest.fixture(scope="module")
def fuzzed(made: Scene, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of this file's own: what is made of the document makes tokens, files and jobs, and ends rollouts."""
    with running_copy(made, tmp_path_factory.mktemp("schemathesis")) as server:
        yield server


@pytest.mark.slow
@pytest.mark.attack("input", "what schemathesis makes of the OpenAPI document")
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_every_route_answers_as_documented(
    fuzzed: Served, operation: Any, mode: GenerationMode, happened: Happened
) -> None:
    tokens = [f"Bearer {fuzzed.token}"] * 6 + ["Bearer tsk_nobody", "Basic x", "Bearer", ""]
    sent: Counter[int] = Counter()

    # Most of what can go wrong is in bodies.
    @settings(
        max_examples=10 if operation.method == "post" else 4,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=UNCHECKED,
    )
    @given(case=operation.as_strategy(generation_mode=mode), token=st.sampled_from(tokens))
    def answers(case: Any, token: str) -> None:
        case.headers = {key: value for key, value in case.headers.items() if key.lower() != "authorization"}
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body = {**case.body, "model": NAME}
        response = case.call_and_validate(base_url=fuzzed.url, headers={"Authorization": token}, checks=CHECKS)
        sent[response.status_code] += 1

    with contextlib.suppress(Unsatisfiable):  # nothing that is not allowed can be sent to some routes
        answers()
    for status, count in sent.items():
        happened(f"{status}, as documented", count)
