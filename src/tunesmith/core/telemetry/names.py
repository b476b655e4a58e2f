"""Every name that OpenTelemetry backends see. The GenAI conventions still move: they are followed here alone.

https://github.com/open-telemetry/semantic-conventions-genai, as of November 2026.
"""

from __future__ import annotations

from typing import Final

SERVICE: Final = "tunesmith"
SERVICE_NAME: Final = "service.name"
SERVICE_VERSION: Final = "service.version"

# HTTP and errors
METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"
STATUS: Final = "http.response.status_code"
ERROR: Final = "error.type"

# GenAI: what was asked, and what answered
OPERATION: Final = "gen_ai.operation.name"
CHAT: Final = "chat"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"

# GenAI: metrics, with the bounds that the conventions advise
REQUEST_DURATION: Final = "gen_ai.server.request.duration"
DURATION_BOUNDS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKEN_USAGE: Final = "gen_ai.client.token.usage"  # noqa: S105 - the conventions have no name for the server's side
TOKEN_BOUNDS: Final = tuple(float(4**power) for power in range(14))
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105
INPUT: Final = "input"
OUTPUT: Final = "output"

# Tunesmith's own
ARM: Final = "tunesmith.rollout.arm"
ROLLOUT: Final = "tunesmith.rollout.id"
OUTCOME: Final = "tunesmith.outcome"
TENANT: Final = "tunesmith.tenant"
REGION: Final = "tunesmith.region"
JOB: Final = "tunesmith.job.id"
JOB_KIND: Final = "tunesmith.job.kind"
PROJECT: Final = "tunesmith.project"
QUEUE_SPAN: Final = "queue"
ANSWER_SPAN: Final = "answer"
JOB_SPAN: Final = "job"
