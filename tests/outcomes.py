"""What a command did, for tests that run commands in process."""

from collections.abc import Callable

Run = Callable[..., "Outcome"]


class Outcome:
    """What one command did: exit code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self) -> str:
        """The error's text; fails unless it is one plain line on stderr with exit code 2 and no result."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        (line,) = [line for line in self.err.splitlines() if not line.endswith(" ...")]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    def done(self) -> str:
        """What was printed; fails unless it worked."""
        assert self.code == 0, self.err
        return self.out
