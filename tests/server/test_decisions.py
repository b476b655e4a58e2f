"""Approving and refusing over HTTP: the server holds no approver's key, and takes no signature but the caller's own."""

import base64
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]
from typer.testing import CliRunner

from tests.fabricate import NAME, OWNER
from tests.server.conftest import Served
from tunesmith.cli.main import app
from tunesmith.core.clock import stamp
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope
from tunesmith.registry.signing.attestations import ENVELOPE, fingerprint_of, public_pem, signed_bytes
from tunesmith.registry.versions import Version
from tunesmith.services import versions as service
from tunesmith.services.actions import Action
from tunesmith.services.versions import PrepareDecision
from tunesmith.store.people.identities import add_user
from tunesmith.store.people.tokens import issue_token
from tunesmith.store.people.user_keys import revoke_key

Versions = dict[int, Version]


def new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return key


class Approver:
    """A person with a key of their own, of which the store knows the public half."""

    def __init__(self, served: Served, name: str, folder: Path, scope: Scope = Scope()) -> None:
        self.file = folder / f"{name}.pem"
        self.key = new_key(self.file)
        public = public_pem(self.key.public_key())
        add_user(served.scene.store, name, ["approver"], actor=OWNER, scope=scope, public_key=public)
        self.token = issue_token(served.scene.store, name, actor=OWNER)
        self.http = served.http(self.token)

    def prepare(self, version: str, decision: str = "approve", **more: Any) -> httpx.Response:
        asked = {"version": version, "decision": decision, **more}
        return self.http.post("/api/decisions/prepare", json=asked)

    def signed(self, prepared: dict[str, Any]) -> dict[str, Any]:
        """What a client sends back."""
        signature = self.key.sign(base64.b64decode(prepared["payload"]), ec.ECDSA(hashes.SHA256()))
        encoded = base64.b64encode(signature).decode()
        return {"statement": prepared["statement"], "key": prepared["keys"][0], "signature": encoded}

    def submit(self, signed: dict[str, Any]) -> httpx.Response:
        return self.http.post("/api/decisions", json=signed)


@pytest.fixture
def ada(served: Served, tmp_path: Path) -> Approver:
    return Approver(served, "ada", tmp_path)


def said(approver: Approver, signed: dict[str, Any], signature: bytes | None = None) -> tuple[int, str]:
    """How the server answers. signature: in place of the right one."""
    if signature is not None:
        signed = {**signed, "signature": base64.b64encode(signature).decode()}
    answer = approver.submit(signed)
    return answer.status_code, answer.json().get("error", {}).get("message", "")


def test_refused_and_approved_again_with_a_key_that_never_came(served: Served, ada: Approver) -> None:
    assert served.post().status_code == 200
    for decision, status in (("refuse", 404), ("approve", 200)):
        prepared = ada.prepare(f"{NAME}@champion", decision, reason="a customer's name")
        assert prepared.status_code == 200
        assert served.post().status_code == (200 if decision == "refuse" else 404)  # nothing changed yet
        answer = ada.submit(ada.signed(prepared.json()))
        assert (answer.status_code, answer.json()["decision"], answer.json()["approver"]) == (200, decision, "ada")
        assert answer.json()["missing"] == ([] if decision == "approve" else ["1 more approver"])
        assert served.post().status_code == status
        again = ada.submit(ada.signed(prepared.json()))
        assert (again.status_code, again.json()["error"]["code"]) == (409, "decision_refused")
        assert "was recorded before" in again.json()["error"]["message"]
    assert not list((served.scene.store.root / "keys").glob("ada*"))


def test_only_the_callers_signature_over_what_was_prepared_is_taken(
    served: Served, ada: Approver, tmp_path: Path
) -> None:
    eve = Approver(served, "eve", tmp_path)
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    signed, foreign = ada.signed(prepared), ec.generate_private_key(ec.SECP256R1())
    der = base64.b64decode(signed["signature"])
    r, s = (half.to_bytes(32, "big") for half in decode_dss_signature(der))
    # Signed was the statement and not DSSE's encoding of it.
    plain = ada.key.sign(canonical(prepared["statement"]), ec.ECDSA(hashes.SHA256()))
    of_eve = base64.b64decode(eve.signed(prepared)["signature"])
    forms = (s + r, r + r, bytes(64), b"\xff" * 64, der[:64], (r + s)[:63], r + s + b"\0", der + b"\0", der[::-1])
    for wrong in (*forms, plain, of_eve):
        assert said(ada, signed, wrong) == (409, "The signature is not ada's."), wrong.hex()
    for sender, sent, why in (
        (eve, signed, "igned with ada's key, and sent by eve"),
        (ada, {**eve.signed(prepared), "key": fingerprint_of(eve.key)}, ""),
        (ada, {**signed, "key": fingerprint_of(foreign)}, "key that is not trusted here"),
        *((ada, {**signed, "statement": statement}, "") for statement in (
            {}, {"subject": []}, {"subject": [{"digest": {"sha256": 1}}], "predicate": {}},
        )),
    ):  # fmt: skip
        status, message = said(sender, sent)
        assert (status, why in message) == (409, True), message
    for body in ({**signed, "signature": "%%%"}, {**signed, "more": 1}, {"statement": {}}):
        assert ada.submit(body).status_code == 400
    assert served.post().status_code == 200
    assert said(ada, signed, r + s) == (200, "")  # as WebCrypto gives it
    assert served.post().status_code == 404
    late = ada.signed(ada.prepare(f"{NAME}@v1", "refuse", reason="why").json())
    revoke_key(served.scene.store, "ada", "key-1", since=1, actor=OWNER)
    status, message = said(ada, late)
    assert (status, "revoked" in message) == (409, True)
    assert ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()["keys"] == []


