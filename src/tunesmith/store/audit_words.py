"""What each action of the audit log is called on pages and in reports."""

from __future__ import annotations

from typing import Final

_WORDS: Final = {
    "alias.set": "changed which version an alias names",
    "answer.expire": "ended the wait for a decision on a held answer", "answer.refuse": "refused a held answer",
    "answer.release": "released a held answer", "answer.replace": "replaced a held answer",
    "audit.anchor": "anchored the audit log", "cases.add": "added kept requests to the rows",
    "cases.correct": "corrected the answer to a kept request", "cases.drop": "deleted kept requests",
    "cases.expire": "deleted kept requests that were too old", "cases.withdraw": "withdrew a kept request",
    "champion.refused": "stopped serving a champion", "champion.restored": "served a champion again",
    "data.sign": "signed off a dataset version", "file.add": "uploaded a file", "file.delete": "deleted a file",
    "job.add": "queued a job", "job.cancel": "cancelled a job", "job.end": "ended a job", "job.pause": "paused a job",
    "job.resume": "resumed a job", "recall.start": "recalled data or versions", "review.decide": "reviewed a row",
    "review.export": "exported reviewed rows", "review.fill": "added rows to the review queue",
    "rollout.abort": "aborted the rollout", "rollout.clock": "found that the clock was set back",
    "rollout.override": "overrode a check of the rollout", "rollout.pass": "found that the canary passed its analysis",
    "rollout.pause": "paused the rollout", "rollout.promote": "promoted the canary",
    "rollout.resume": "resumed the rollout", "rollout.rollback": "rolled back to the version before",
    "rollout.start": "started the rollout", "rollout.weight": "set the canary's share of requests",
    "session.end": "logged out", "session.link": "made a login link", "session.open": "logged in",
    "store.backup": "backed up the store", "store.migrate": "migrated the store", "store.restore": "restored the store",
    "test.use": "used test rows", "user.add": "added a user", "user.deactivate": "deactivated a user",
    "user.groups": "changed a user's groups", "user.key": "enrolled a key", "user.key.propose": "proposed a key",
    "user.key.reject": "rejected a proposed key", "user.key.retire": "retired a key",
    "user.key.revoke": "revoked a key", "user.roles": "changed a user's roles", "user.token": "issued a token",
    "user.token.revoke": "revoked a token", "version.approve": "approved a version",
    "version.export": "exported a version", "version.refuse": "refused a version",
    "version.register": "registered a version", "webhook.retry": "sent a webhook's failed requests again",
}  # fmt: skip


def audit_words(action: str) -> str:
    """What somebody did, such as "paused the rollout". An action of a later release keeps its name."""
    return _WORDS.get(action, action)
