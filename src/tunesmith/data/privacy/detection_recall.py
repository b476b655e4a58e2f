"""Detection recall of the privacy scan, measured with synthetic values, and a bound on the values that remain.

The number of values that a scan finds says nothing about those it misses. So synthetic values are inserted
into copies of the dataset's texts, at fitting places and in fitting case, and the scan runs over them. This measures
recall on these texts; recall and the number of findings bound how many values remain. The values are seeded,
so the same rows give the same figures.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from operator import methodcaller
from typing import NamedTuple

from tunesmith.core.errors import Refused
from tunesmith.core.messages import Conversation
from tunesmith.core.reading.strict_json import parse_json
from tunesmith.data.privacy.scan import Scanner, texts_of
from tunesmith.data.privacy.synthetic_pii import KEY_FORMS, MAKERS, SECRETS, Maker, key_of_no_form
from tunesmith.records.dataset import AnnotatedText, PrivacyScan, RemainingValues, SyntheticValues

CONFIDENCE = 0.95
# Half of the values are inserted alone, half after words that announce them. Half of the secrets are keys without a
# form of their own, pasted as people do.
_CARRIERS: Mapping[str, tuple[str, ...]] = {
    "EMAIL_ADDRESS": ("my email is {}", "write to {}"),
    "PHONE_NUMBER": ("my phone number is {}", "call me at {}"),
    "CREDIT_CARD": ("my credit card is {}", "charge card {}"),
    "IBAN_CODE": ("my iban is {}", "transfer it to {}"),
    "US_SSN": ("my social security number is {}", "ssn {}"),
    "PERSON": ("my name is {}", "ask {} about it"),
    "LOCATION": ("I live in {}", "we are in {}"),
    "STREET_ADDRESS": ("my address is {}", "send it to {}"),
    "SECRET": ("use the token {}", "my key is {}"),
}
# Keys of JSON under which half of the secrets are inserted, as passwords, into conversations that hold JSON.
_SECRET_KEYS = ("password", "db_password", "client_secret", "authToken", "api_key")
_ANY_CARRIER = ("here it is: {}", "this one: {}")
_CASED = frozenset(("PERSON", "LOCATION", "STREET_ADDRESS", "ORGANIZATION"))  # in lower case where the text is


class _Insertion(NamedTuple):
    before: str
    text: str
    start: int
    end: int
    cut: tuple[int, int]  # the span of `before` that the value replaced
    keys: tuple[str, str]  # the JSON keys of `before` and of `text`, or ""


def privacy_evidence(
    scanner: Scanner,
    counts: Mapping[str, int],
    fields: Mapping[tuple[str, str], int],
    conversations: Sequence[Conversation],
) -> PrivacyScan:
    """The scan's setup, findings and measured error.

    counts: entity -> values found. fields: (role, entity) -> findings. conversations: kept rows, in a fixed order, into
    which synthetic values are inserted. Raises Refused where more values may remain than the settings allow.
    """
    by_role: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for (role, entity), number in fields.items():
        by_role[role][entity] = number
    entities, model = scanner.finder.entities, scanner.finder.model
    measured = measure(scanner, conversations)
    # Under the action `report`, at_most includes the values that were found and kept.
    kept = sum(counts.values()) if scanner.settings.action == "report" else 0
    missed = probably_remaining(counts, measured) if measured else None
    left = RemainingValues(
        at_most=None if missed is None else missed + kept,
        confidence=CONFIDENCE,
        found_and_kept=kept,
        unmeasured=tuple(entity for entity in entities if entity not in measured),
    )
    _require_few_remaining(left, scanner.settings.left_at_most)
    return PrivacyScan(
        entities=entities,
        model=model,
        fields=by_role,
        reference=reference(model.package if model else None, entities),
        synthetic=measured,
        left=left,
    )


def reference(model: str | None, entities: Sequence[str]) -> AnnotatedText | None:
    """The setup's figures on annotated text, for entities that the text contains; None for an unknown model."""
    shipped = parse_json((files("tunesmith.data.privacy") / "reference.json").read_bytes())
    setup = shipped["setups"].get(model or "patterns")
    if setup is None:
        return None
    known = {entity: error for entity, error in setup["entities"].items() if entity in entities}
    return AnnotatedText(text=shipped["text"], command=shipped["command"], entities=known)


def measure(scanner: Scanner, conversations: Sequence[Conversation]) -> dict[str, SyntheticValues]:
    """Detection recall by entity. Inserts synthetic values of each into the conversations and scans them."""
    count = scanner.settings.synthetic_values
    if not count or not conversations:
        return {}
    own = scanner.settings.recognisers
    makers = MAKERS | {name: methodcaller("choice", one.examples) for name, one in own.items() if one.examples}
    return {
        entity: _scanned(
            scanner,
            [_insert(random.Random(f"{entity} {n}"), entity, makers[entity], conversations) for n in range(count)],
        )
        for entity in scanner.finder.entities
        if entity in makers
    }


