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
import numpy as np

from controlkit.infotext import PictureRecord
from controlkit.studio.asked import Asked, real, whole
from controlkit.studio.engine import Engine, Stopped, Telling
from controlkit.studio.gallery import Made, chosen
from controlkit.studio.slot import SLOT_INPUTS
from controlkit.studio.slot import asked as asked_control
from controlkit.studio.toasts import readable, toast
from controlkit.studio.uploads import write_shown

if TYPE_CHECKING:
    from controlkit.generate_plan import Plan
    from controlkit.studio.create_tab import CreateTab

WORKER = "studio-generation"
OUTPUTS = 9  # of `_make`, between the status and the two buttons
BUSY = [gr.update(visible=False), gr.update(visible=True)]  # the buttons that generate and cancel
IDLE = [gr.update(visible=True), gr.update(visible=False)]
_RANDOM_SEEDS = 2**31
_LOOK_SECONDS = 0.2  # between two updates of the page


class Making:
    """The button that generates and the one that cancels; one run per session."""

    def __init__(self, engine: Engine, keep: Path) -> None:
        self.engine, self.keep = engine, keep
        self._waiting: dict[str, list[threading.Event]] = {}  # by session, in the order of the clicks
        self._taken: set[threading.Event] = set()  # those whose turn has come

    def listen(self, tab: CreateTab) -> None:
        """Wire the tab's buttons."""
        gallery, buttons = tab.gallery, [tab.go, tab.cancel]
        settings = [tab.prompt, tab.negative, tab.seed, tab.count, tab.steps, tab.guidance, tab.scheduler]
        slots = [item for slot in tab.slots for item in slot.inputs]
        began = tab.go.click(
            self._begin,
            None,
            buttons,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        made = began.then(
            self._make,
            [gallery.made, *settings, tab.width, tab.height, *slots],
            [gallery.status, gallery.made, gallery.strip, *gallery.shown, *buttons],
            concurrency_id="device",
            concurrency_limit=1,
            show_progress="full",
            show_progress_on=gallery.status,
            api_name="generate",
        )
        # a value that gradio itself refuses never comes to `_make`: the buttons would stay as they are
        made.failure(
            self._refused, None, buttons, queue=False, show_progress="hidden", api_visibility="private"
        )
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
        stop = self._take(request)
        try:
            job = self._asked(*values).plan(self.keep)
            yield from self._shown(job, [one for one in made if one.there], stop)
        except Exception as error:  # noqa: BLE001 - raised as what the page shows of it
            told = toast(error)  # once: it is what writes to the terminal
            line = f'<p class="bad">{told.message}</p>'
            yield [line, *[gr.skip()] * OUTPUTS, *IDLE]  # what was finished before stays
            raise told from None
        finally:
            self._dropped(request, stop)

    def _shown(self, job: Plan, made: list[Made], stop: threading.Event) -> Iterator[list[Any]]:
        happened: queue.Queue[tuple[str, Any]] = queue.Queue()
        telling = Telling(lambda text, done, total: happened.put(("told", (text, done, total))), stop)

        def work() -> None:
            try:
                self.engine.generate(
                    job,
                    telling,
                    preview=lambda picture: happened.put(("preview", picture)),
                    finished=lambda k, record: happened.put(("made", (k, record))),
                )
                happened.put(("end", None))
            except BaseException as error:  # noqa: BLE001 - raised anew where it is shown
                happened.put(("end", error))

        worker = threading.Thread(target=work, name=WORKER, daemon=True)
        worker.start()
        try:
            done = 0
            while True:
                news = _gathered(happened)
                fresh = [self._finished(job, *one) for one in news.get("made", [])]
                made = [*fresh[::-1], *made]
                done += len(fresh)
                if "end" in news:
                    error = news["end"][-1]
                    line = _line(job, done, stopped=isinstance(error, Stopped))
                    yield [*_update(made, fresh, line, None), *IDLE]
                    if error is not None and not isinstance(error, Stopped):
                        raise error
                    return
                bar = _bar(job, done, *news["told"][-1]) if "told" in news else gr.skip()
                yield [*_update(made, fresh, bar, news.get("preview", [None])[-1]), gr.skip(), gr.skip()]
        finally:
            stop.set()
            worker.join()

    def _finished(self, job: Plan, k: int, record: PictureRecord) -> Made:
        return Made(write_shown(job.outputs[k].read_bytes(), f"picture-seed-{record.seed}.png"), record)

    def _begin(self, request: gr.Request) -> list[Any]:
        """Note that this session waits, so that it can cancel before its turn."""
        self._waiting.setdefault(str(request.session_hash), []).append(threading.Event())
        return BUSY

    def _refused(self, request: gr.Request) -> list[Any]:
        """Take back what `_begin` did, where the run has not begun."""
        self._left(request)
        return IDLE

    def _left(self, request: gr.Request) -> None:
        """Forget the clicks of a session whose turn will not come."""
        session = str(request.session_hash)
        taken = [event for event in self._waiting.pop(session, []) if event in self._taken]
        if taken:
            self._waiting[session] = taken

    def _take(self, request: gr.Request) -> threading.Event:
        """What cancels the run whose turn it is: turns come in the order of the clicks."""
        waiting = self._waiting.setdefault(str(request.session_hash), [])
        stop = next((event for event in waiting if event not in self._taken), threading.Event())
        if stop not in waiting:
            waiting.append(stop)
        self._taken.add(stop)
        return stop

    def _dropped(self, request: gr.Request, stop: threading.Event) -> None:
        self._taken.discard(stop)
        session = str(request.session_hash)
        waiting = [event for event in self._waiting.pop(session, []) if event is not stop]
        if waiting:
            self._waiting[session] = waiting

    def _stop(self, request: gr.Request) -> list[Any]:
        """Cancel all that this session waits for."""
        for stop in self._waiting.get(str(request.session_hash), []):
            stop.set()
        return ["<p>Cancelled.</p>", *IDLE]

    def _asked(
        self,
        prompt: str,
        negative: str,
        seed: str,
        count: float,
        steps: float,
        guidance: str,
        scheduler: str,
        width: str,
        height: str,
        *slots: Any,
    ) -> Asked:
        """What the values of the components ask for."""
        rows = [slots[k : k + SLOT_INPUTS] for k in range(0, len(slots), SLOT_INPUTS)]
        controls = [control for row in rows if (control := asked_control(*row)) is not None]
        number = whole(seed, "the seed")
        return Asked(
            prompt=prompt or "",
            negative_prompt=negative or None,
            base=self.engine.name,
            device=self.engine.device,
            controls=controls,
            seed=random.randrange(_RANDOM_SEEDS) if number is None else number,
            count=int(count),
            steps=int(steps),
            guidance=real(guidance, "the guidance"),
            scheduler=scheduler,
            width=whole(width, "the width"),
            height=whole(height, "the height"),
        )


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


def _update(made: list[Made], fresh: list[Made], status: Any, preview: np.ndarray | None) -> list[Any]:
    """The outputs of `_make`: the status, and of what is new what shows it."""
    shown: list[Any] = [gr.skip()] * 7
    if fresh:
        shown = chosen(fresh[-1])
    if preview is not None and not fresh:
        shown[0] = preview
    if not fresh:
        return [status, gr.skip(), gr.skip(), *shown]
    strip = gr.update(value=[one.file for one in made], visible=True)
    return [status, made, strip, *shown]


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
