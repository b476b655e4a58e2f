"""A part of a page that takes long is made once for everybody who looks at it at the same time."""

from __future__ import annotations

import asyncio

import pytest

from tunesmith.server.console.parts.shared import Shared


def test_a_value_is_made_once_until_its_time_is_over() -> None:
    made: list[int] = []

    async def looked(seconds: float) -> list[int]:
        shared = Shared[int](seconds)

        async def make() -> int:
            await asyncio.sleep(0.01)
            made.append(1)
            return len(made)

        together = await asyncio.gather(*(shared.get("a", make) for _ in range(5)))
        return [*together, await shared.get("a", make), await shared.get("b", make)]

    assert asyncio.run(looked(600)) == [1, 1, 1, 1, 1, 1, 2]
    assert asyncio.run(looked(0))[5:] == [4, 5]


def test_a_failure_is_told_to_all_who_wait_and_not_kept() -> None:
    async def looked() -> int:
        shared = Shared[int](600)

        async def fail() -> int:
            await asyncio.sleep(0.01)
            raise ValueError

        async def make() -> int:
            return 7

        waiting = [asyncio.create_task(shared.get("a", fail)) for _ in range(2)]
        for each in waiting:
            with pytest.raises(ValueError):
                await each
        return await shared.get("a", make)

    assert asyncio.run(looked()) == 7
