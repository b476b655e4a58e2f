"""/v1/files: the official client uploads, lists, reads and deletes; what is not valid is refused."""

import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import openai
import pytest

from tests.fabricate import OWNER, Scene
from tests.server.conftest import Served, running
from tests.server.fake_engine import FakeEngine
from tests.store.test_uploads import left
from tests.waiting import SECONDS, until
from tunesmith.server import limits
from tunesmith.server.errors import ApiError
from tunesmith.server.intake.form import FormReader
from tunesmith.store import database
from tunesmith.store.audit import entries
from tunesmith.store.copying import keys_of
from tunesmith.store.people.tokens import issue_token

ROWS = b'{"messages": []}\n'


def owner(served: Served) -> str:
    return issue_token(served.scene.store, OWNER, actor=OWNER)


def sent(served: Served, token: str, data: bytes = ROWS, name: str = "rows.jsonl", **fields: str) -> httpx.Response:
    with served.http(token) as http:
        return http.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune", **fields})


def test_the_official_client_keeps_lists_reads_and_deletes_files(served: Served) -> None:
    client = served.client(owner(served))
    data = random.Random(0).randbytes(3 << 20)  # no line ends where one would expect them
    made = [
        client.files.create(file=(f"ro\u00e4ws {number}.jsonl", BytesIO(data[number:])), purpose="fine-tune")
        for number in range(3)
    ]
    assert (made[0].bytes, made[0].filename, made[0].purpose) == (len(data), "ro\u00e4ws 0.jsonl", "fine-tune")
    assert (made[0].object, made[0].status) == ("file", "processed")
    ids = [each.id for each in made]
    assert [each.id for each in client.files.list(limit=2)] == ids[::-1]  # the client asks for the second page itself
    assert [each.id for each in client.files.list(order="asc", after=ids[0])] == ids[1:]
    assert client.files.list(purpose="batch").data == []
    assert client.files.retrieve(ids[1]) == made[1]
    assert client.files.content(ids[1]).content == data[1:]
    assert client.files.delete(ids[1]).deleted
    for again in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError, match="No such File object"):
            again(ids[1])
    assert [each.id for each in client.files.list(order="asc", after=ids[1])] == [ids[2]], "a page after a deleted file"
    assert [each.id for each in client.files.list(after=ids[1])] == [ids[0]]
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-0")
    backed_up = {key for key in keys_of(served.scene.store.blobs) if key.startswith("files/")}
    assert backed_up == {f"files/{ids[place]}.jsonl" for place in (0, 2)}
    kept = served.scene.store.root / "files" / f"{ids[0]}.jsonl"
    assert oct(kept.stat().st_mode & 0o777) == "0o400"
    assert not (kept.parent / f"{ids[1]}.jsonl").exists()
    with database.reading(served.scene.store.engine) as session:
        actions = [entry.action for entry in entries(session)][-4:]
    assert actions == ["file.add"] * 3 + ["file.delete"]
    kept.chmod(0o600)
    kept.write_bytes(b"something else")
    with pytest.raises((openai.APIError, httpx.HTTPError)):  # the answer breaks off: these are not the bytes that came
        _ = client.files.content(ids[0]).content


def test_who_may(served: Served) -> None:
    identifier = sent(served, owner(served)).json()["id"]
    amy, gil = served.person("amy", "engineer", tenant="acme"), served.person("gil", "engineer", tenant="globex")
    amys = sent(served, amy).json()["id"]
    with served.http(gil) as http:
        assert http.get("/v1/files").json()["data"] == []
        for missing in (amys, identifier, "file-none"):
            answers = [http.get(f"/v1/files/{missing}"), http.get(f"/v1/files/{missing}/content")]
            answers += [http.delete(f"/v1/files/{missing}"), http.get("/v1/files", params={"after": missing})]
            assert {(each.status_code, each.json()["error"]["code"]) for each in answers} == {(404, "file_not_found")}
    assert [each["id"] for each in served.get("/v1/files", owner(served)).json()["data"]] == [amys, identifier]


