"""Licences of rows: which may be trained on for which use, and what they require.

license-expression reads SPDX expressions. The classes follow the Data Provenance Initiative (Longpre and others, 2023,
arXiv:2310.16787): whether a licence allows commercial use, requires attribution, and requires the same licence for
derived works. Licences that forbid sharing derived works, and missing licences, allow no training. This is a reading of
the licences' texts, not legal advice; `data.licences` overrides it by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tunesmith.core.errors import Refused, UsageError
from tunesmith.data.settings import Licences
from tunesmith.records.dataset import Credit, Duties, Use


class Terms(NamedTuple):
    """What a licence allows and requires. use: the widest allowed use."""

    use: Use = "commercial"
    attribution: bool = True
    share_alike: bool = False
    derivatives: bool = True


class LicenceRefused(Refused):
    """The policy does not accept a licence. accept: the settings of `data.licences` that would; None where no such
    licence is known, {} where the policy refuses it by name."""

    def __init__(self, what: str, *, where: str, accept: Mapping[str, Any] | None) -> None:
        settings = ", ".join(f"{key}: {_as_yaml(value)}" for key, value in (accept or {}).items())
        fix = _NAMES if accept is None else "remove these rows"
        fix += f", or set data.licences: {{{settings}}}" if accept else ""
        if "share_alike" in (accept or {}):
            fix += ", which binds the models too"
        super().__init__(what, where=where, fix=fix)
        self.accept = accept


class _Objection(NamedTuple):
    """Why a licence must not be used, and the settings that would accept it."""

    why: str
    accept: Mapping[str, Any] | None


_CUSTOM = "LicenseRef-"  # begins SPDX's name of a licence that SPDX does not list
_NAMES = "name SPDX ids, such as MIT or CC-BY-4.0, or LicenseRef-NAME for rows of your own and licences that SPDX lacks"

_FREE, _CREDIT = Terms(attribution=False), Terms()
_SAME = Terms(share_alike=True)
_TERMS: Mapping[str, Terms] = {
    **dict.fromkeys(("0BSD", "CC0-1.0", "CC-PDDC", "MIT-0", "PDDL-1.0", "Unlicense", "WTFPL"), _FREE),
    **dict.fromkeys(
        ("AFL-3.0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0",
         "CC-BY-4.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "DL-DE-BY-2.0", "etalab-2.0", "ISC", "MIT",
         "ODC-By-1.0", "OGL-UK-3.0", "Zlib"),
        _CREDIT,
    ),
    **dict.fromkeys(
        ("AGPL-3.0-only", "AGPL-3.0-or-later", "CC-BY-SA-1.0", "CC-BY-SA-2.0", "CC-BY-SA-2.5", "CC-BY-SA-3.0",
         "CC-BY-SA-4.0", "CDLA-Sharing-1.0", "GFDL-1.2-only", "GFDL-1.3-only", "GFDL-1.3-or-later", "GPL-2.0-only",
         "GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "LGPL-2.1-only", "LGPL-2.1-or-later",
         "LGPL-3.0-only", "LGPL-3.0-or-later", "MPL-2.0", "EUPL-1.2", "ODbL-1.0"),
        _SAME,
    ),
    **{
        f"CC-BY-{kind}-{version}": terms
        for version in ("1.0", "2.0", "2.5", "3.0", "4.0")
        for kind, terms in (
            ("NC", Terms(use="non-commercial")),
            ("NC-SA", Terms(use="non-commercial", share_alike=True)),
            ("ND", Terms(derivatives=False)),
            ("NC-ND", Terms(use="non-commercial", derivatives=False)),
        )
    },
}  # fmt: skip


def permitted(expression: str | None, policy: Licences, where: str) -> str:
    """The licence expression in SPDX's spelling. Raises Refused for a missing or forbidden licence (LicenceRefused).

    Of `A OR B` one must be allowed; of `A AND B` and `A WITH B` both must, since some exceptions restrict.
    """
    if expression is None or not expression.strip():
        raise Refused(
            "a row without a licence must not be trained on",
            where=where,
            fix="state the source's licence, for example `licence: Apache-2.0`, or one in each row",
        )
    normal, problem, _ = _judge(expression, policy)
    if problem is not None:
        raise LicenceRefused(f"licence {expression!r}: {problem.why}", where=where, accept=problem.accept)
    return normal


def _as_yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else f"[{', '.join(value)}]"


def spelled(expression: str) -> str:
    """The licence expression in SPDX's spelling; as it is where it is none."""
    return _judge(expression, Licences())[0]


