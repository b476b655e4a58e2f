"""Takes jobs of the queue and performs each, with an instant effect, until this process is killed.

python run_worker.py ROOT URL SECONDS    # SECONDS: the lease of a job
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sqlalchemy import text

from tunesmith.core.errors import TunesmithError
from tunesmith.jobs import leases
from tunesmith.jobs.leases import Lease, LeaseLost
from tunesmith.jobs.worker import worker_name
from tunesmith.store import database
from tunesmith.store.store import Store

# Nothing where the effect is there already, as a stage is skipped whose result is there: a worker may be killed between
# an effect and the end of its job.
EFFECT = "insert into effects (job) select :job where not exists (select 1 from effects where job = :job)"


def main(root: str, url: str, seconds: str, also: str = "") -> None:
    """Work for ever. A database or a bucket that is away is waited for."""
    store, name = Store(Path(root), url), worker_name()
    while True:
        try:
            lease = leases.claim(store, name, ["run"], project="p", seconds=float(seconds))
            if lease is None:
                time.sleep(0.2)
            else:
                work(store, lease, keep=also == "bytes")
        except LeaseLost:
            continue
        except TunesmithError as error:
            print(f"waiting: {error}", file=sys.stderr, flush=True)
            time.sleep(1)


def work(store: Store, lease: Lease, *, keep: bool) -> None:
    """Perform one job. Raises LeaseLost where it was taken back."""
    result = {"blob": store.put_bytes(f"job {lease.job}".encode())} if keep else {"fence": lease.fence}
    with database.writing(store.engine) as session:
        leases.check(session, lease)  # what Store.fenced calls first in each transaction of a job
        session.execute(text(EFFECT), {"job": lease.job})
    leases.finish(store, lease, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
