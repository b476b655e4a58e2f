"""Whether an erasure leaves a byte, and how long its plan takes.

    python benchmarks/erasure.py [bytes | hosted | plan] [RECORDS]

bytes: 10,000 rows, 20 trainings and 5 versions with a person's sentences in every place that a project and a server
leave; after the erasure all files are searched. hosted: the same on PostgreSQL and a bucket, whose data folder and
objects are searched. plan: how long the plan and `store usage` take with 10,000 records, and 100 GB of weights in
sparse files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fabricate import OWNER, STEWARD, Scene, build_scene, example, lamp, put_chain, put_dataset, put_requests
from tests.killed import Home
from tests.monitoring.test_erasure import ANNA, PLANTED, SAID, SECOND, erase, plant, rows
from tests.postgresql_server import postgresql_server
from tests.s3_server import new_bucket, s3_environment, s3_server

from tunesmith.core.access import Labels
from tunesmith.core.digests import canonical, digest_bytes
from tunesmith.data.documents import PASSAGES, Passage
from tunesmith.monitoring.erasure import plan
from tunesmith.monitoring.pruning import usage
from tunesmith.monitoring.recall import Cause
from tunesmith.registry.verification import verify_version
from tunesmith.services.audit import verify_audit
from tunesmith.store.copying import keys_of
from tunesmith.store.people.identities import add_user
from tunesmith.store.records import Record
from tunesmith.store.store import Store

ROWS, TRAININGS, VERSIONS = 10_000, 20, 5
GIGABYTES = 100


def filled(store: Store) -> tuple[Scene, list[str]]:
    """A store in whose places a person's sentences stand, and its versions."""
    scene = build_scene(store.root, store=store)
    add_user(store, SECOND, ["steward"], actor=OWNER)
    own = [example(f"{SAID} Call {n}.", f"Noted, {n}: {SAID}", f"b{n}", None, subject="C-1042") for n in range(195)]
    made = [*rows(), *own, *(lamp(n) for n in range(ROWS - len(rows()) - len(own)))]
    scene.dataset = put_dataset(
        store, [*made[:400:2], *made[400:-2000]], made[1:400:4], [*made[3:400:4], *made[-2000:]]
    )
    versions = plant(scene)
    versions += [scene.version(n, shots=(own[n].messages,), name="other") for n in range(3, VERSIONS + 1)]
    for seed in range(VERSIONS + 1, TRAININGS + 1):
        put_chain(store, seed=seed, base=scene.base, dataset=scene.dataset)
    text = canonical({"id": own[0].id, "detail": SAID, "flag": "x", "split": "train"}) + b"\n"
    kept = {"flags.jsonl": store.put_bytes(text)}
    store.put_record(Record(kind="quality", parents={"dataset": scene.dataset}, blobs=kept, body={}))
    passage = Passage(id="p1", source="a.md", title="", text=f"A case: {SAID}", labels=Labels())
    blob = store.put_bytes(canonical(passage.model_dump(mode="json")) + b"\n")
    read = {"path": "a.md", "digest": digest_bytes(b""), "bytes": 1, "passages": 1}
    body = {"settings": {"asked_as": None, "licence": None}, "files": [read], "passages": 1, "removed": 0}
    body |= {"privacy": {"action": "keep", "found": {}}}
    store.put_record(Record(kind="documents", blobs={PASSAGES: blob}, body=body))
    put_requests(store, versions[0].digest, [{"features": {"characters": float(n)}} for n in range(100)])
    for folder in ("build", "vectors", "answers-1"):
        store.local("work", folder).mkdir(parents=True, exist_ok=True)
        store.local("work", folder, "rows.jsonl").write_bytes(text)
    (store.root / "blobs" / "ab").mkdir(exist_ok=True, parents=True)
    (store.root / "blobs" / "ab" / ".scratch-tunesmith-0123456789abcdef").write_bytes(text)
    return scene, [version.label for version in versions]


def found_in(files: Iterator[tuple[str, bytes]]) -> list[str]:
    """The names of what holds a planted sentence."""
    return sorted({name for name, data in files if any(one.encode() in data.lower() for one in PLANTED)})


