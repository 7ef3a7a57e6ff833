"""Errors as a person reads them: one plain line in a corner of the page, never a traceback."""

from __future__ import annotations

import html
import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from controlkit.notices import is_out_of_memory
from controlkit.studio.wording import line_of

SECONDS = 12.0  # that a toast stays
REFUSED = "() => window.controlkitRefused ?? ''"  # comes in the place of the button's own text
FULL = "The device's memory is full: ask for smaller or fewer pictures, or wait while a training runs."


def readable(work: Callable[..., Any]) -> Callable[..., Any]:
    """Let what goes wrong in a listener be read: a ValueError by its line, everything else by its name."""
    if inspect.isgeneratorfunction(work):

        @wraps(work)
        def steps(*values: Any, **named: Any) -> Any:
            try:
                yield from work(*values, **named)
            except Exception as error:  # noqa: BLE001 - whatever it is, the page stays usable
                raise toast(error) from None

        return steps

    @wraps(work)
    def whole(*values: Any, **named: Any) -> Any:
        try:
            return work(*values, **named)
        except Exception as error:  # noqa: BLE001
            raise toast(error) from None

    return whole


def of_the_browser() -> None:
    """A button that nobody sees: the page's script clicks it to tell what the browser refused."""
    button = gr.Button("", visible="hidden", elem_id="refused")
    button.click(_refused, button, None, js=REFUSED, show_progress="hidden", api_visibility="private")


@readable
def _refused(text: str) -> None:
    raise ValueError(text)


def toast(error: Exception) -> gr.Error:
    """The toast that tells an error; what only we can have caused goes to the terminal in full."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, ValueError):
        text = line_of(error)
    elif is_out_of_memory(error):
        text = FULL
    else:
        logging.getLogger("controlkit").error("the studio page", exc_info=error)
        text = f"Something went wrong inside ({type(error).__name__}); the terminal says more."
    return gr.Error(html.escape(text), duration=SECONDS, print_exception=False)
