"""Licences: SPDX expressions read by license-expression, and the policy of what may be trained on."""

from __future__ import annotations

import functools
from typing import Any

from tunesmith.core.errors import Refused


def permitted(expression: str | None, allowed: tuple[str, ...], where: str) -> str:
    """The licence expression in SPDX's own spelling. Raises Refused where there is none, or the policy says no.

    Of `A OR B` one must be allowed, of `A AND B` and `A WITH B` both: some exceptions restrict.
    """
    if expression is None or not expression.strip():
        raise Refused(
            "rows without a licence are not trained on",
            where=where,
            fix="state the source's licence, for example `licence: Apache-2.0`, or one in each row",
        )
    normal, problem = _judge(expression, allowed)
    if problem is not None:
        raise Refused(f"licence {expression!r}: {problem}", where=where, fix="leave these rows out, or allow it by id")
    return normal


@functools.lru_cache(maxsize=4096)
def _judge(expression: str, allowed: tuple[str, ...]) -> tuple[str, str | None]:
    """(SPDX's spelling, why it may not be used)."""
    from license_expression import ExpressionError, ExpressionParseError

    try:
        parsed = _spdx().parse(expression, validate=False, strict=True)
    except (ExpressionError, ExpressionParseError) as error:
        return expression, f"not an SPDX expression ({error})"
    unknown = [key for key in _spdx().unknown_license_keys(parsed) if key not in allowed]
    if unknown:
        return expression, f"{', '.join(unknown)} is no SPDX licence id"
    if not _allowed(parsed, frozenset(allowed)):
        return str(parsed), _reason(str(parsed))
    return str(parsed), None


def _allowed(node: Any, allowed: frozenset[str]) -> bool:
    if type(node).__name__ in ("OR", "AND"):
        verdicts = [_allowed(part, allowed) for part in node.args]
        return any(verdicts) if type(node).__name__ == "OR" else all(verdicts)
    if hasattr(node, "exception_symbol"):
        return node.license_symbol.key in allowed and node.exception_symbol.key in allowed
    return node.key in allowed


def _reason(spelling: str) -> str:
    if "-NC" in spelling:
        return "non-commercial, and the policy does not allow it"
    if "-SA" in spelling or spelling.startswith("ODbL"):
        return "share-alike binds what is trained on it, and the policy does not allow it"
    return "not among the licences that the policy allows"


@functools.cache
def _spdx() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()
