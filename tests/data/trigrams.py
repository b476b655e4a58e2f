"""Trigrams and their similarity, computed plainly: what the similarity join is compared with."""


def shingles(text: str) -> frozenset[str]:
    """The character trigrams of a text; the text itself where it is shorter."""
    return frozenset(text[start : start + 3] for start in range(max(1, len(text) - 2)))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard similarity in [0, 1]: shared elements over all elements."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)
