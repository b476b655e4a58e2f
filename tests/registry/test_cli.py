"""The verbs: their documents, exit codes and what they say."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.fabricate import Chain, put_chain
from tunesmith.cli import audit, users, versions
from tunesmith.core.digests import digest_bytes, digest_of
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.evaluation.lines import encode_lines
from tunesmith.evaluation.policy.requests import policy_items
from tunesmith.evaluation.policy.settings import PolicyCheck
from tunesmith.pipeline.verdicts import changed_since
from tunesmith.registry.versions import Version
from tunesmith.store.people import tokens
from tunesmith.store.people.identities import add_user
from tunesmith.store.store import Store
from tunesmith.store.tables import AuditRow

app = typer.Typer()
for noun in (audit, users, versions):
    noun.register(app)


PROJECT = (
    "{name: intents, base: tiny, data: {sources: [{path: a.jsonl, licence: MIT}]}, candidates: {a: {}}, risk: RISK, "
    "task: {scorers: [json_valid]}, gates: {valid: {metric: json_valid, at_least: 0.9}}}"
)


def run(store: Store, *words: str, risk: str = "null", project: str = PROJECT) -> Result:
    folder = store.root
    if words[0] in ("register", "papers"):  # they read the project
        folder = store.root.parent
        (folder / "tunesmith.yaml").write_text(project.replace("RISK", risk))
        if not (folder / ".tunesmith").exists():
            (folder / ".tunesmith").symlink_to(store.root)
    result = CliRunner().invoke(app, [*words, "-C", str(folder)], env={"COLUMNS": "200"})
    if isinstance(result.exception, TunesmithError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def document(store: Store, *words: str, exit_code: int = 0) -> dict[str, Any]:
    result = run(store, *words, "--json")
    assert result.exit_code == exit_code, result.output
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def test_from_a_verdict_to_an_approved_version(store: Store, chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "empty" / "store" / "records").mkdir(parents=True)
    empty = Store(tmp_path / "empty" / "store")
    with pytest.raises(UsageError, match="nothing was judged yet"):
        run(empty, "register", "--name", "intents")
    assert "nothing is registered yet" in run(empty, "show").stderr
    registered = document(store, "register", chain.verdict[7:19], "--name", "intents")
    assert (registered["version"], registered["number"]) == ("intents@v1", 1)
    assert registered["digest"].startswith("sha256:")
    assert document(store, "register", "--name", "intents") == registered  # the newest verdict, and the same version
    with pytest.raises(Refused, match="it takes approver"):
        run(store, "approve", "intents@v1")
    approved = document(store, "approve", "intents@v1", "--as", "ann", "--reason", "fine")
    assert (approved["version"], approved["approver"]) == ("intents@v1", "ann")
    verified = document(store, "verify", "intents@v1")
    assert (verified["ok"], verified["problems"]) == (True, [])
    assert verified["checked"] > 15
    assert document(store, "verify", registered["digest"])["ok"]
    failed = ("register", put_chain(store, verdict="fail").verdict, "--name", "drill", "--override", "a drill")
    assert document(store, *failed)["override"] == "a drill"
    assert "its gates were overridden: a drill" in run(store, *failed).stdout
    said = run(store, "approve", "drill@v1", "--as", "ann", "--reason", "x").stdout
    assert "gates were overridden: a drill" in said
    assert "gates overridden" in run(store, "show").stdout
    add_user(store, "tess", ["engineer"], actor="olive", scope=Scope("acme"))
    with pytest.raises(UsageError, match="nothing was judged yet"):  # not the newest one of others
        run(store, "register", "--name", "intents", "--as", "tess")
    # A gate whose inputs did not change gives the record of before, even if another one is newer.
    store.keep_memo(digest_of({"latest": "verdict", "project": "intents"}), chain.verdict)
    assert document(store, "register", "--name", "intents")["verdict"] == chain.verdict


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("at_least: 0.9", "at_least: 0.95", "gate valid"),
        ("gates: {", "gates: {more: {metric: json_valid, at_least: 0.1}, ", "gate more"),
        ("gates: {", "policy: {quiet: {requests: [x], lacks: y}}, gates: {", "policy check quiet"),
    ],
)
@pytest.mark.attack("people", "a pass by gates that were changed since", "refused")
def test_a_verdict_by_other_gates_takes_an_override(
    store: Store, chain: Chain, old: str, new: str, changed: str
) -> None:
    project = PROJECT.replace(old, new)
    assert project != PROJECT
    for named in ((), (chain.verdict[7:19],)):
        with pytest.raises(Refused, match=f"changed since this verdict: {changed}"):
            run(store, "register", *named, "--name", "intents", project=project)
    made = run(store, "register", "--name", "intents", "--override", "agreed", project=project).stdout
    assert ("intents@v1" in made, "agreed" in made) == (True, True), made
    with pytest.raises(UsageError, match="nothing to override"):
        run(store, "register", "--name", "intents", "--override", "agreed")


def test_a_verdict_on_other_policy_requests_is_known(store: Store, chain: Chain, tmp_path: Path) -> None:
    """A request that was added to a check is one that nobody has been held to."""
    (tmp_path / "asked.jsonl").write_text('{"prompt": "open the vault"}\n')
    quiet = PolicyCheck.model_validate({"requests": "asked.jsonl", "lacks": "y"})
    settings = SimpleNamespace(policy={"quiet": quiet}, gates={})
    project: Any = SimpleNamespace(store=store, root=tmp_path, settings=settings)
    asked = digest_bytes(encode_lines(policy_items({"quiet": quiet}, tmp_path)))
    verdict = store.record(chain.verdict)
    measured = store.record(verdict.parents["evaluation"])
    body = {**measured.body, "policy": {"checks": {"quiet": quiet.rules}, "requests": asked, "candidates": {}}}
    evaluation = store.put_record(measured.model_copy(update={"body": body}))
    parents = {**verdict.parents, "evaluation": evaluation}
    judged = store.put_record(verdict.model_copy(update={"parents": parents, "body": {**verdict.body, "gates": []}}))
    assert changed_since(project, judged) == []
    for text in ('{"prompt": "open the vault"}\n{"prompt": "open the safe"}\n', "not JSON"):
        (tmp_path / "asked.jsonl").write_text(text)
        assert changed_since(project, judged) == ["policy requests"]


def test_a_refusal_is_shown_and_names_what_serves_no_more(store: Store, version: Version) -> None:
    with pytest.raises(UsageError, match="needs a reason"):
        run(store, "refuse", "intents@v1", "--as", "ann")
    refused = document(store, "refuse", "intents@v1", "--as", "ann", "--reason", "names a customer")
    assert (refused["version"], refused["approver"], refused["reason"]) == ("intents@v1", "ann", "names a customer")
    assert "refuse by ann" in run(store, "show", "intents@v1").stdout
    assert "refused (names a customer) by ann" in run(store, "verify", "intents@v1").stdout
    assert document(store, "audit", "show", "--action", "version.refuse")["entries"][0]["actor"] == "ann"


def test_a_failed_verification_exits_3_with_its_document(store: Store, version: Version) -> None:
    path = store.root / "versions" / "intents" / "v1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    found = document(store, "verify", "intents@v1", exit_code=3)
    assert found["ok"] is False
    assert found["problems"][0]["path"] == "versions/intents/v1/adapter_model.safetensors"
    shown = run(store, "verify", "intents@v1")
    assert shown.exit_code == 3
    assert "adapter_model.safetensors: its bytes are not the ones that were signed" in shown.stdout
    (store.root / "tunesmith.db").unlink()  # verifying opens no database
    (store.root / "mine.json").write_text("[]")
    found = document(store, "verify", "intents@v1", "--trust", str(store.root / "mine.json"), exit_code=3)
    assert "not trusted here" in found["problems"][0]["reason"]
    assert not (store.root / "tunesmith.db").exists()


def test_show_lists_versions_and_walks_both_ways(store: Store, version: Version, chain: Chain) -> None:
    node = document(store, "show", "intents@v1")
    assert (node["digest"], node["kind"], node["says"]) == (version.digest, "version", "intents@v1")
    assert {parent["role"] for parent in node["parents"]} == {"candidate", "evaluation", "verdict"}
    shown = run(store, "show", "intents@v1").stdout
    assert ("made from" in shown, "tuned: pass" in shown) == (True, True)
    assert "used for" in run(store, "show", chain.base[7:20]).stdout
    for name in ("lamps", "locks"):
        run(store, "register", chain.verdict[7:19], "--name", name)
    listed = document(store, "show", "--limit", "1")
    assert ([one["version"] for one in listed["versions"]], listed["total"]) == (["locks@v1"], 3)
    assert "the newest 1 of 3" in run(store, "show", "--limit", "1").stdout
    assert len(document(store, "show", "--limit", "0")["versions"]) == 3
    named = document(store, "show", "--name", "lam")
    assert ([one["version"] for one in named["versions"]], named["total"]) == (["lamps@v1"], 1)
    for words in (("lamps@v1", "--name", "lam"), ("zzzz",)):
        with pytest.raises(UsageError):
            run(store, "show", *words)


def test_users_and_tokens(store: Store, version: Version) -> None:
    added = document(store, "users", "add", "bob", "--role", "admin", "--role", "steward", "--tenant", "acme")
    assert (added["roles"], added["tenant"], added["fingerprint"]) == (["admin", "steward"], "acme", None)
    assert document(store, "users", "roles", "bob", "--role", "operator")["roles"] == ["operator"]
    assert document(store, "users", "groups", "bob", "--group", "hr", "--group", "board")["groups"] == ["board", "hr"]
    assert document(store, "users", "list")["users"][1]["groups"] == ["board", "hr"]
    assert document(store, "users", "groups", "bob")["groups"] == []
    for words, what in (
        (("groups", "bob", "--group", "../hr"), "not a group name"),
        (("token", "bob", "--expires", "soon"), "should match pattern"),
        (("revoke-token", "bob", "ci"), "bob has no token of that name"),
    ):
        with pytest.raises(UsageError, match=what):
            run(store, "users", *words)
    assert document(store, "users", "tokens")["tokens"] == []

    scopes = ("--scope", "read", "--scope", "chat", "--expires", "30d")
    made = document(store, "users", "token", "bob", "--name", "ci", *scopes)
    assert (made["user"], made["name"], made["scopes"]) == ("bob", "ci", ["chat", "read"])
    first = document(store, "users", "token", "bob")
    assert (first["name"], first["scopes"]) == ("first", ["all"])
    left = [datetime.fromisoformat(each["expires"]) - datetime.now(UTC) for each in (made, first)]
    assert [round(each / timedelta(days=1)) for each in left] == [30, 90]
    assert document(store, "users", "token", "ann", "--expires", "never")["expires"] is None
    listed = document(store, "users", "tokens", "bob")["tokens"]
    assert [(each["name"], each["status"]) for each in listed] == [("ci", "active"), ("first", "active")]
    assert {each["user"] for each in document(store, "users", "tokens")["tokens"]} == {"bob", "ann"}
    shown = run(store, "users", "tokens").stdout
    assert "chat, read" in shown
    assert not any(each["token"] in shown for each in (made, first))
    assert document(store, "users", "revoke-token", "bob", "ci", "--as", "bob")["status"] == "revoked"
    with pytest.raises(Refused, match="the token ci of bob was revoked"):
        tokens.authenticate(store, made["token"])
    assert tokens.authenticate(store, first["token"]) is not None

    assert [user["user"] for user in document(store, "users", "list")["users"]] == ["ann", "bob", "olive"]
    assert document(store, "users", "deactivate", "bob")["active"] is False
    with pytest.raises(Refused, match="it takes"):
        run(store, "users", "add", "eve", "--role", "admin", "--as", "ann")
    run(store, "users", "add", "eve", "--role", "admin")
    ended = run(store, "users", "deactivate", "olive", "--as", "eve")
    assert "no longer valid: intents@v1" in ended.stderr


def test_keys_are_made_enrolled_and_listed(store: Store, tmp_path: Path) -> None:
    made = document(store, "keys", "create")
    assert made["user"] == "olive"
    facts = {"user": "olive", "label": "key-1", "fingerprint": made["fingerprint"], "roles": ["admin", "engineer"]}
    state = {"active": True, "status": "active", "enrolled": 4, "until": None, "private": True}
    assert document(store, "keys", "list")["keys"] == [{**facts, **state}]
    (tmp_path / "theirs.pem").write_text((store.root / "trust" / "olive.pem").read_text())
    with pytest.raises(Refused, match="this key is olive's"):
        run(store, "keys", "enrol", "ann", str(tmp_path / "theirs.pem"))
    assert "PRIVATE" not in run(store, "keys", "list").output


def test_the_audit_log_is_verified_and_read(store: Store, version: Version) -> None:
    found = document(store, "audit", "verify")
    assert found["ok"]
    head = f"{found['head']['seq']}:{found['head']['digest']}"
    assert document(store, "audit", "verify", "--head", head)["ok"]
    shown = document(store, "audit", "show", "--action", "version.register")
    assert [entry["detail"]["version"]["number"] for entry in shown["entries"]] == [1]
    assert document(store, "audit", "show", "--limit", "1")["total"] == found["checked"]
    assert "version.register" in run(store, "audit", "show").stdout
    with store.writing() as session:
        session.get_one(AuditRow, 2).actor = "someone-else"
    broken = document(store, "audit", "verify", exit_code=3)
    assert broken["problems"] == [{"path": "audit log", "reason": "entry 2 was changed after it was written"}]
    assert run(store, "audit", "verify").exit_code == 3
    for text in ("12", "x:sha256:" + "0" * 64, "12:sha256:0"):
        with pytest.raises(UsageError, match="is not an entry"):
            run(store, "audit", "verify", "--head", text)


def test_a_risk_class_is_shown_until_everybody_approved(store: Store, chain: Chain) -> None:
    store.engine.dispose()
    said = run(store, "register", "--name", "intents", risk="{class: high}").output
    assert "risk class high: it needs 1 more approver with the role steward and 1 more approver" in said
    run(store, "users", "add", "stu", "--role", "approver", "--role", "steward")
    needs = "it needs 1 more approver with the role steward"
    said = run(store, "approve", "intents@v1", "--as", "ann").output
    assert (needs in said, "rollout start" in said) == (True, False)
    assert f"its risk class is high; {needs}" in run(store, "verify", "intents@v1").output
    assert f"approved by ann\n{needs}\n" in run(store, "show", "intents@v1").output
    assert "rollout start intents@v1" in run(store, "approve", "intents@v1", "--as", "stu").output
    listed = document(store, "show", "intents@v1")["approvals"]
    assert (listed["risk"]["roles"], listed["approvers"], listed["missing"]) == (["steward"], ["ann", "stu"], [])
