"""From the page's values to pictures: generating beside the page, with a look at what is in the making."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from controlkit.infotext import PictureRecord
from controlkit.studio.asked import MOST_PICTURES, MOST_STEPS, Asked, count_of, real, whole
from controlkit.studio.engine import Engine, Stopped, Telling
from controlkit.studio.gallery import SHOWN, Made, as_before, chosen, in_the_making
from controlkit.studio.toasts import readable, toast
from controlkit.studio.turns import Turns
from controlkit.studio.uploads import write_shown
from controlkit.studio.wording import sentence

if TYPE_CHECKING:
    from controlkit.generate_plan import Plan
    from controlkit.studio.create_tab import CreateTab
    from controlkit.studio.slot import Slot

WORKER = "studio-generation"
BUSY = [gr.update(visible=False), gr.update(visible=True)]  # the buttons that generate and cancel
IDLE = [gr.update(visible=True), gr.update(visible=False)]
WAITING, CANCELLED = '<p role="status">Waiting for the device.</p>', "<p>Cancelled.</p>"
UNGUIDED = "No map guided this: there is no photo, or its strength is 0."
_RANDOM_SEEDS = 2**31
_LOOK_SECONDS = 0.2  # between two updates of the page


class Making:
    """The button that generates and the one that cancels; one run per session."""

    def __init__(self, engine: Engine, keep: Path) -> None:
        self.engine, self.keep = engine, keep
        self.slots: list[Slot] = []
        self.turns = Turns()

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
        made = began.then(
            self._make,
            [
                *(gallery.made, *settings, tab.width, tab.height, tab.photo),
                *(item for slot in tab.slots for item in slot.inputs),
            ],
            [gallery.status, *buttons, gallery.made, gallery.strip, *gallery.shown],
            concurrency_id="device",
            concurrency_limit=1,
            show_progress="hidden",
            trigger_mode="multiple",  # else a click is lost while one that was cancelled waits for its turn
            api_name="generate",
        )
        # a value that gradio itself refuses never comes to `_make`: the buttons would stay as they are
        made.failure(
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
    def _make(self, request: gr.Request, made: list[Made], *values: Any) -> Iterator[list[Any]]:
        """Generate; what is finished is shown at once, and kept when somebody cancels."""
        session, failed = str(request.session_hash), False
        stop = self.turns.begin(session)
        made = [one for one in made if one.there]
        try:
            if stop.is_set():  # while it waited
                yield [CANCELLED, *self._ended(session, stop), gr.skip(), gr.skip(), *as_before(bool(made))]
                return
            asked = self._asked(*values)
            yield from self._shown(asked.plan(self.keep), asked, made, stop, session)
        except Exception as error:  # noqa: BLE001 - raised as what the page shows of it
            failed, told = True, toast(error)  # once: it is what writes to the terminal
            line = f'<p class="bad" role="alert">{told.message}</p>'
            yield [line, *self._ended(session, stop), gr.skip(), gr.skip(), *as_before(bool(made))]
            raise told from None
        finally:
            self.turns.end(session, stop, failed=failed)

    def _shown(
        self, job: Plan, asked: Asked, made: list[Made], stop: threading.Event, session: str
    ) -> Iterator[list[Any]]:
        happened: queue.Queue[tuple[str, Any]] = queue.Queue()
        telling = Telling(lambda text, done, total: happened.put(("told", (text, done, total))), stop)
        notes = Notes(asked, self.keep)

        def work() -> None:
            try:
                self.engine.generate(
                    job,
                    telling,
                    preview=lambda picture: happened.put(("preview", picture)),
                    finished=lambda k, record: happened.put(("made", (k, record))),
                    noted=notes.add,
                )
                happened.put(("end", None))
            except BaseException as error:  # noqa: BLE001 - raised anew where it is shown
                happened.put(("end", error))

        worker = threading.Thread(target=work, name=WORKER, daemon=True)
        worker.start()
        busy = [gr.skip()] * 2
        try:
            done, previewed = 0, False
            while True:
                news = _gathered(happened)
                fresh = [self._finished(job, *one) for one in news.get("made", [])]
                made = [*fresh[::-1], *made]
                done += len(fresh)
                if "end" in news:
                    error = news["end"][-1]
                    stopped = isinstance(error, Stopped)
                    shown = chosen(fresh[-1]) if fresh else as_before(bool(made))
                    line = _line(job, done, stopped=stopped) + notes.html()
                    yield [line, *self._ended(session, stop), *_strip(made, fresh), *shown]
                    if error is not None and not stopped:
                        raise error
                    return
                bar = _bar(job, done, *news["told"][-1]) if "told" in news else gr.skip()
                shown = [gr.skip()] * SHOWN
                if fresh:
                    shown, previewed = chosen(fresh[-1]), False
                elif "preview" in news:
                    shown, previewed = in_the_making(news["preview"][-1], begins=not previewed), True
                yield [bar, *busy, *_strip(made, fresh), *shown]
        finally:
            stop.set()
            worker.join()

    def _finished(self, job: Plan, k: int, record: PictureRecord) -> Made:
        return Made(write_shown(job.outputs[k].read_bytes(), f"picture-seed-{record.seed}.png"), record)

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


class Notes:
    """What is to be known of the pictures, in the page's words."""

    def __init__(self, asked: Asked, keep: Path) -> None:
        self.keep = keep
        self.lines = [] if asked.controls else [UNGUIDED]

    def add(self, line: str) -> None:
        """Another one; what is wrong with a map is told beneath it already."""
        if not line.startswith(str(self.keep)):
            line = sentence(line.replace(f"{self.keep.parent}/", ""))
            self.lines += [line] * (line not in self.lines)

    def html(self) -> str:
        """As a list, in the status."""
        items = "".join(f"<li>{escape(line)}</li>" for line in self.lines)
        return f'<ul class="notes">{items}</ul>' if items else ""


def _gathered(happened: queue.Queue[tuple[str, Any]]) -> dict[str, list[Any]]:
    """Wait for news, and take all that there is."""
    news: dict[str, list[Any]] = {}
    kind, what = happened.get()
    news.setdefault(kind, []).append(what)
    if kind != "end":
        threading.Event().wait(_LOOK_SECONDS)
    while True:
        try:
            kind, what = happened.get_nowait()
        except queue.Empty:
            return news
        news.setdefault(kind, []).append(what)


def _strip(made: list[Made], fresh: list[Made]) -> list[Any]:
    """The session's pictures where there are new ones, the newest of them marked."""
    if not fresh:
        return [gr.skip(), gr.skip()]
    return [made, gr.update(value=[one.file for one in made], visible=True, selected_index=0)]


def _bar(job: Plan, made: int, text: str, done: int, total: int) -> str:
    """How far it is, as HTML."""
    count = len(job.outputs)
    share = done / total if total else 0.0
    told = f"Picture {min(made + 1, count)} of {count}" if total else f"{text[:1].upper()}{text[1:]}"
    return (
        f'<p role="status">{escape(told)}</p>'
        f'<progress max="1" value="{share:.3f}" aria-label="{escape(told)}"></progress>'
    )


def _line(job: Plan, made: int, *, stopped: bool) -> str:
    count = len(job.outputs)
    if stopped:
        return f"<p>Cancelled: {made} of {count} finished.</p>"
    return f"<p>{count} picture{'s' * (count != 1)} made.</p>"
