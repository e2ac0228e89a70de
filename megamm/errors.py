"""The one exception for what a user can mend: `cli.main` prints it as one line and exits with code 2."""

from pathlib import Path


class UserError(Exception):
    """Wrong input of a user: what is wrong, where it is, and the remedy, in one line each."""

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str, on_all_ranks: bool = False) -> None:
        """on_all_ranks: every rank of the job raises it, so that one is enough to print it."""
        self.what, self.where, self.remedy, self.on_all_ranks = what, where, remedy, on_all_ranks
        place = f" ({where})" if where is not None else ""
        super().__init__(f"{what}{place}; {remedy}".replace("\n", " "))
