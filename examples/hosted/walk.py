"""Hosted fine-tuning on PostgreSQL and S3, from the first upload to a version that a drift asked for.

Everything is real and starts here: a PostgreSQL server, an S3 server (moto's), `tunesmith serve` with its worker, and
OpenAI's clients for Node and Python, unchanged. Nothing is left afterwards.

    python examples/hosted/walk.py            # the help desk's tickets on the packaged base
    python examples/hosted/walk.py FOLDER     # another project with a rows.jsonl, as OpenAI's clients upload it

It ends with an error where something is not as the text says.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from parts import Service, Shared, heading, postgresql, require, s3, say, serving

HERE = Path(__file__).parent
MODEL = "gpt-4o-mini-2024-07-18"
EMAILS = 120  # requests of a new kind; drift is judged from 100 on


def main() -> None:
    """Run it."""
    os.environ.pop("TUNESMITH_USER", None)
    with tempfile.TemporaryDirectory(prefix="walk-") as made, contextlib.ExitStack() as parts:
        folder = Path(made)
        source = Path(sys.argv[1]) if len(sys.argv) > 1 else help_desk(folder / "help desk")
        heading("1  a PostgreSQL server and an S3 server")
        shared = Shared(parts.enter_context(postgresql(folder / "sql")), parts.enter_context(s3()))
        node = client_for_node(folder / "node")
        heading(f"2  {'Node' if node else 'Python'}: a job that nobody disturbs")
        with serving(shared, source, folder / "calm") as service:
            calm = tuned_by_node(service, node) if node else tuned_by_python(service)
            weights = service.weights(calm.model)
            refused(service, calm.model, node)
        heading("3  Python: the same job on another fresh server; its worker is killed while it trains")
        with serving(shared, source, folder / "disturbed") as service:
            disturbed = tuned_by_python(service, kill=True)
            require(disturbed.metrics == calm.metrics, "the loss of every step is the same")
            require(service.weights(disturbed.model) == weights, f"the weights have the same digest, {weights[:19]}...")
            answers_after_approval(service, disturbed.model, node)
            heading("4  requests drift, and a retrained version waits for an approval")
            drift(service)
    heading("done")


def help_desk(folder: Path) -> Path:
    """The project of this folder, with the tickets of examples/tickets as OpenAI's clients upload them."""
    folder.mkdir()
    for name in ("tunesmith.yaml", "answer.schema.json", "prompt.txt"):
        shutil.copy(HERE / name, folder)
    with (folder / "rows.jsonl").open("w") as rows:
        for line in (HERE.parent / "tickets" / "rows.jsonl").read_text().splitlines():
            ticket = json.loads(line)
            rows.write(json.dumps(conversation(ticket["prompt"], ticket["completion"])) + "\n")
    return folder


# Fine-tuning, by each client


@dataclass
class Tuned:
    """A job that succeeded. model: its name in requests; metrics: the CSV of its result file."""

    model: str
    metrics: str


def tuned_by_python(service: Service, *, kill: bool = False) -> Tuned:
    """Upload, create, poll the events, read the metrics. kill: kill the worker with SIGKILL while it trains."""
    client, seen = service.client, set[str]()
    with (service.folder / "rows.jsonl").open("rb") as rows:
        file = client.files.create(file=rows, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="desk", seed=7)
    say(f"  {file.id} is uploaded, {job.id} is {job.status}")
    while True:
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed([*client.fine_tuning.jobs.list_events(job.id, limit=100)]):
            if event.id in seen:
                continue
            seen.add(event.id)
            say(f"  {event.message}")
            if kill and (done := re.match(r"Training is (\d+)% done", event.message)) and int(done[1]) >= 30:
                service.kill_worker_of(int(job.id.removeprefix("ftjob-")))
                kill = False
        if job.status in ("succeeded", "failed", "cancelled"):
            break
        time.sleep(0.2)
    if job.fine_tuned_model is None:
        raise SystemExit(f"{job.id} is {job.status}: {job.error}")
    require(not kill, "the worker was killed in time")
    return shown_metrics(Tuned(job.fine_tuned_model, client.files.content(job.result_files[0]).text))


def tuned_by_node(service: Service, node: Path) -> Tuned:
    """The same by client.mjs."""
    last = ""
    with by_node(service, node, "tune", MODEL, str(service.folder / "rows.jsonl")) as lines:
        for line in lines:
            if last:
                say(f"  {last}")
            last = line.rstrip()
    return shown_metrics(Tuned(**json.loads(last)))