def test_uploads_that_are_refused(served: Served) -> None:
    token = owner(served)
    for data, name, fields, said in (
        (ROWS, "rows.json", {}, "Invalid file format for Fine-Tuning API. Must be .jsonl"),
        (b"", "rows.jsonl", {}, "The file is empty."),
        (ROWS, "rows.jsonl", {"purpose": "batch"}, "'batch' is not one of ['fine-tune'] - 'purpose'"),
        (ROWS, "rows.jsonl", {"expires_after[seconds]": "3600"}, "expires_after is not supported"),
        (ROWS, "rows.jsonl", {"colour": "red"}, "Unrecognized request argument supplied: colour"),
        (ROWS, "rows.jsonl", {"purpose": "x" * 2000}, "too long"),
    ):
        answer = sent(served, token, data, name, **fields)
        assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text
    whole = {"content-type": "multipart/form-data; boundary=b"}
    unended = b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\nfine-tune"
    with served.http(token) as http:
        for headers, body, said in (
            ({}, b"{}", "must be multipart/form-data"),
            (whole, unended, "before its last boundary"),
            (whole, b"--bx\r\n", "not valid"),
            (whole, b"preamble\r\n--b\r\n", "not valid"),
            (whole, b"--b\r\n" + b"x" * 9_000, ""),
            (whole, b"--b\r\n" + b"a: b\r\n" * 9_000, ""),
            (whole, b"--b\r\n\r\nx\r\n--b--", "has no name"),
            (whole, b"--b--", "'purpose' is a required property"),
        ):
            answer = http.post("/v1/files", headers=headers, content=body)
            assert (answer.status_code, said in answer.text) == (400, True), answer.text
        for query in ({"limit": "0"}, {"limit": "10001"}, {"order": "up"}):
            assert http.get("/v1/files", params=query).status_code == 400
    assert not [each for each in (served.scene.store.root / "work").iterdir() if each.name.startswith(".scratch")]


def test_too_large_too_slow_and_too_many(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UPLOADS_OF_USER", 1)
    settings = served.serving.settings
    served.serving.settings = settings.model_copy(update={"file_bytes": 4096, "body_seconds": 3})
    token = owner(served)
    assert sent(served, token, b"x" * 4096).status_code == 200
    assert sent(served, token, b"x" * 4097).status_code == 413
    waiting, go_on = threading.Event(), threading.Event()

    def post(pieces: Iterator[bytes]) -> httpx.Response:
        with served.http(token) as http:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            return http.post("/v1/files", headers=headers, content=pieces)

    def slow() -> Iterator[bytes]:
        yield b"--b\r\n"
        waiting.set()
        go_on.wait(SECONDS)
        yield b"x"

    answer = post(b"x" * 65536 for _ in range(3))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(post, slow())
        assert waiting.wait(SECONDS)
        until(served.serving.uploads.total)  # the server counts it
        again = sent(served, token, b"x")
        assert (again.status_code, again.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        until(lambda: not served.serving.uploads.total())  # its time is over
        go_on.set()
    assert late.result().status_code == 408
    assert sent(served, token, b"x").status_code == 200


def test_a_form_is_read_the_same_whatever_the_pieces(tmp_path: Path) -> None:
    content = b"\r\n--" + b"\r\n----\r\n----y" + os.urandom(50) + b"\r\n---\r\n"
    body = (
        b'----x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'----x\r\nContent-Type: a/b\r\nContent-Disposition: form-data; name="file"; filename="a;\\"b.jsonl"\r\n\r\n'
        + content + b"\r\n----x--epilogue"
    )  # fmt: skip
    for size in (1, 2, 3, 7, 50, len(body)):
        with (tmp_path / "file").open("wb+") as target:
            reader = FormReader("multipart/form-data; boundary=--x", target, 1000)
            for start in range(0, len(body), size):
                reader.feed(body[start : start + size])
            reader.end()
            target.seek(0)
            assert target.read() == content
        assert (reader.fields, reader.filename, reader.size) == ({"purpose": "fine-tune"}, 'a;"b.jsonl', len(content))
    for stated in ('multipart/form-data; boundary="a b"', "Multipart/Form-Data; charset=utf-8; boundary=ab"):
        assert FormReader(stated, BytesIO(), 1).size == 0
    long = f"multipart/form-data; boundary={71 * 'x'}"
    for stated in ("", "multipart/form-data", "multipart/mixed; boundary=x", long):
        with pytest.raises(ApiError):
            FormReader(stated, BytesIO(), 1)


def test_a_server_removes_at_its_start_what_killed_uploads_left(scene: Scene, engine: FakeEngine) -> None:
    left(scene.store, "file-a", socket.gethostname(), 0.0)
    with running(scene, engine):
        assert list(scene.store.blobs.keys("files/")) == []