def custom_ids(expression: str) -> tuple[str, ...]:
    """The ids of an expression that begin with LicenseRef-: licences that SPDX does not list."""
    _, _, ids = _judge(expression, Licences())
    return tuple(name for name in ids if name.startswith(_CUSTOM))


@functools.lru_cache(maxsize=4096)
def needs(expression: str, licence: str) -> bool:
    """Whether texts under an expression cannot be used without a licence: `A AND B` and `A WITH B` need A; `A OR B`
    does not.

    licence: an id or an expression, of which everything that AND joins is needed.
    """
    whole, wanted = _parsed(expression), _parsed(licence)
    if whole is None or wanted is None:
        return expression == licence
    return {_spelling(part) for part in _joined(wanted)} <= _needed(whole)


def mentions(expression: str, licence: str) -> bool:
    """Whether an expression contains all ids of a licence, needed or not."""
    whole, wanted = _parsed(expression), _parsed(licence)
    if whole is None or wanted is None:
        return expression == licence
    return set(_spdx().license_keys(whole)) >= set(_spdx().license_keys(wanted))


def duties(credits_: Iterable[Credit], policy: Licences) -> Duties:
    """What the licences of a dataset's rows require of those who distribute a model trained on them.

    Raises Refused where two incompatible share-alike licences would bind one
    model, which then could be distributed under neither.
    """
    used: dict[str, Terms] = {}
    named = []
    for one in sorted(set(credits_), key=lambda one: (one.source, one.licence)):
        _, _, ids = _judge(one.licence, policy)
        terms = {name: _TERMS.get(name, _CREDIT) for name in ids}
        used |= terms
        if any(each.attribution for each in terms.values()):
            named.append(one)
    shared = sorted(name for name, terms in used.items() if terms.share_alike)
    if not _have_one_licence(shared):
        raise Refused(
            f"{' and '.join(shared)} require different licences for one model",
            where="data.sources",
            fix="keep the sources of one of them only",
        )
    return Duties(
        use="commercial" if all(terms.use == "commercial" for terms in used.values()) else "non-commercial",
        attribution=tuple(named),
        share_alike=tuple(shared),
        unknown=tuple(sorted(used.keys() - _TERMS.keys())),
    )


def _have_one_licence(share_alike: Sequence[str]) -> bool:
    """Whether one licence fits all these share-alike ids: of one family the newest version, unless an id says -only."""
    parts = [name.removesuffix("-only").removesuffix("-or-later").rpartition("-") for name in share_alike]
    newest = max((version for *_, version in parts), default="")
    return len({family for family, *_ in parts}) <= 1 and all(
        version == newest for name, (*_, version) in zip(share_alike, parts, strict=True) if name.endswith("-only")
    )


@functools.cache
def _named(policy: Licences) -> tuple[frozenset[str], frozenset[str]]:
    """The ids that a policy allows and refuses, in SPDX's spelling. Raises UsageError for one that SPDX lacks."""
    allow = frozenset(_spelled(name, "data.licences.allow") for name in policy.allow)
    refuse = frozenset(_spelled(name, "data.licences.refuse") for name in policy.refuse)
    return allow, refuse


def _spelled(name: str, where: str) -> str:
    name = name.strip()
    known = _spdx_ids().get(name.casefold())
    if known is None and not name.startswith(_CUSTOM):
        raise UsageError(
            f"{name!r} is not an SPDX licence id",
            where=where,
            fix=_NAMES,
        )
    return known or name


