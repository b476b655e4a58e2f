"""The rollout tests' scene, for these tests too."""

from tests.rollout.conftest import made, scene, versions

__all__ = ["made", "scene", "versions"]
