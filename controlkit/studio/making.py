"""From the page's values to pictures, and to the page again: what is made, and what is in the making."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from controlkit.studio.asked import MOST_PICTURES, MOST_STEPS, Asked, count_of, real, whole
from controlkit.studio.engine import Engine
from controlkit.studio.gallery import SHOWN, Made, as_before, chosen, in_the_making
from controlkit.studio.running import Notes, Run
from controlkit.studio.toasts import readable, toast
from controlkit.studio.turns import Turns
from controlkit.studio.visitors import Visitors

if TYPE_CHECKING:
    from controlkit.studio.create_tab import CreateTab
    from controlkit.studio.slot import Slot

BUSY = [gr.update(visible=False), gr.update(visible=True)]  # the buttons that generate and cancel
IDLE = [gr.update(visible=True), gr.update(visible=False)]
WAITING, CANCELLED = '<p role="status">Waiting for the device.</p>', "<p>Cancelled.</p>"
PROGRAM = "session "  # before the name of a visitor who has no browser that remembers it
_RANDOM_SEEDS = 2**31
_MOST_FOLLOW = 32  # pages at once, each of which has a thread of the server while it looks


class Making:
    """The button that generates and the one that cancels; one run per session.

    A session is a page as it was loaded once; a visitor's pages come and go, and his pictures stay.
    """

    def __init__(self, engine: Engine, keep: Path) -> None:
        self.engine, self.keep = engine, keep
        self.slots: list[Slot] = []
        self.turns, self.visitors = Turns(), Visitors()

    def listen(self, tab: CreateTab) -> None:
        """Wire the tab's buttons."""
        gallery, buttons = tab.gallery, [tab.go, tab.cancel]
        self.slots = tab.slots
        settings = [
            tab.prompt,
            tab.negative,
            tab.seed,
            tab.count,
            tab.steps,
            tab.guidance,
            tab.scheduler,
            tab.syntax,
        ]
        began = tab.go.click(
            self._begin,
            None,
            [gallery.status, *buttons],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        shown = [gallery.status, *buttons, gallery.made, gallery.strip, *gallery.shown]
        made = began.then(
            self._make,
            [
                *(tab.remembered.visitor, *settings, tab.width, tab.height, tab.photo),
                *(item for slot in tab.slots for item in slot.inputs),
            ],
            shown,
            concurrency_id="device",
            concurrency_limit=1,
            show_progress="hidden",
            trigger_mode="multiple",  # else a click is lost while one that was cancelled waits for its turn
            api_name="generate",
        )
        followed = tab.remembered.restored.change(
            self._follow, tab.remembered.visitor, shown, concurrency_limit=_MOST_FOLLOW,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        # a value that gradio itself refuses never comes to `_make`: the buttons would stay as they are
        for ended in (made, followed):
            ended.failure(
                self._refused, None, buttons, queue=False, show_progress="hidden", trigger_mode="multiple",
                api_visibility="private",
            )  # fmt: skip
        tab.page.unload(self._left)
        tab.cancel.click(
            self._stop,
            None,
            [gallery.status, *buttons],
            queue=False,
            show_progress="hidden",
            api_name="cancel",
        )

    @readable
    def _make(self, request: gr.Request, visitor: str, *values: Any) -> Iterator[list[Any]]:
        """Generate; what is finished is shown at once, and kept when somebody cancels."""
        session = str(request.session_hash)
        visitor = visitor or f"{PROGRAM}{session}"
        stop = self.turns.begin(session)
        yield from self._told(self._made(visitor, values, session, stop), visitor, session, stop)

    @readable
    def _follow(self, request: gr.Request, visitor: str) -> Iterator[list[Any]]:
        """Show a visitor's pictures on a page that was loaded anew, and those that are in the making."""
        run, made = self.visitors.run(visitor), self.visitors.made(visitor)
        session = str(request.session_hash)
        before = [*_strip(made), *(chosen(made[0]) if made else [gr.skip()] * SHOWN)]
        if run is None:
            yield [*[gr.skip()] * 3, *before]
            return
        self.turns.follow(session, run.stop)
        yield [run.bar(), *BUSY, *before]
        yield from self._told(self._watched(run, visitor, session), visitor, session, run.stop)

    def _told(
        self, steps: Iterator[list[Any]], visitor: str, session: str, stop: threading.Event
    ) -> Iterator[list[Any]]:
        """The steps of a run, and what is shown where an error ends them."""
        failed = False
        try:
            yield from steps
        except Exception as error:  # noqa: BLE001 - raised as what the page shows of it
            failed, told = True, toast(error)  # once: it is what writes to the terminal
            line = f'<p class="bad" role="alert">{told.message}</p>'
            yield [line, *self._ended(session, stop), gr.skip(), gr.skip(), *self._as_before(visitor)]
            raise told from None
        finally:  # also where the page has gone: the run goes on without it
            self.turns.end(session, stop, failed=failed)

    def _made(
        self, visitor: str, values: tuple[Any, ...], session: str, stop: threading.Event
    ) -> Iterator[list[Any]]:
        if stop.is_set():  # while it waited
            yield [CANCELLED, *self._ended(session, stop), gr.skip(), gr.skip(), *self._as_before(visitor)]
            return
        asked = self._asked(*values)
        run = Run(asked.plan(self.keep), stop, Notes(self.keep, guided=bool(asked.controls)))
        self.visitors.begin(visitor, run)
        run.begin(self.engine, lambda made: self.visitors.add(visitor, made))
        try:
            yield from self._watched(run, visitor, session)
        except GeneratorExit:  # the page has gone: of what is left behind only one can be in the making
            if run.waits or visitor.startswith(PROGRAM):
                stop.set()
            raise

    def _watched(self, run: Run, visitor: str, session: str) -> Iterator[list[Any]]:
        """What the page shows of a run until it ends. Raises what ended it, but for a click on Cancel."""
        seen, done, looked = 0, 0, None
        while not run.ended:
            seen = run.wait(seen)
            if run.ended:
                break
            made, preview, shown = run.pictures, run.preview, [gr.skip()] * SHOWN
            strip = [gr.skip()] * 2
            if len(made) > done:
                shown, strip, looked = chosen(made[-1]), _strip(self.visitors.made(visitor)), None
            elif preview is not None and preview is not looked:
                shown, looked = in_the_making(preview, begins=looked is None), preview
            done = len(made)
            yield [run.bar(), *[gr.skip()] * 2, *strip, *shown]
        run.join()
        fresh = run.pictures[done:]
        shown = chosen(fresh[-1]) if fresh else self._as_before(visitor)
        strip = _strip(self.visitors.made(visitor) if fresh else [])
        yield [run.line(), *self._ended(session, run.stop), *strip, *shown]
        if run.error is not None and not run.stopped:
            raise run.error

    def _as_before(self, visitor: str) -> list[Any]:
        return as_before(bool(self.visitors.made(visitor)))

    def _ended(self, session: str, stop: threading.Event) -> list[Any]:
        """The buttons at the end of a run: they stay as they are where the session waits for another."""
        stop.set()
        return self._buttons(session)

    def _buttons(self, session: str) -> list[Any]:
        return BUSY if self.turns.wanted(session) else IDLE

    def _begin(self, request: gr.Request) -> list[Any]:
        """Note that this session waits, so that it can cancel before its turn."""
        self.turns.click(str(request.session_hash))
        return [WAITING, *BUSY]

    def _refused(self, request: gr.Request) -> list[Any]:
        """Take back what `_begin` did, where the run has not begun."""
        session = str(request.session_hash)
        self.turns.refuse(session)
        return self._buttons(session)

    def _left(self, request: gr.Request) -> None:
        """Forget the clicks of a session whose turn will not come."""
        self.turns.leave(str(request.session_hash))

    def _stop(self, request: gr.Request) -> list[Any]:
        """Cancel all that this session waits for."""
        self.turns.stop(str(request.session_hash))
        return [CANCELLED, *IDLE]

    def _asked(
        self,
        prompt: str,
        negative: str,
        seed: str,
        count: Any,
        steps: Any,
        guidance: str,
        scheduler: str,
        syntax: str,
        width: str,
        height: str,
        photo: str | None,
        *slots: Any,
    ) -> Asked:
        """What the values of the components ask for."""
        left, controls = list(slots), []
        number = whole(seed, "Seed")
        count, steps = count_of(count, MOST_PICTURES, "Pictures"), count_of(steps, MOST_STEPS, "Steps")
        for slot in self.slots:
            values, left = left[: len(slot.inputs)], left[len(slot.inputs) :]
            controls.append(slot.asked(width, height, photo, *values))
        return Asked(
            prompt=prompt or "",
            negative_prompt=negative or None,
            base=self.engine.name,
            device=self.engine.device,
            dtype=self.engine.dtype,
            controls=[control for control in controls if control is not None],
            seed=random.randrange(_RANDOM_SEEDS) if number is None else number,
            count=count,
            steps=steps,
            guidance=real(guidance, "Guidance"),
            scheduler=scheduler,
            prompt_syntax=syntax,
            width=whole(width, "Width"),
            height=whole(height, "Height"),
        )


def _strip(made: list[Made]) -> list[Any]:
    """The visitor's pictures, the newest of them marked; nothing changes where there are none."""
    if not made:
        return [gr.skip(), gr.skip()]
    return [made, gr.update(value=[one.file for one in made], visible=True, selected_index=0)]
