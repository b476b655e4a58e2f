"""The whole chain on real input, command by command: `make demo`.

Everything a person would type stands behind a `$`. Run it again and what is unchanged is skipped; stop it at any moment
and it carries on where it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
from typer.testing import CliRunner

from tunesmith.cli.main import app

HERE = Path(__file__).parent
NAME = "home-intents"
BASELINE = "the baseline that serves today; it is measured in the same evaluation as its successor"
BAD = "wrong-prompt"
FORCED = "drill: show that a bad version is caught after its gate was overridden"
CLIENTS = 8  # people who talk to their home at the same time
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Run it."""
    began = time.monotonic()
    os.environ.pop("TUNESMITH_USER", None)
    heading("1  rows: sentences of a smart home, and the JSON that each one means")
    rows = HERE / "data" / "home_intents.jsonl"
    if not rows.is_file():
        subprocess.run([sys.executable, str(HERE / "make_rows.py")], check=True)
    heading("2  the chain: seal, measure the untuned candidates, train, measure, judge, sign")
    shown("run")
    evaluation = asked("evaluate", "--json")
    rival = best_untuned(evaluation)
    heading(f"3  what serves before: {rival}, the best candidate without tuning")
    tuned = registered("tuned")
    add_people()
    baseline = registered(rival, BASELINE)
    approved(baseline, BASELINE)
    if champion() is None:
        shown("rollout", "start", baseline)
    heading(f"4  from {baseline} ({rival}) to {tuned} (tuned), with real requests")
    approved(tuned, "every gate passed")
    with served() as server:
        if champion() != tuned:
            promote(server, tuned)
        heading("5  a worse version: the base with a prompt that asks for a sentence")
        shown("gate", BAD, expect=(3,))
        drill(server)
    heading("6  the evidence")
    shown("verify", tuned)
    shown("audit", "show", "--action", "version.register")
    shown("audit", "show", "--action", "rollout.override")
    shown("audit", "verify")
    shown("report", tuned, "--output", str(HERE / "report.html"))
    conclude(evaluation, rival, tuned, time.monotonic() - began)


def add_people() -> None:
    """Somebody other than the proposer to approve, and the home's own account."""
    known = {user["user"] for user in asked("users", "list", "--json")["users"]}
    for name, role in (("ada", "approver"), ("home", "operator")):
        if name not in known:
            shown("users", "add", name, "--role", role)


def registered(candidate: str, override: str | None = None) -> str:
    """A candidate's version, registered now where it is not yet; its gates decide unless overridden."""
    verdict = asked("gate", candidate, "--json", expect=(0, 3, 4))
    arguments = ["register", verdict["digest"]]
    if verdict["verdict"] != "pass" and override is not None:
        arguments += ["--override", override]
    return str(asked(*arguments, "--json")["version"])


def approved(version: str, reason: str) -> None:
    """Approve a version as ada; whoever registered it may not."""
    shown("approve", version, "--reason", reason, "--as", "ada")


def champion() -> str | None:
    """The version that serves, by its label."""
    known = asked("show", "--json")
    serving = {alias["version"] for alias in known["aliases"] if alias["alias"] == "champion"}
    return next((str(each["version"]) for each in known["versions"] if each["digest"] in serving), None)


def promote(server: Server, version: str) -> None:
    """Start the rollout where none is live, send requests until it is decided, resume it at its pause."""
    if not any(live(entry) for entry in rollouts()):
        shown("rollout", "start", version)
    resumed = False

    def decided(entry: dict[str, Any]) -> bool:
        nonlocal resumed
        if entry["status"] == "paused" and not resumed:
            shown("rollout", "status", str(entry["rollout"]))
            shown("rollout", "resume", str(entry["rollout"]))
            resumed = True
        return not live(entry)

    server.send_until(decided)
    shown("rollout", "status", str(rollouts()[0]["rollout"]))
    if champion() != version:
        raise SystemExit(f"{version} was not promoted")


