"""The table that `make attack` prints: what was tried, how often, and what happened.

A test of an attack is marked `@pytest.mark.attack(area, what, outcome)`. One that makes many tries leaves the outcome
out, and says with the fixture `happened` what came of each. Rows of the same area and attack are added up, so that a
parametrised test is one row.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

ATTACK, HAPPENED = "attack", "happened"

Happened = Callable[..., None]


@pytest.fixture
def happened(request: pytest.FixtureRequest) -> Happened:
    """A function `(outcome, count=1)` that records what came of `count` tries."""

    def record(outcome: str, count: int = 1) -> None:
        request.node.user_properties.append((HAPPENED, (outcome, count)))

    return record


@pytest.fixture(autouse=True)
def _named_attack(request: pytest.FixtureRequest) -> None:
    if mark := request.node.get_closest_marker("attack"):
        area, what, *outcomes = mark.args
        request.node.user_properties += [(ATTACK, (area, what)), *((HAPPENED, (each, 1)) for each in outcomes)]


def _rows(reports: dict[str, list]) -> Iterator[tuple[str, str, Counter[str], int]]:
    outcomes: dict[tuple[str, str], Counter[str]] = {}
    broken: Counter[tuple[str, str]] = Counter()
    for kind in ("passed", "failed", "error"):
        for report in reports.get(kind, []):
            told = list(getattr(report, "user_properties", []))
            attack = next((tuple(value) for name, value in told if name == ATTACK), None)
            if attack is None or (kind == "passed" and report.when != "call"):
                continue
            found = outcomes.setdefault(attack, Counter())
            for outcome, count in (value for name, value in told if name == HAPPENED):
                found[outcome] += count
            broken[attack] += kind != "passed"
    for attack in sorted(outcomes):
        yield *attack, outcomes[attack], broken[attack]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of `make attack`."""
    if config.getoption("markexpr") != ATTACK:
        return
    rows = list(_rows(terminalreporter.stats))
    if not rows:
        return
    terminalreporter.section("attacks: what was tried and what happened")
    widths = (12, 54, 7, 40)
    line = "{:<12}  {:<54}  {:>7}  {:<40}"
    terminalreporter.write_line(line.format("area", "attack", "tries", "what happened"))
    for area, what, outcomes, broken in rows:
        tries = sum(outcomes.values()) or 1
        told = "; ".join(f"{outcome} ({n})" if len(outcomes) > 1 else outcome for outcome, n in outcomes.most_common())
        cells = (area, what, str(tries), f"NOT HELD: {broken} failed. {told}" if broken else told or "held")
        folded = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
        for number in range(max(map(len, folded))):
            texts = [part[number] if number < len(part) else "" for part in folded]
            terminalreporter.write_line(line.format(*texts), red=bool(broken))
    held = sum(not broken for *_, broken in rows)
    tries = sum(sum(outcomes.values()) or 1 for _, _, outcomes, _ in rows)
    terminalreporter.write_line(f"{held} of {len(rows)} attacks held, {tries:,} tries")
