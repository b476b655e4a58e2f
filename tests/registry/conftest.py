"""A store with an owner (olive: admin, engineer), an approver (ann), and a fabricated chain up to a passing verdict."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fabricate import Chain, put_chain
from tunesmith.registry.registration import register
from tunesmith.registry.versions import Version
from tunesmith.store.people import identities
from tunesmith.store.store import Store


@dataclass(frozen=True)
class Template:
    """Stores made once and copied for each test: making one takes 60 fsyncs."""

    unregistered: Path
    registered: Path
    chain: Chain
    version: Version


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    root = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_USER", "olive")
        store = Store(root / "unregistered")
        identities.ensure_owner(store)
        identities.add_user(store, "ann", ["approver"], actor="olive")
        chain = put_chain(store)
        store.engine.dispose()
        shutil.copytree(store.root, root / "registered")
        store = Store(root / "registered")
        version = register(store, name="intents", verdict=chain.verdict, actor="olive")
        store.engine.dispose()
    return Template(root / "unregistered", root / "registered", chain, version)


@pytest.fixture
def copy(template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A copy of the template, with its version where the test asks for `version`."""
    monkeypatch.setenv("TUNESMITH_USER", "olive")
    source = template.registered if "version" in request.fixturenames else template.unregistered
    shutil.copytree(source, tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture
def store(copy: Store) -> Store:
    return copy


@pytest.fixture
def chain(template: Template) -> Chain:
    return template.chain


@pytest.fixture
def version(template: Template) -> Version:
    """intents@v1, registered by olive. Asking for it makes `store` a copy that has it."""
    return template.version
