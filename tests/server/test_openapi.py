"""The OpenAPI document describes every route, and answers are as it says."""

from __future__ import annotations

from typing import Any

import openapi_spec_validator
import pytest
from jsonschema import Draft202012Validator

from tests.fabricate import NAME
from tests.server.conftest import HELLO, Served
from tunesmith.server.app import openapi_document


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi_document()


def test_openapi_document_is_valid(document: dict[str, Any]) -> None:
    openapi_spec_validator.validate(document)
    assert document["paths"].keys() == {
        "/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/api/feedback", "/api/rollouts",
        "/api/feedback/{request_id}",
        "/api/rollouts/{number}", "/api/jobs", "/api/jobs/{number}", "/api/jobs/{number}/log",
        "/api/jobs/{number}/curves",
        "/api/jobs/{number}/cancel", "/api/jobs/{number}/pause", "/api/jobs/{number}/resume", "/healthz", "/readyz",
        "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job}", "/v1/fine_tuning/jobs/{job}/cancel",
        "/v1/fine_tuning/jobs/{job}/pause", "/v1/fine_tuning/jobs/{job}/resume", "/v1/fine_tuning/jobs/{job}/events",
        "/v1/fine_tuning/jobs/{job}/checkpoints",
        "/metrics", "/api/decisions", "/api/decisions/prepare", "/v1/files", "/v1/files/{file}",
        "/v1/files/{file}/content", "/api/tokens", "/api/tokens/{user}/{name}",
        "/api/held", "/api/held/{identifier}", "/api/held/{identifier}/decide", "/api/jobs/{number}/compare/{other}",
        "/api/evaluations", "/api/evaluations/{digest}", "/api/evaluations/{digest}/findings",
        "/api/evaluations/{digest}/requests", "/api/evaluations/{digest}/requests/{row}",
        "/api/versions", "/api/versions/{name}/{number}", "/api/versions/{name}/{number}/lineage",
        "/api/versions/{name}/{number}/records/{digest}", "/api/versions/{name}/{number}/records/{digest}/rows",
        "/api/versions/{name}/{number}/verification", "/api/versions/{name}/{number}/documents/{document}",
        "/api/rollouts/{number}/course", "/api/rollouts/{number}/resume", "/api/rollouts/{number}/promote",
        "/api/rollouts/{number}/abort", "/api/rollouts/{number}/rollback",
        "/api/datasets", "/api/datasets/{digest}", "/api/datasets/{digest}/difference/{other}",
        "/api/datasets/{digest}/rows", "/api/datasets/{digest}/sign-offs",
        "/api/review", "/api/review/next", "/api/review/{number}", "/api/review/fill", "/api/review/export",
        "/api/review/{number}/decide", "/api/recalls", "/api/recalls/pending", "/api/recalls/status", "/api/impact",
        "/api/drift", "/api/retraining", "/api/webhooks", "/api/webhooks/{name}/retry", "/api/status", "/api/audit",
        "/api/audit/verification", "/api/users", "/api/users/{name}/roles", "/api/users/{name}/deactivate", "/api/keys",
    }  # fmt: skip
    posts = [route["post"] for route in document["paths"].values() if "post" in route]
    bodies = [post["requestBody"]["content"] for post in posts if "requestBody" in post]
    json_bodies = [body["application/json"] for body in bodies if "application/json" in body]
    names = [body["schema"]["$ref"].rsplit("/")[-1] for body in json_bodies]
    assert names == [
        "ChatRequest",
        "Feedback",
        "RegisterRequest",
        "RolloutRequest",
        "ResumeRequest",
        "PromoteRequest",
        "AbortRequest",
        "RollbackRequest",
        "SignOffRequest",
        "FillRequest",
        "ReviewDecision",
        "RecallRequest",
        "UserRequest",
        "RolesRequest",
        "JobRequest",
        "DecisionRequest",
        "SignedDecision",
        "TokenRequest",
        "HeldDecision",
        "FineTuningRequest",
    ]


def test_answers_match_the_openapi_document(document: dict[str, Any], served: Served) -> None:
    def check(response: Any, path: str, method: str = "get") -> None:
        stated = document["paths"][path][method]["responses"][str(response.status_code)]
        schema = {**stated["content"]["application/json"]["schema"], "components": document["components"]}
        Draft202012Validator(schema).validate(response.json())

    with served.http() as http:
        check(http.get("/v1/models"), "/v1/models")
        check(http.get("/v1/models/nobody"), "/v1/models/{model}")
        check(served.post(), "/v1/chat/completions", "post")
        check(served.post(metadata={"a": "b"}), "/v1/chat/completions", "post")
        check(served.post(temperature=9), "/v1/chat/completions", "post")
        check(http.get("/api/rollouts"), "/api/rollouts")
        check(http.get("/api/rollouts/1"), "/api/rollouts/{number}")
        check(http.get("/api/rollouts/99"), "/api/rollouts/{number}")
        check(http.get("/healthz"), "/healthz")
        check(http.get("/readyz"), "/readyz")
        answer = http.post("/v1/chat/completions", json={"model": NAME, "messages": HELLO}).json()["id"]
        check(http.post("/api/feedback", json={"request_id": answer, "expected": "{}"}), "/api/feedback", "post")


def test_every_route_decides_who_may_call_it(document: dict[str, Any], shared: Served) -> None:
    """Without a valid token nothing is told or done, except whether the server is well."""
    open_to_all = {"/healthz", "/readyz", "/metrics"}
    with shared.http("tsk_nobody") as http:
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                answer = http.request(method, path.replace("{", "").replace("}", ""))
                assert (answer.status_code == 401) != (path in open_to_all), f"{method} {path}: {answer.status_code}"
                assert ("security" in operation) != (path in open_to_all), f"{method} {path}"