@functools.lru_cache(maxsize=4096)
def _judge(expression: str, policy: Licences) -> tuple[str, _Objection | None, tuple[str, ...]]:
    """(SPDX's spelling, why the licence must not be used or None, the licences relied on)."""
    from license_expression import ExpressionError, ExpressionParseError

    try:
        parsed = _spdx().parse(expression, validate=False, strict=True)
    except (ExpressionError, ExpressionParseError) as error:
        return expression, _Objection(f"not an SPDX expression ({error})", None), ()
    if parsed is None:
        return expression, _Objection("it is empty", None), ()
    allow, refuse = _named(policy)
    unknown = [key for key in _spdx().unknown_license_keys(parsed) if not key.startswith(_CUSTOM)]
    if unknown:
        return expression, _Objection(f"{', '.join(unknown)} is not an SPDX licence id", None), ()

    def objection(key: str) -> _Objection | None:
        terms = _TERMS.get(key)
        if key in refuse:
            return _Objection(f"{key} is refused by data.licences.refuse", {})
        if key in allow:
            return None
        listed = {"allow": (*policy.allow, key)}
        if key.startswith(_CUSTOM):
            return _Objection(f"data.licences.allow does not list {key}", listed)
        if terms is None:
            return _Objection(f"the terms of {key} are not known", listed)
        if not terms.derivatives:
            return _Objection(f"{key} forbids sharing derived works", listed)
        if terms.use == "non-commercial" and policy.use == "commercial":
            return _Objection(f"{key} is for non-commercial use", {"use": "non-commercial"})
        if terms.share_alike and not policy.share_alike:
            return _Objection(f"{key} is share-alike and would bind the model", {"share_alike": True})
        return None

    problem, ids = _relied_on(parsed, objection)
    return str(parsed), problem, ids


def _parsed(expression: str) -> Any:
    """The expression as a tree; None where it is none."""
    from license_expression import ExpressionError, ExpressionParseError

    try:
        return _spdx().parse(expression, validate=False)
    except (ExpressionError, ExpressionParseError):
        return None


def _joined(node: Any) -> list[Any]:
    """The parts that AND joins at the top of an expression."""
    return [each for part in node.args for each in _joined(part)] if type(node).__name__ == "AND" else [node]


def _needed(node: Any) -> frozenset[str]:
    """The ids, and the expressions with WITH and OR, without which an expression cannot be kept to."""
    kind = type(node).__name__
    if kind == "AND":
        return frozenset[str]().union(*map(_needed, node.args))
    if kind == "OR":
        return frozenset.intersection(*map(_needed, node.args)) | {_spelling(node)}
    return frozenset((str(node), *_keys(node)))


def _spelling(node: Any) -> str:
    """An expression in one spelling, whatever the order in which it names its parts."""
    kind = type(node).__name__
    return f"({f' {kind} '.join(sorted(map(_spelling, node.args)))})" if kind in ("AND", "OR") else str(node)


def _keys(symbol: Any) -> tuple[str, ...]:
    """The ids of `A` or of `A WITH B`."""
    if hasattr(symbol, "exception_symbol"):
        return symbol.license_symbol.key, symbol.exception_symbol.key
    return (symbol.key,)


def _relied_on(node: Any, objection: Any) -> tuple[_Objection | None, tuple[str, ...]]:
    """(why a part of an expression must not be used, or None; the licences relied on)."""
    kind = type(node).__name__
    if kind in ("OR", "AND"):
        parts = [_relied_on(part, objection) for part in node.args]
        if kind == "AND":
            problem = next((problem for problem, _ in parts if problem is not None), None)
            return problem, tuple(dict.fromkeys(name for _, ids in parts for name in ids))
        # Of several alternatives, the one with the fewest requirements.
        open_ = sorted((ids for problem, ids in parts if problem is None), key=_burden)
        return (None, open_[0]) if open_ else parts[0]
    keys = _keys(node)
    return next((problem for key in keys if (problem := objection(key))), None), keys


def _burden(ids: tuple[str, ...]) -> tuple[int, int, int, tuple[str, ...]]:
    terms = [_TERMS.get(name, _CREDIT) for name in ids]
    return (
        sum(one.use == "non-commercial" for one in terms),
        sum(one.share_alike for one in terms),
        sum(one.attribution for one in terms),
        ids,
    )


@functools.cache
def _spdx() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


@functools.cache
def _spdx_ids() -> Mapping[str, str]:
    """Each id and former id of SPDX, in lower case -> its spelling."""
    known = _spdx().known_symbols
    former = {alias.casefold(): key for key, one in known.items() for alias in one.aliases}
    return former | {key.casefold(): key for key in known}
