"""The exception for errors that a user can fix: `cli.main` prints it as one line and exits with code 2."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Wrong user input: what is wrong, where, and the remedy, in one line each."""

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        remedy: str,
        on_all_ranks: bool = False,
        is_transient: bool = False,
    ) -> None:
        """on_all_ranks: every rank of the job raises it, so that only one needs to print it.

        is_transient: a retry may succeed, so a run is restarted (exit code 1, not 2).
        """
        self.what, self.where, self.remedy = what, where, remedy
        self.on_all_ranks, self.is_transient = on_all_ranks, is_transient
        location = f" ({where})" if where is not None else ""
        super().__init__(f"{what}{location}; {remedy}".replace("\n", " "))

    def fields(self) -> dict[str, Any]:
        """Return the arguments that make this error again, for JSON."""
        where = None if self.where is None else str(self.where)
        return {"what": self.what, "where": where, "remedy": self.remedy} | {
            name: getattr(self, name) for name in ("on_all_ranks", "is_transient")
        }

    def __reduce__(self) -> tuple[Callable[[str], "UserError"], tuple[str]]:
        """Pickle it with all its fields, for another process."""
        made = partial(UserError, where=self.where, remedy=self.remedy)
        return partial(made, on_all_ranks=self.on_all_ranks, is_transient=self.is_transient), (self.what,)


class UnreadableMedia(ValueError):
    """A file that cannot be decoded; the message gives the reason. Builds count these and list them in a report."""

    def __init__(self, reason: str) -> None:
        # Decoders pass on their own reasons, some with line ends.
        super().__init__(" ".join(reason.split()))
