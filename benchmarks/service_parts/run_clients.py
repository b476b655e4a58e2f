"""Eight clients that ask two servers until they are told to end, and compare each answer with its request.

    python run_clients.py '{"ports": [1, 2], "token": "...", "weights": {"home@v1": "sha256:..."}, "seconds": 60}'

The engine's answer repeats the request's text and names the weights that answered, so an answer to another request, or
one by other weights than the version that it states, is a wrong answer. A request that is refused or cut off is not.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

from service_parts.gateway import asked_of
from service_parts.load import Connection

CLIENTS = 8


async def main(told: dict[str, Any]) -> dict[str, Any]:
    """What came of all requests."""
    until = time.monotonic() + told["seconds"]
    counts: Counter[str] = Counter()
    wrong: list[str] = []

    async def client(number: int) -> None:
        asked = 0
        while time.monotonic() < until:
            asked += 1
            text = f"client {number} request {asked}"
            request = asked_of(told["ports"][asked % len(told["ports"])], told["token"], text)
            connection = Connection(request)
            try:
                status, body = await asyncio.wait_for(connection.ask(), 120)
            except (OSError, asyncio.IncompleteReadError, ValueError, TimeoutError) as error:
                counts[type(error).__name__] += 1
                await asyncio.sleep(0.2)
                continue
            finally:
                connection.close()
            counts[str(status)] += 1
            if status != 200:
                await asyncio.sleep(0.2)
                continue
            answer = json.loads(body)
            said = json.loads(answer["choices"][0]["message"]["content"])
            if said != {"intent": text, "weights": told["weights"].get(answer["model"])}:
                wrong.append(f"{text}: {body[:300]!r}")

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return {"answers": counts, "wrong": len(wrong), "first_wrong": wrong[:3]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(sys.argv[1])))))