def drill(server: Server) -> None:
    """Force the refused candidate into a canary and watch it being rolled back."""
    verdict = asked("gate", BAD, "--json", expect=(3,))["digest"]
    if all(version["verdict"] != verdict for version in asked("show", "--json")["versions"]):
        shown("register", verdict[:19], expect=(3,))
        shown("register", verdict[:19], "--override", FORCED)
    worse = str(asked("register", verdict, "--override", FORCED, "--json")["version"])
    if any(entry["canary"]["version"] == worse and not live(entry) for entry in rollouts()):
        say(f"  {worse} was rolled back before; nothing is left to do")
        return
    if not any(live(entry) for entry in rollouts()):
        shown("rollout", "start", worse, "--override", FORCED)
    server.send_until(lambda entry: not live(entry))
    shown("rollout", "status", str(rollouts()[0]["rollout"]))


def rollouts() -> list[dict[str, Any]]:
    """All, newest first."""
    found: list[dict[str, Any]] = asked("rollout", "status", "--json")["rollouts"]
    return sorted(found, key=lambda entry: -entry["rollout"])


def live(entry: dict[str, Any]) -> bool:
    """Whether a rollout still moves traffic."""
    return entry["status"] in ("running", "paused")


def best_untuned(evaluation: dict[str, Any]) -> str:
    """The untuned candidate with the highest mean of the leading metric."""
    means = {
        name: metrics[evaluation["primary"]]["mean"]
        for name, metrics in evaluation["candidates"].items()
        if not evaluation["tuned"][name]
    }
    return max(means, key=lambda name: means[name])


# The server, and the people who ask it


