"""The one exception for what a user can mend: `cli.main` prints it as one line and exits with code 2."""

from pathlib import Path


class UserError(Exception):
    """Wrong input of a user: what is wrong, where it is, and the remedy, in one line each."""

    def __init__(self, what: str, *, where: str | Path | None = None, remedy: str) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        place = f" ({where})" if where is not None else ""
        super().__init__(f"{what}{place}; {remedy}".replace("\n", " "))
