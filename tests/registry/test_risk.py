"""Risk classes: a version serves exactly if the people who approved it since its last refusal fill every place."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from tests.fabricate import Chain, approve
from tests.registry.test_approvals import approval_by, envelope, put_approval, reason_of, sealed
from tunesmith.core.errors import Refused, UsageError
from tunesmith.project import parse_settings
from tunesmith.registry.approvals import require_approved, submit_approval
from tunesmith.registry.history import verify_log
from tunesmith.registry.registration import register
from tunesmith.registry.risk import Requirement, RiskSettings, missing
from tunesmith.registry.serving import may_serve
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import statement_of
from tunesmith.registry.verification import verify_version
from tunesmith.registry.versions import Version
from tunesmith.services.releases import versions as service
from tunesmith.store import database
from tunesmith.store.people import identities
from tunesmith.store.people.roles import Role
from tunesmith.store.store import Store

HIGH = Requirement(risk_class="high", approvers=2, roles=("steward",))
EVERYBODY: dict[str, tuple[Role, ...]] = {
    "ann": ("approver",),
    "cat": ("approver",),
    "stu": ("approver", "steward"),
    "oli": ("approver", "operator", "steward"),
}


@pytest.fixture
def high(store: Store, chain: Chain) -> Version:
    for name, roles in EVERYBODY.items():
        if name != "ann":
            identities.add_user(store, name, roles, actor="olive")
    return register(store, name="intents", verdict=chain.verdict, actor="olive", risk=HIGH)


def fills(requirement: Requirement, people: Sequence[str]) -> bool:
    """Whether some way to give the places to different people fills them all: tries every way."""
    return len(people) >= requirement.approvers and any(
        all(role in EVERYBODY[name] for role, name in zip(requirement.roles, order, strict=False))
        for order in itertools.permutations(people, len(requirement.roles))
    )


@pytest.mark.parametrize("roles", [(), ("steward",), ("steward", "steward"), ("operator", "steward")])
@pytest.mark.parametrize("approvers", [2, 3])
def test_places_are_filled_as_well_as_they_can_be(roles: tuple[Role, ...], approvers: int) -> None:
    requirement = Requirement(risk_class="high", approvers=approvers, roles=roles)
    for count in range(len(EVERYBODY) + 1):
        for people in itertools.permutations(EVERYBODY, count):
            needed = missing(requirement, {name: EVERYBODY[name] for name in people})
            assert (needed == ()) == fills(requirement, people)
            # As many new people as it says, each with the role that it says, are enough.
            lacking = sum(int(phrase.split()[0]) for phrase in needed)
            assert count + lacking >= approvers


def test_a_requirement_says_who_is_missing() -> None:
    assert missing(None, {}) == ("1 more approver",)
    assert missing(HIGH, {}) == ("1 more approver with the role steward", "1 more approver")
    assert missing(HIGH, {"ann": ("approver",)}) == ("1 more approver with the role steward",)
    assert missing(HIGH, {"stu": ("approver", "steward")}) == ("1 more approver",)
    two = Requirement(risk_class="high", approvers=4, roles=("steward", "steward"))
    assert missing(two, {}) == ("2 more approvers with the role steward", "2 more approvers")


def test_one_person_fills_one_place_whatever_their_roles(store: Store, high: Version) -> None:
    approve(store, high, approver="stu")
    assert reason_of(store, high, override_by="olive") is None
    second = keys.create_key(store, "stu", actor="stu", label="second")
    statement = statement_of(high, again := approval_by(store, "stu"))
    signed = sealed(store, "stu", statement)
    assert second.label != identities.get_user(store, "stu").keys[0].label
    assert submit_approval(store, signed).approval.approver == "stu"
    put_approval(store, high, again, signed)  # even recorded with an entry of the log
    assert reason_of(store, high) == "not_approved"
    with pytest.raises(Refused, match="intents@v1 is not approved: needs 1 more approver") as refused:
        require_approved(store, high)
    assert "ask another person to run" in str(refused.value.fix)
    approve(store, high, approver="cat")
    assert reason_of(store, high) is None


def test_two_approvers_without_the_role_are_not_enough(store: Store, high: Version) -> None:
    said = service.approve(store, high.label, actor="ann")
    assert said.missing == ("1 more approver with the role steward",)
    service.approve(store, high.label, actor="cat")
    with pytest.raises(Refused, match="needs 1 more approver with the role steward"):
        require_approved(store, high)
    shown = service.show(store, high.label).approvals
    assert shown is not None
    assert (shown.approvers, shown.missing) == (("ann", "cat"), said.missing)
    assert (
        "its risk class is high; it needs 1 more approver with the role steward"
        in verify_version(store, high.label).notes
    )
    assert service.approve(store, high.label, actor="stu").missing == ()
    assert reason_of(store, high) is None
    # Who loses a role does not fill its place any more.
    identities.set_roles(store, "stu", ["approver"], actor="olive")
    assert reason_of(store, high) == "not_approved"
    assert "it needs 1 more approver with the role steward" in verify_version(store, high.label).notes[-1]


def test_the_class_is_the_versions_not_the_projects(store: Store, chain: Chain, high: Version) -> None:
    again = register(store, name="intents", verdict=chain.verdict, actor="olive", risk=HIGH)
    assert again == high
    lower = RiskSettings.model_validate({"class": "low"})
    looser = service.register(store, chain.verdict, name="intents", actor="olive", risk=lower)
    assert (looser.version, looser.number, high.number) == ("intents@v2", 2, 1)
    approve(store, high, approver="ann")
    service.approve(store, "intents@v2", actor="ann")
    assert reason_of(store, high) == "not_approved"
    assert service.show(store, "intents@v2").approvals.missing == ()  # type: ignore[union-attr]
    assert high.risk == HIGH
    forged = high.model_copy(update={"risk": None})
    with pytest.raises(Refused, match="this is not the version of that digest"):
        require_approved(store, forged)
    assert verify_log(store) == []


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_decisions_by_anybody(store: Store, high: Version, seed: int) -> None:
    """It serves exactly if those who approved it since the last refusal, with the roles they have, fill the places."""
    draw = random.Random(seed)
    log: list[tuple[str, str]] = []
    roles = dict(EVERYBODY)
    served = 0
    for _ in range(12):
        name = draw.choice(tuple(EVERYBODY))
        if draw.random() < 0.2:
            roles[name] = draw.choice((("approver",), ("approver", "steward"), ("operator",)))
            identities.set_roles(store, name, roles[name], actor="olive")
        elif "approver" in roles[name]:
            decision = "refuse" if draw.random() < 0.2 else "approve"
            submit_approval(store, envelope(store, high, name, decision))  # type: ignore[arg-type]
            log.append((name, decision))
        since = max((place + 1 for place, (_, said) in enumerate(log) if said == "refuse"), default=0)
        people = {who for who, _ in log[since:] if "approver" in roles[who]}
        holds = len(people) >= 2 and any("steward" in roles[who] for who in people)
        expected = None if holds else "refused" if since else "not_approved"
        assert reason_of(store, high) == expected
        served += holds
    with database.reading(store.engine) as session:
        assert may_serve(session, high).granted == (reason_of(store, high) is None)


def test_what_a_project_may_state() -> None:
    def of(**stated: object) -> Requirement:
        return RiskSettings.model_validate(stated).requirement

    assert of(**{"class": "low"}) == Requirement(risk_class="low", approvers=1)
    assert of(**{"class": "limited"}) == Requirement(risk_class="limited", approvers=2)
    assert of(**{"class": "high"}) == HIGH
    assert of(**{"class": "high", "approvers": 3, "roles": ["steward", "operator"]}).roles == ("operator", "steward")
    head = "name: x\nbase: y\ndata: {sources: [{path: a.jsonl, licence: MIT}]}\ncandidates: {a: {}}\nrisk: "
    for stated, problem in (
        ("{class: unacceptable}", "low"),
        ("{class: high, approvers: 1}", "the class high takes 2 or more"),
        ("{class: low, roles: [steward, operator]}", "2 roles need as many approvers, not 1"),
        ("{class: low, roles: [king]}", "steward"),
        ("{approvers: 2}", "class"),
        ("{class: low, approver: 2}", "did you mean 'approvers'"),
    ):
        with pytest.raises(UsageError, match=problem):
            parse_settings(head + stated, "tunesmith.yaml")