def test_a_changed_statement_is_refused_even_if_it_is_signed(ada: Approver) -> None:
    """Its time, above all: a signature does not wait for next month."""
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    for changed, why in (
        ({"until": stamp(timedelta(seconds=-1))}, "The time of the signed statement ended"),
        ({"until": stamp(timedelta(days=30))}, "The time of the signed statement ends too late"),
        ({"until": "2999-01-01T00:00:00"}, "does not say until when"),
        ({"until": "soon"}, "does not say until when"),
        ({"until": None}, "is not an approval or refusal"),
        ({"approver": "eve"}, ""),
    ):
        stated = prepared["statement"]["predicate"] | changed
        if stated["until"] is None:
            del stated["until"]
        statement = {**prepared["statement"], "predicate": stated}
        unsigned = {**ada.signed(prepared), "statement": statement}
        payload = base64.b64encode(signed_bytes(statement)).decode()
        signed = ada.signed({**prepared, "statement": statement, "payload": payload})
        status, message = said(ada, signed)
        assert (said(ada, unsigned)[0], status, why in message) == (409, 409, True), message
    assert said(ada, ada.signed(prepared))[0] == 200


def test_other_software_verifies_what_is_recorded(served: Served, ada: Approver) -> None:
    prepared = ada.prepare(f"{NAME}@v1", "refuse", reason="why").json()
    answer = ada.submit(ada.signed(prepared)).json()
    store = served.scene.store
    document = json.loads(store.read_blob(store.record(answer["record"]).blobs[ENVELOPE]))
    public = ada.key.public_key()
    keyid = fingerprint_of(ada.key).removeprefix("sha256:")
    envelope = Envelope.from_dict(document)
    assert envelope.verify([SSlibKey.from_crypto(public, keyid=keyid)], threshold=1).keys() == {keyid}
    assert json.loads(envelope.payload) == prepared["statement"]
    # And the other way round: what that software signs is taken here.
    prepared = ada.prepare(f"{NAME}@v1", "approve").json()
    made = Envelope(canonical(prepared["statement"]), "application/vnd.in-toto+json", {})
    signature = made.sign(CryptoSigner(ada.key, SSlibKey.from_crypto(public, keyid=keyid)))
    assert said(ada, ada.signed(prepared), bytes.fromhex(signature.signature))[0] == 200


def test_a_version_of_all_tenants_is_not_for_an_approver_of_one(served: Served, ada: Approver, tmp_path: Path) -> None:
    refused = Approver(served, "amy", tmp_path, Scope("acme")).prepare(f"{NAME}@v1", "refuse", reason="why")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    assert ada.prepare(f"{NAME}@v1", "refuse").status_code == 400  # no reason
    assert ada.prepare(f"{NAME}@v1", tenant="acme").status_code == 200  # a version for every tenant


def test_the_command_signs_here_and_checks_what_it_signs(
    served: Served, ada: Approver, versions: Versions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUNESMITH_TOKEN", ada.token)
    words = ["refuse", f"{NAME}@v1", "--server", served.url, "--key", str(ada.file), "--reason", "why", "--json"]
    result = CliRunner().invoke(app, [*words, "-C", str(tmp_path)], catch_exceptions=False)
    document = json.loads(result.stdout)
    assert (document["decision"], document["approver"], document["digest"]) == ("refuse", "ada", versions[1].digest)
    assert served.post().status_code == 404

    def decide(version: str = f"{NAME}@v1", server: str = served.url, key: Path | None = ada.file) -> object:
        return service.decide(server, key, PrepareDecision(version=version, decision="approve"))

    new_key(tmp_path / "other.pem")
    with pytest.raises(Refused, match="not an active one"):
        decide(key=tmp_path / "other.pem")
    servers = ("http://203.0.113.1", "http://[", "ftp://x", "", "http://127.0.0.1.example.org", "https://")
    for wrong in ({"key": None}, {"version": f"{NAME}@champion"}, *({"server": server} for server in servers)):
        with pytest.raises(UsageError):
            decide(**wrong)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="the server did not answer"):
        decide(server="http://127.0.0.1:9")
    with pytest.raises(Refused, match=r"said no \(404\).*no version"):
        decide(version=f"{NAME}@v99")
    elsewhere = ["approve", f"{NAME}@v1", "--key", str(ada.file)]
    for more, said in ((["--server", served.url, "--as", "eve"], "the token is ada's"), ([], "--key applies to")):
        with pytest.raises(TunesmithError, match=said):
            CliRunner().invoke(app, [*elsewhere, *more, "-C", str(tmp_path)], catch_exceptions=False)
    asked: list[str] = []
    lie: dict[str, Any] = {}
    honest = service._sent

    def lying(http: httpx.Client, to: Action[Any, Any], sent: dict[str, Any]) -> Any:
        """A server that states another version than it was asked for."""
        asked.append(to.name)
        found: Any = honest(http, to, sent)
        found.statement.update(lie)
        return found

    monkeypatch.setattr(service, "_sent", lying)
    for untrue, said in (
        ({"subject": [{"name": versions[2].label, "digest": {"sha256": "0" * 64}}]}, "asks for another signature"),
        ({"predicateType": "urn:tunesmith:key-change:v1"}, "not an approval or refusal"),
        ({"subject": []}, "not an approval or refusal"),
    ):
        lie = untrue
        with pytest.raises(Refused, match=said):
            decide()
    assert set(asked) == {"decision.prepare"}  # nothing was signed
    assert served.post().status_code == 404
