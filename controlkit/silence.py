"""A report of progress that says nothing: for calls from Python that give none."""


class Silent:
    """What jobs tell of themselves, unheard."""

    def status(self, text: str) -> None:
        """What happens now."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far it is."""