class Server:
    """A running endpoint."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url, token
        self._test = asked("data", "show", "--split", "test", "--limit", "0", "--json")["examples"]
        self._counted: dict[tuple[str, str], list[int]] = {}
        self._lock = threading.Lock()

    def send_until(self, decided: Callable[[dict[str, Any]], bool], at_most: int = 3000) -> None:
        """Requests of the test rows, each with the right answer as feedback, until the newest rollout is decided."""
        stop = threading.Event()
        turn = itertools.count()
        draw = random.Random(0)
        order = [draw.randrange(len(self._test)) for _ in range(at_most)]

        def client() -> None:
            asking = openai.OpenAI(base_url=self._url, api_key=self._token, max_retries=2)
            with httpx.Client(base_url=self._url.removesuffix("/v1"), timeout=60) as telling:
                while not stop.is_set() and (number := next(turn)) < at_most:
                    self._ask(asking, telling, self._test[order[number]])

        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client) for _ in range(CLIENTS)]
            try:
                told = 0.0
                while not decided(self.newest()) and not all(one.done() for one in clients):
                    if time.monotonic() - told > 10:
                        told = time.monotonic()
                        self._tell()
                    time.sleep(0.5)
            finally:
                stop.set()
            for one in clients:
                one.result()
        self._tell()

    def _ask(self, asking: openai.OpenAI, telling: httpx.Client, example: dict[str, Any]) -> None:
        *request, answer = example["messages"]
        given = asking.chat.completions.with_raw_response.create(model=f"{NAME}@champion", messages=request)
        completion = given.parse()
        right = completion.choices[0].message.content == answer["content"]
        feedback = {"request_id": completion.id, "expected": answer["content"]}
        headers = {"Authorization": f"Bearer {self._token}"}
        telling.post("/api/feedback", json=feedback, headers=headers).raise_for_status()
        with self._lock:
            counted = self._counted.setdefault(
                (given.headers["x-tunesmith-version"], given.headers["x-tunesmith-arm"]), [0, 0]
            )
            counted[0] += 1
            counted[1] += right

    def newest(self) -> dict[str, Any]:
        """The newest rollout."""
        headers = {"Authorization": f"Bearer {self._token}"}
        found = httpx.get(self._url.removesuffix("/v1") + "/api/rollouts", headers=headers, timeout=60)
        found.raise_for_status()
        newest: dict[str, Any] = max(found.json()["rollouts"], key=lambda entry: entry["rollout"])
        return newest

    def _tell(self) -> None:
        with self._lock:
            arms = [f"{version} ({arm}) {right}/{n} right" for (version, arm), (n, right) in self._counted.items()]
        say("  requests so far: " + (", ".join(sorted(arms)) or "none"))


@contextlib.contextmanager
def served(port: int = 0) -> Iterator[Server]:
    """`tunesmith serve` for as long as it is needed. port: 0 takes a free one."""
    token = asked("users", "token", "home", "--json")["token"]
    command = [sys.executable, "-m", "tunesmith", "serve", "--port", str(port), "--json", "-C", str(HERE)]
    say(f"$ tunesmith serve --port {port} &")
    log = (HERE / ".tunesmith" / "serve.log").open("a")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, preexec_fn=_die_with_parent)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise SystemExit(f"the server did not start: see {log.name}")
        url = json.loads(line)["url"]
        for _ in range(100):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url.removesuffix("/v1") + "/readyz", timeout=5).is_success:
                    break
            time.sleep(0.1)
        say(f"  {url}")
        yield Server(url, token)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        log.close()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)


# Commands


def shown(*arguments: str, expect: tuple[int, ...] = (0,)) -> None:
    """Run a command as a person would, its output shown. Any other exit code than expected ends the demo."""
    say("$ tunesmith " + shlex.join(str(HERE.name) if argument == str(HERE) else argument for argument in arguments))
    code = subprocess.run([sys.executable, "-m", "tunesmith", *arguments, "-C", str(HERE)], check=False).returncode
    if code not in expect:
        raise SystemExit(code)
    if code:
        say(f"  (exit code {code})")


def asked(*arguments: str, expect: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A command's JSON document. It runs in this process: to start one takes over a second."""
    done = CliRunner().invoke(app, [*arguments, "-C", str(HERE)])
    if done.exit_code not in expect:
        raise done.exception or SystemExit(done.stderr)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def conclude(evaluation: dict[str, Any], rival: str, tuned: str, seconds: float) -> None:
    """What came of it, and what to try."""
    metric = evaluation["primary"]
    before, after = (evaluation["candidates"][name][metric] for name in (rival, "tuned"))
    lift = next(gate for gate in asked("gate", "tuned", "--json")["gates"] if gate["name"] == "lift")
    heading(f"done in {seconds / 60:.1f} minutes")
    say(f"{tuned} serves. {metric}: {rival} {before['mean']:.1%} -> tuned {after['mean']:.1%};")
    say(f"lift {lift['value']:+.1%}, 95% interval {lift['low']:+.1%} to {lift['high']:+.1%}.")
    say("with a budget of 9m, 91.0% [83.2, 95.4] was measured on two cores of an AMD EPYC (Zen 4)")
    say(f"report: {HERE / 'report.html'}")
    say("\nthe second half needs no terminal: `make console`, then open, once and within ten minutes,")
    say(f"  {asked('login-link', '--json')['url']}")
    say("  README.md in examples/home_intents says what to do there; `make console` prints new links, too")
    say("\ntry next:")
    here = os.path.relpath(HERE)
    for command in (
        f'tunesmith chat {tuned} -C {here} -m "dim the bedroom lights to 20 percent"',
        f"tunesmith show {tuned} -C {here}",
        f"tunesmith compare {rival} tuned -C {here}",
        f"tunesmith rollout rollback {NAME} -C {here} --reason 'just to see'",
        "tunesmith init --data YOUR.jsonl --licence SPDX-ID -C my-project && tunesmith run -C my-project",
    ):
        say(f"  .venv/bin/{command}")


def heading(text: str) -> None:
    """A line between two parts."""
    say(f"\n== {text}")


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