def files_of(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(each for each in folder.rglob("*") if each.is_file()):
            with contextlib.suppress(OSError):
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def every_byte(store: Store, server: Path | None) -> list[str]:
    """Where a sentence stands in the store's files, its bucket and the tables of its PostgreSQL server."""
    found = found_in(files_of(store.root))
    if server is not None:
        with store.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("CHECKPOINT")
        found += [f"objects: {name}" for name in found_in((key, store.blobs.get(key)) for key in keys_of(store.blobs))]
        found += [f"PostgreSQL: {name}" for name in found_in(files_of(server / "base"))]
    return found


def measure_bytes(home: Home, server: Path | None = None) -> bool:
    store = home.open()
    _, versions = filled(store)
    before = every_byte(store, server)
    assert plan(store, ANNA, reason="she asked", actor=STEWARD).others == ("p1",)
    erase(store, plan(store, Cause(kind="row", value="p1"), reason="it quotes her", actor=STEWARD).number)
    began = time.perf_counter()
    asked = plan(store, ANNA, reason="she asked", actor=STEWARD)
    planned = time.perf_counter()
    done = erase(store, asked.number)
    ended = time.perf_counter()
    after = every_byte(store, server)
    print(f"{len(before)} files, objects and tables held a sentence of {len(asked.rows)} rows")
    for place in asked.places:
        print(f"  {place.place}: {place.count}, {place.bytes:,} bytes")
    print(f"planned in {planned - began:.1f} s, {done.state} in {ended - planned:.1f} s")
    verified = [verify_version(store, label).ok for label in versions] + [verify_audit(store).ok]
    print(f"left: {after}; {sum(verified)} of {len(verified)} verify")
    return not after and all(verified)


def measure_plan(root: Path, records: int) -> bool:
    """A store of so many records, whose trainings hold 100 GB, half of them made from the person's rows."""
    store = Home.local(root).open()
    scene = build_scene(root, store=store)
    trainings, size = max(2, records // 5), 0
    for number in range(0, trainings, 83):
        some = [lamp(number * 6 + each) for each in range(500)]
        texts = [f"{SAID} {number} {n}." for n in range(number % 2 and 5)]
        own = [example(each, "ok", each, None, subject="C-1042") for each in texts]
        dataset = put_dataset(store, [*some[:450], *own], some[450:460], some[460:])
        for seed in range(number, min(number + 83, trainings)):
            put_chain(store, seed=seed, base=scene.base, dataset=dataset)
    for training in store.records_of("training"):
        blob = store.blob_path(store.record(training).blobs["adapter_model.safetensors"])
        blob.chmod(0o600)
        os.truncate(blob, GIGABYTES * 10**9 // trainings)
        size += blob.stat().st_size
    asked = plan(store, ANNA, reason="she asked", actor=STEWARD)
    planning = timed(lambda: plan(store, ANNA, reason="she asked", actor=STEWARD))
    count = sum(1 for _ in store.blobs.keys("records/"))
    print(
        f"{count:,} records, {size / 1e9:.0f} GB: planned in {planning}, usage in {timed(lambda: usage(store))} seconds"
    )
    print(f"{len(asked.rows)} rows, {len(asked.trainings)} trainings")
    return min(planning) <= 5


def timed(act: Callable[[], object]) -> list[float]:
    """The seconds of three calls."""
    return [round(timeit.timeit(act, number=1), 2) for _ in range(3)]


def main(what: str = "bytes", records: str = "10000") -> int:
    os.environ["TUNESMITH_USER"] = OWNER
    with (
        tempfile.TemporaryDirectory(dir=os.environ.get("TUNESMITH_BENCHMARKS")) as place,
        contextlib.ExitStack() as stack,
    ):
        root = Path(place) / "store"
        if what == "plan":
            return 0 if measure_plan(root, int(records)) else 1
        if what == "bytes":
            return 0 if measure_bytes(Home.local(root)) else 1
        server = Path(place) / "server"
        url, s3 = stack.enter_context(postgresql_server(server)), stack.enter_context(s3_server())
        os.environ.update(s3_environment(s3))
        return 0 if measure_bytes(Home(root, url, f"s3://{new_bucket(s3)}/p"), server) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