def shown_metrics(tuned: Tuned) -> Tuned:
    """The job, after the end of its metrics was shown."""
    first, *_, last = tuned.metrics.splitlines()
    say(f"  metrics, first and last line:\n    {first}\n    {last}")
    return tuned


def refused(service: Service, model: str, node: Path | None) -> None:
    """Call a model that nobody approved."""
    said = asked(service, model, "Hello", node)
    say(f"  {model} says: {said}")
    require("404" in said and "is not approved" in said, "without an approval it does not answer")


def answers_after_approval(service: Service, model: str, node: Path | None) -> None:
    """Approve a model's version, and call it by each client."""
    refused(service, model, None)
    service.shown("approve", f"{service.name}-desk@v1", "--as", "ada", "--reason", "read the evidence")
    question = service.rows()[0]["messages"][0]["content"]
    answers = {asked(service, model, question, client) for client in (None, node)}
    say(f"  {model} says: {' / '.join(answers)}")
    require(len(answers) == 1 and isinstance(json.loads(answers.pop()), dict), "it answers, the same to each client")


def asked(service: Service, model: str, question: str, node: Path | None) -> str:
    """What a model answers, or the error with its status."""
    if node is not None:
        with by_node(service, node, "chat", model, question) as lines:
            return "".join(lines).strip()
    try:
        answer = service.client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
    except openai.APIStatusError as error:
        return error.message  # it names the status
    return str(answer.choices[0].message.content)


def client_for_node(folder: Path) -> Path | None:
    """A folder with client.mjs and OpenAI's package for Node; None without Node, and then Python does everything."""
    folder.mkdir()
    shutil.copy(HERE / "client.mjs", folder)
    if shutil.which("npm") is None:
        return None
    say("$ npm install openai")
    done = subprocess.run(["npm", "install", "--silent", "openai@>=6"], cwd=folder, check=False)
    return folder if done.returncode == 0 else None


@contextlib.contextmanager
def by_node(service: Service, folder: Path, *words: str) -> Iterator[Iterator[str]]:
    """The lines that client.mjs prints."""
    given = {**os.environ, "URL": service.url, "TOKEN": service.token}
    command = ["node", "client.mjs", *words]
    with subprocess.Popen(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise SystemExit(f"client.mjs ended with exit code {process.returncode}")


# Drift


def drift(service: Service) -> None:
    """Serve a version, send it requests of another kind, and wait for the run that this causes."""
    name, served = service.name, f"{service.name}@v1"
    first = service.document("run", "--queue")["job"]
    service.finished(first)
    service.shown("approve", served, "--as", "ada", "--reason", "read the evidence")
    service.shown("rollout", "start", served)
    service.hold_against_champion()
    say(f"  from one day on, requests come as e-mails: {EMAILS} of them")
    rows, client = service.rows(), service.client
    for number in range(EMAILS):
        question = email(rows[number % len(rows)]["messages"][0]["content"], number)
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": question}])
    say("  somebody adds examples of such e-mails to the rows")
    with (service.folder / "rows.jsonl").open("a") as stream:
        for number, row in enumerate(rows[:EMAILS]):
            request, answer = (turn["content"] for turn in row["messages"])
            stream.write(json.dumps(conversation(email(request, number), answer)) + "\n")
    say("  a worker looks for causes every five minutes, and when it starts: end this one, so that another starts")
    service.kill_worker_of(first)
    due = service.until(lambda: next((each for each in service.jobs() if each["cause"].startswith("drift")), None))
    say(f"  job {due['job']} was queued because of {due['cause']}")
    service.finished(due["job"])
    service.shown("status")
    refused(service, f"{name}@v2", None)
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": question}])
    require(answer.model == served, f"{served} answers until somebody approves {name}@v2 and starts a rollout")


def email(text: str, number: int) -> str:
    """A request as an e-mail."""
    opening = ("Hello,", "Dear colleagues,", "Good morning,", "Hi all,")[number % 4]
    middle = ("Could somebody have a look today?", "It is the third time this month.", "Nothing else is affected.")
    closing = ("Kind regards", "Thank you very much", "Many thanks in advance", "Best wishes from the second floor")
    return f"{opening}\n\n{text}. {middle[number % 3]}\n\n{closing[number // 3 % 4]}"


def conversation(request: str, answer: str) -> dict[str, Any]:
    """A row."""
    turns = (("user", request), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


if __name__ == "__main__":
    main()
