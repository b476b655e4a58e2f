"""Waiting for changes, where those who wait leave in the middle."""

from __future__ import annotations

import asyncio
from typing import Any

from tunesmith.server.console.changes import Changes


def test_who_leaves_takes_no_lock_along() -> None:
    """A client that leaves is cancelled again and again until its task has ended, also while a change is being told."""

    async def leave(together: int) -> bool:
        nothing: Any = None
        found = Changes(nothing, _task=asyncio.create_task(asyncio.sleep(60)))
        known = list(found.numbers)
        waiting = [asyncio.create_task(found.after(known)) for _ in range(together)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        async with found._changed:
            found.numbers[0] += 1
            found._changed.notify_all()
            for _ in range(5):
                for task in waiting[::2]:
                    task.cancel()
                await asyncio.sleep(0)
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended[::2]), ended
        assert all(each == found.numbers for each in ended[1::2]), ended
        assert await asyncio.wait_for(found.after(known), 5) == found.numbers, "others hear of it"
        return found._changed.locked()

    assert not asyncio.run(asyncio.wait_for(leave(8), 60))
