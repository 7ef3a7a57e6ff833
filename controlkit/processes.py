"""Several processes, on one machine or more, that share a job: started by ``accelerate launch``."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")


class Processes:
    """This process among those that share a job; alone, it needs neither accelerate nor torch."""

    def __init__(self, *, patience: timedelta | None = None) -> None:
        """Join the others, if there are any. ``patience``: how long one waits for another; None: usual."""
        self._state: Any = None
        self.index, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # set by the launcher
            import torch
            from accelerate import PartialState

            options = {} if patience is None else {"timeout": patience}
            self._state = PartialState(cpu=not torch.accelerator.is_available(), **options)
            self.index, self.count = self._state.process_index, self._state.num_processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does what is done once."""
        return self.index == 0

    @property
    def device(self) -> str:
        """The device meant for this process; "auto" where it is alone."""
        return "auto" if self._state is None else str(self._state.device)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def gather(self, items: list[Item]) -> list[Item]:
        """Return the items of all processes, in the processes' order, in each of them."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object

        gathered: list[Item] = gather_object(items)
        return gathered
