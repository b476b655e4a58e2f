"""Groups of rows that must be in the same split: rows of one template, of one key's value, or near each other.

A group by one key or by the template depends on its row only. Groups by several things, or by nearness, are the
connected components of all rows, so that an added row may join two of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunesmith.core.digests import digest_of, short
from tunesmith.core.reading.strict_json import json_in, values_in
from tunesmith.core.text.folding import fold
from tunesmith.data.duplicates import near_pairs, near_text, normalise
from tunesmith.data.settings import NEAR, Split

if TYPE_CHECKING:
    from tunesmith.data.splitting.leakage import Comparable

_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")
_SHORTEST_VALUE = 2


def wording_group(request: str, answer: str, names: Collection[str] = ()) -> str:
    """The group of a request by its template: its wording with the values taken out.

    request: normalised text. Values are numbers, quoted texts, `names`, and texts of a JSON answer that the request
    contains too: "play yesterday in the kitchen" and "play hallelujah in the hall" have one template. names: what the
    privacy scan found and the settings declare, so that "call ann" and "call bob" have one template.
    """
    texts = [text for _, text in values_in(json_in(answer)) if isinstance(text, str)]
    values = {*map(normalise, (*texts, *names)), *map(fold, texts)}
    for value in sorted(values, key=lambda value: (-len(value), value)):
        # The request is searched first, because compiling a pattern for each value is slow.
        if len(value) < _SHORTEST_VALUE or value not in request:
            continue
        request = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "\0", request)
    bare = _NUMBER.sub("\0", _QUOTED.sub("\0", request))
    return "wording-" + short(digest_of(bare.replace("\0", "*")), 16)


def joined_groups(rows: Sequence[Comparable], split: Split, threshold: float) -> Iterator[tuple[str, str]]:
    """(id, group) of every row. Rows that share any of split.groups, directly or through other rows, are one group.

    A group is named after the smallest value that its rows share, so the order of the rows does not matter. rows: each
    with a label for each of split.groups except nearness. threshold: the similarity from which two requests are near.
    """
    nodes: dict[tuple[str, str], int] = {}
    links: list[tuple[int, int]] = []
    first: list[int] = []
    for row in rows:
        shared = ((name, near_text(row.wording) if name == NEAR else row.labels[name]) for name in split.groups)
        places = [nodes.setdefault(one, len(nodes)) for one in shared]
        first.append(places[0])
        links.extend((places[0], place) for place in places[1:])
    if NEAR in split.groups:
        texts = [text for kind, text in nodes if kind == NEAR]
        numbers = [nodes[NEAR, text] for text in texts]
        links.extend((numbers[left], numbers[right]) for left, right in near_pairs(texts, threshold).tolist())
    left_ends, right_ends = zip(*links, strict=True) if links else ((), ())
    component = connected(left_ends, right_ends, len(nodes)).tolist()
    names: dict[int, str] = {}
    for (kind, value), place in nodes.items():
        if kind != NEAR or split.groups == (NEAR,):
            name = f"near-{short(digest_of(value), 16)}" if kind == NEAR else f"{kind} {value}"
            names[component[place]] = min(name, names.get(component[place], name))
    for row, place in zip(rows, first, strict=True):
        yield row.id, names[component[place]]


def connected(left: ArrayLike, right: ArrayLike, size: int) -> NDArray[np.int32]:
    """The number of each node's connected component, int32[size]. left, right: the ends of the links."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(np.size(left), dtype=np.bool_), (left, right)), shape=(size, size))
    component: NDArray[np.int32] = connected_components(links, directed=False)[1]
    return component
