"""procrastinate with the same jobs and effects, in its own environment.

python run_procrastinate.py add URL COUNT      # makes its tables and adds jobs
python run_procrastinate.py work URL SECONDS   # one worker; SECONDS: after which a silent one counts as stalled
python run_procrastinate.py rescue URL SECONDS # retries the jobs of stalled workers, over and over
python run_procrastinate.py count URL          # prints jobs by state
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from typing import Any

import procrastinate
import psycopg

EFFECT = "insert into effects (job) select %s where not exists (select 1 from effects where job = %s)"


async def main(what: str, url: str, number: str = "0") -> None:
    """Do one of the four."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, min_size=1, max_size=4))
    effects: list[Any] = []

    @app.task(name="instant", queue="q")
    async def instant(job: int) -> None:
        if not effects:
            effects.append(await psycopg.AsyncConnection.connect(url, autocommit=True))
        await effects[0].execute(EFFECT, (job, job))

    async with app.open_async():
        if what == "add":
            await app.schema_manager.apply_schema_async()
            for first in range(1, int(number) + 1, 1000):
                last = min(first + 1000, int(number) + 1)
                await instant.batch_defer_async(*({"job": job} for job in range(first, last)))
        elif what == "work":
            beat = {"update_heartbeat_interval": float(number) / 4, "stalled_worker_timeout": float(number)}
            await app.run_worker_async(concurrency=1, queues=["q"], **beat)
        elif what == "rescue":
            while True:
                for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=float(number)):
                    await app.job_manager.retry_job(job)
                await asyncio.sleep(0.5)
        else:
            jobs = await app.job_manager.list_jobs_async(queue="q")
            print(json.dumps(Counter(job.status for job in jobs)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