def _insert(
    chance: random.Random,
    entity: str,
    make: Maker,
    conversations: Sequence[Conversation],
) -> _Insertion:
    texts = [(key, text) for _, key, text in texts_of(chance.choice(conversations))]
    keyed = [one for one in texts if one[0]]
    under = chance.choice(_SECRET_KEYS) if entity == "SECRET" and keyed and chance.random() < 0.5 else None
    # Sentences, if there are any.
    key, text = chance.choice(keyed if under else ([one for one in texts if " " in one[1].strip()] or texts))
    pasted = entity == "SECRET" and chance.random() < 0.5
    value = key_of_no_form(chance) if pasted else SECRETS["password"](chance) if under else make(chance)
    if entity in _CASED and text.islower():
        value = value.lower()
    if under or (not pasted and " " not in text.strip()):  # a key or value of JSON, or a single word: replace it
        return _Insertion(text, value, 0, len(value), (0, len(text)), (key, under or key))
    carriers = KEY_FORMS if pasted else ("{}", chance.choice(_CARRIERS.get(entity, _ANY_CARRIER)))
    head, _, rest = chance.choice(carriers).partition("{}")
    place = chance.choice([0, *(at for at, letter in enumerate(text) if letter == " "), len(text)])
    before, after = text[:place], text[place:]
    lead = before + (" " if before and not before.endswith(" ") else "") + head
    tail = "" if not after or after.startswith(" ") else " "
    whole, end = lead + value + rest + tail + after, len(lead) + len(value)
    return _Insertion(text, whole, len(lead), end, (place, place), (key, key))


def _scanned(scanner: Scanner, insertions: Sequence[_Insertion]) -> SyntheticValues:
    """Recall of whole values with its 95% lower bound, and recall and precision by character.

    Precision is that of the characters that were found only after the insertion.
    """
    before = scanner.findings([one.before for one in insertions], [one.keys[0] for one in insertions])
    after = scanner.findings([one.text for one in insertions], [one.keys[1] for one in insertions])
    whole = covered = new = 0
    for insertion, old, spans in zip(insertions, before, after, strict=True):
        known = {place for one in old for place in range(one.start, one.end)}
        seen = {place for one in spans for place in range(one.start, one.end)}
        inside = sum(insertion.start <= place < insertion.end for place in seen)
        covered += inside
        whole += inside == insertion.end - insertion.start
        shift = len(insertion.text) - len(insertion.before)
        outside = [place for place in seen if not insertion.start <= place < insertion.end]
        new += inside + sum((place if place < insertion.cut[0] else place - shift) not in known for place in outside)
    return SyntheticValues(
        inserted=len(insertions),
        found=whole,
        recall=whole / len(insertions),
        recall_at_least=recall_at_least(whole, len(insertions), 1 - CONFIDENCE),
        recall_by_character=covered / sum(one.end - one.start for one in insertions),
        precision_by_character=covered / new if new else None,
    )


def recall_at_least(hits: int, inserted: int, alpha: float) -> float:
    """The one-sided Clopper-Pearson lower bound of recall, at confidence 1 - alpha."""
    from scipy.stats import beta

    return float(beta.ppf(alpha, hits, inserted - hits + 1)) if hits else 0.0


def probably_remaining(counts: Mapping[str, int], measured: Mapping[str, SyntheticValues]) -> float | None:
    """A 95% upper bound on the number of values that the scan missed, over the measured entities.

    counts: entity -> values found. Returns None where no synthetic value of an entity was found: there is no bound.

    Half of the 5% is spent on the recalls, divided among the entities (Bonferroni): each enters with its
    Clopper-Pearson lower bound. With recall r and n values found, the number missed of an entity has the negative
    binomial distribution NB(n + 1, r), if all totals are equally likely. The other half of the 5% is the upper tail of
    the sum of these numbers.
    """
    import numpy as np
    from scipy.stats import nbinom

    share = (1 - CONFIDENCE) / 2
    total = np.ones(1)
    for entity, one in measured.items():
        recall = recall_at_least(one.found, one.inserted, share / len(measured))
        if recall == 0:
            return None
        missed = nbinom(counts.get(entity, 0) + 1, recall)
        total = np.convolve(total, missed.pmf(np.arange(int(missed.isf(1e-12)) + 1)))
        total = total[: int(np.searchsorted(total.cumsum(), 1 - 1e-10)) + 1]
    return float(np.searchsorted(total.cumsum(), 1 - share))


def _require_few_remaining(left: RemainingValues, limit: float | None) -> None:
    """Raise Refused where more values may remain than data.privacy.left_at_most, or there is no bound."""
    if limit is None:
        return
    where = "data.privacy.left_at_most"
    if left.unmeasured:
        raise Refused(
            f"detection recall is not measured for {', '.join(left.unmeasured)}",
            where=where,
            fix="remove it from data.privacy.entities, or give your own recogniser `examples`",
        )
    if left.at_most is None or left.at_most > limit:
        bound = "any number of" if left.at_most is None else f"up to {left.at_most:g}"
        raise Refused(
            f"{bound} values may remain in the rows ({CONFIDENCE:.0%} bound), and {limit:g} are allowed",
            where=where,
            fix="clean the sources, set data.privacy.model, or add recognisers for what is missed",
        )
