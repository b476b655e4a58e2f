"""A tenant's job goes as if there were no other tenant, whatever others uploaded before."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.acting import looking
from tests.attack_table import Happened
from tests.own_cache import own_cache
from tests.server.fine_tuning_project import MODEL, OWNER, examples, write_fine_tuning_project
from tunesmith.core.text.names import Scope
from tunesmith.jobs import leases, queue
from tunesmith.jobs.fine_tuning import Arguments, perform_fine_tuning
from tunesmith.jobs.performing import perform
from tunesmith.project import Project
from tunesmith.services.evaluations import list_evaluations
from tunesmith.services.jobs import add_fine_tuning
from tunesmith.store import uploads
from tunesmith.store.people.identities import add_user, ensure_owner
from tunesmith.store.tables import FINE_TUNING
from tunesmith.store.uploads import PURPOSE


def tuned(folder: Path, tenant: str, data: bytes) -> dict[str, Any]:
    """What an engineer of a tenant, and the tenant's reader, learn from a job on this file."""
    project, scope = Project.load(folder), Scope(tenant)
    store = project.store
    ensure_owner(store)
    user = add_user(store, f"{tenant}-engineer", ["engineer", "operator"], actor=OWNER, scope=scope)
    before = list_evaluations(looking(project, user.name)).evaluations
    source = folder / "upload.jsonl"
    source.write_bytes(data)
    file = uploads.put(store, source, name="rows.jsonl", purpose=PURPOSE, actor=user.name, scope=scope).file
    arguments = Arguments(model=MODEL, training_file=file, settings=project.settings.digest)
    job = add_fine_tuning(looking(project, user.name), arguments)
    lease = leases.claim(store, "w", [FINE_TUNING], project="tiny")
    assert lease is not None
    perform(store, lease, lambda progress: perform_fine_tuning(project, job, progress))
    done = queue.get(store, job.id)
    result = done.result
    assert result is not None, done
    verdict = store.record(result["gate"]["digest"], kind="verdict")
    return {
        "before": before,
        "stages": [(each["name"], each["skipped"]) for each in result["stages"]],
        "lines": [re.sub(r"file-\w+|\d[\d.]*", "#", event.message) for event in queue.events(store, job.id)],
        "seen": len(list_evaluations(looking(project, user.name)).evaluations),
        "weights": [each["weights"] for each in result["train"].values()],
        "uses": verdict.body["test_set_use"],
    }


@pytest.mark.attack("people", "a tenant uploads what another tenant has, whole or in part")
def test_a_job_goes_as_if_there_were_no_other_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happened: Happened
) -> None:
    monkeypatch.setenv("TUNESMITH_USER", OWNER)
    monkeypatch.setenv("TUNESMITH_CACHE", own_cache(tmp_path / "cache"))
    first = write_fine_tuning_project(tmp_path / "alone")
    shutil.copytree(first, tmp_path / "after")
    lines = examples().splitlines(keepends=True)
    alone = tuned(first, "globex", b"".join(lines))
    tuned(tmp_path / "after", "acme", b"".join(lines))
    assert tuned(tmp_path / "after", "globex", b"".join(lines)) == alone
    happened("as alone", 1)
    part = tuned(first, "initech", b"".join(lines[:100]))
    assert (part["before"], part["seen"], part["uses"]) == ((), 1, 1)
    assert not any(skipped for _, skipped in part["stages"])
    happened("as alone", 1)
