"""Jobs that have cores and GPUs for themselves, also among workers that know nothing of each other."""

import multiprocessing
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.processes import keep, meet
from tests.tiny_project import settings, write_project
from tunesmith.core.errors import UsageError
from tunesmith.engines import device
from tunesmith.jobs import leases, queue
from tunesmith.jobs.leases import Lease
from tunesmith.jobs.places import HeldSlot, LocalPlace, Slot, divide, make_places, usable_cores
from tunesmith.jobs.worker import Worker
from tunesmith.project import Project
from tunesmith.store.store import Store

LEFT, RIGHT, BOTH = Slot((0,), ("0",)), Slot((1,), ("1",)), Slot((0, 1), ("0", "1"))


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_SLOTS", str(tmp_path / "locks"))


def taken(slot: Slot) -> HeldSlot:
    held = slot.take()
    assert held is not None
    return held


def test_cores_and_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two hardware threads of a physical core, 0 and 4 for example, come into one slot.
    monkeypatch.setattr("tunesmith.jobs.places._place", lambda core: (0, core % 4, core))
    assert divide(2, range(8), ["a", "b", "c"]) == [Slot((0, 4, 1, 5), ("a",)), Slot((2, 6, 3, 7), ("b", "c"))]
    assert divide(1, [3, 2], ()) == [Slot((2, 3))]
    assert str(divide(1, [3, 2], ["GPU-1"])[0]) == "cores 2 3, GPU GPU-1"
    with pytest.raises(UsageError, match="3 jobs at once would share cores"):
        divide(3, range(2), ())
    with pytest.raises(UsageError, match="3 jobs at once would share GPUs"):
        divide(3, range(8), ["0", "1"])


def test_a_slot_is_taken_as_a_whole_or_not_at_all() -> None:
    left = taken(LEFT)
    assert LEFT.take() is None
    assert BOTH.take() is None
    taken(RIGHT).release()  # what BOTH could have had is free again
    assert Slot((1,), ("0",)).take() is None, "another core, but the same GPU"
    left.release()
    taken(BOTH).release()


def test_a_folder_that_cannot_be_used_is_named_and_a_link_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "slots").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for folder in ("locks", "file"):
        monkeypatch.setenv("TUNESMITH_SLOTS", str(tmp_path / folder))
        with pytest.raises(UsageError, match="cannot be used") as refused:
            LEFT.take()
        assert refused.value.where == str(tmp_path / folder / "slots")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.attack("crash", "kill -9 of what holds a slot")
def test_a_slot_is_held_until_the_jobs_process_has_ended_too() -> None:
    """A worker that ends first does not free what its job still computes on; kill -9 of the job does."""
    spawn, held = multiprocessing.get_context("spawn"), taken(LEFT)
    ready = spawn.Event()
    child = spawn.Process(target=keep, args=(held, ready), daemon=True)  # a test that fails ends it
    child.start()
    assert ready.wait(120)
    held.release()
    assert LEFT.take() is None
    child.kill()
    child.join()
    taken(LEFT).release()


# Workers


def start(root: Path, lease: Lease, held: HeldSlot) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=meet, args=(root, lease, held))
    process.start()
    return process


def test_two_jobs_at_once_compute_on_different_cores_and_gpus(
    store: Store, olive: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = usable_cores()
    if len(cores) < 2:
        pytest.skip("one core")
    monkeypatch.delenv("TUNESMITH_THREADS", raising=False)
    numbers = [queue.add(store, "run", {}, project="p", actor="olive").id for _ in range(2)]
    places = [LocalPlace(slot, partial(start, store.root)) for slot in divide(2, cores, ["0", "1"])]
    Worker(store, "p", ["run"], places).run(until_empty=True)
    found = [queue.get(store, number).result for number in numbers]
    assert sorted(core for each in found for core in each["cores"]) == cores
    assert sorted(each["gpus"] for each in found) == ["0", "1"]
    assert [each["threads"] for each in found] == [len(each["cores"]) for each in found]
    assert usable_cores() == cores, "the worker may use all of them again"
    taken(divide(1, cores, ["0", "1"])[0]).release()


def test_a_worker_waits_for_jobs_of_others(store: Store, olive: None, monkeypatch: pytest.MonkeyPatch) -> None:
    number, said = queue.add(store, "run", {}, project="p", actor="olive").id, list[str]()
    (slot,), ended = divide(1, usable_cores(), ()), list[str]()

    def at_once(lease: Lease, _held: HeldSlot) -> BaseProcess:
        leases.finish(store, lease, {})
        ended.append("job")
        return multiprocessing.Process()  # not started: it is not alive, and has no exit code

    other = taken(slot)

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("waiting"):
            assert queue.get(store, number).state == "queued"
            other.release()

    monkeypatch.setattr(multiprocessing.Process, "join", lambda _: None)
    Worker(store, "p", ["run"], [LocalPlace(slot, at_once)], say=say).run(until_empty=True)
    assert said[0] == f"waiting: jobs of other workers hold {slot}"
    assert ended == ["job"]


# What a project's worker uses


def places(project: Project, at_once: int | None = None) -> list[str]:
    return [str(place) for place in make_places(project, at_once, print)]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Project]:
    monkeypatch.setattr("tunesmith.jobs.places.usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr("tunesmith.jobs.places._place", lambda core: (0, 0, core))
    monkeypatch.setattr(device, "gpu_names", lambda: ())

    def one(*gpus: str, **changes: Any) -> Project:
        monkeypatch.setattr(device, "gpu_names", lambda: gpus)
        return Project.load(write_project(tmp_path / "p", **{**settings(), **changes}))

    return one


def test_by_default_one_job_on_all_cores_or_one_for_each_of_several_gpus(made: Callable[..., Project]) -> None:
    assert places(made()) == ["cores 0 1 2 3"]
    assert places(made(), 2) == ["cores 0 1", "cores 2 3"]
    assert places(made("0")) == ["cores 0 1 2 3, GPU 0"]
    assert places(made("0", "1")) == ["cores 0 1, GPU 0", "cores 2 3, GPU 1"]
    assert places(made("0", "1"), 1) == ["cores 0 1 2 3, GPU 0 1"]
    # A job that computes on several GPUs has all of them.
    on_ray = made("0", "1", engine={"ray": {"workers": 2, "resources": {"GPU": 1}}})
    servers = made("0", "1", engine={"kind": "vllm", "start": 2, "gpus": [0, 1]})
    assert places(on_ray) == places(servers) == ["cores 0 1 2 3, GPU 0 1"]
    with pytest.raises(UsageError, match=r"starts the servers of engine\.start on the same GPUs"):
        places(servers, 2)


def test_gpus_are_named_as_they_were_shown_to_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(device, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.gpu_names() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b,7")  # torch sees two: the third is not there
    assert device.gpu_names() == ("GPU-a", "GPU-b")
