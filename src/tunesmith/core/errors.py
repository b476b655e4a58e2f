"""The errors a user sees. Each says what is wrong, where, and what to do; each carries its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from pydantic_core import CoreSchema


class NextStep(str):
    """What to do next: a text without a command, and for front ends that have commands the one that does it.

    verb: the command's name, such as "rollout promote". arguments: by the names of the command's parameters: ... where
    the person chooses the value, None or "" where there is none.
    """

    verb: str
    arguments: dict[str, object]

    def __new__(cls, words: str, verb: str = "", **arguments: object) -> Self:  # a copy gets its verb afterwards
        """The step of these words."""
        step = super().__new__(cls, words)
        step.verb, step.arguments = verb, arguments
        return step

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> CoreSchema:
        """As a field of a result: a text, which the context of `model_dump` words as {"worded": FUNCTION} says."""
        from pydantic_core import core_schema

        def worded(step: NextStep, info: Any) -> str:
            return str((info.context or {}).get("worded", str)(step))

        text = core_schema.str_schema()
        return core_schema.no_info_plain_validator_function(
            lambda given: given if isinstance(given, cls) else cls(given),
            json_schema_input_schema=text,
            serialization=core_schema.plain_serializer_function_ser_schema(worded, info_arg=True, return_schema=text),
        )


class TunesmithError(Exception):
    """Something failed for a reason the user can act on.

    what: one sentence, no trailing newline. where: a file, row, key or command. fix: what to do next. code: for
    programs, "" for the usual one. No text names a command or one of its options: a front end may have none.
    """

    exit_code: ClassVar[int] = 1
    usual_code: ClassVar[str] = ""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, code: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix
        self.code = self.usual_code if code is None else code

    def __str__(self) -> str:
        more = (f"\n  {name}: {said}" for name, said in (("where", self.where), ("fix", self.fix)) if said)
        return self.what + "".join(more)

    def as_json(self) -> dict[str, object]:
        """The document `--json` prints in place of a result."""
        return {"error": {"what": self.what, "where": self.where, "fix": self.fix, "exit": self.exit_code}}


class UsageError(TunesmithError):
    """The command, the settings or the input is not well formed (exit 2)."""

    exit_code = 2


class NotThere(UsageError):
    """What was named does not exist, or is not for whoever asks: both are said alike (exit 2)."""

    usual_code = "not_found"


class Refused(TunesmithError):
    """A gate failed, a verification failed or a policy said no (exit 3)."""

    exit_code = 3


class Forbidden(Refused):
    """Whoever asks may not do this (exit 3)."""


class Inconclusive(TunesmithError):
    """The evidence does not decide (exit 4). Never treated as a pass."""

    exit_code = 4

    @property
    def reason(self) -> str:
        """What is wrong and where, as records state it."""
        return f"{self.what} ({self.where})" if self.where else self.what
