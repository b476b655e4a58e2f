"""The order in which the jobs of several users begin, and how many places one user may fill."""

from __future__ import annotations

import pytest

from tunesmith.server.answering.turns import Turns


def begun(turns: Turns[str]) -> list[str]:
    found = []
    while (job := turns.begin()) is not None:
        found.append(job)
    return found


@pytest.mark.parametrize(("places", "alone"), [(1, 1), (2, 1), (3, 2), (8, 7), (32, 28)])
def test_one_user_leaves_a_place_for_the_next(places: int, alone: int) -> None:
    turns: Turns[str] = Turns(places)
    for _ in range(100):
        turns.add("first", "f")
    assert len(begun(turns)) == alone
    turns.add("second", "s")
    assert begun(turns) == (["s"] if places > 1 else [])
    assert turns.held_by("first") == 100


def test_a_place_stays_free_for_each_next_user() -> None:
    turns: Turns[str] = Turns(32)
    for user in "abcde":
        for _ in range(100):
            turns.add(user, user)
        assert begun(turns) == (["a"] * 28 if user == "a" else [user])
    turns.end("a")
    assert begun(turns) == []
    for _ in range(4):
        turns.end("a")
    assert begun(turns) == ["b"]


def test_who_waited_longest_is_next_and_fills_fewest_places() -> None:
    turns: Turns[str] = Turns(1)
    for job in ("a1", "a2", "a3", "b1", "b2", "c1"):
        turns.add(job[0], job)
    order = []
    while jobs := begun(turns):
        order += jobs
        turns.end(jobs[0][0])
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert (len(turns), turns.held_by("a")) == (0, 0)


def test_dropped_jobs_hold_nothing() -> None:
    turns: Turns[str] = Turns(1)
    for job in ("a1", "a2", "b1"):
        turns.add(job[0], job)
    turns.drop(lambda job: job.startswith("a"))
    assert (len(turns), turns.held_by("a"), turns.waiting(), begun(turns)) == (1, 0, ["b1"], ["b1"])
