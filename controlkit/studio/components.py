"""gradio's components, handing over what the page holds as it is: what is wrong is said in our own words."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr

from controlkit.studio.uploads import is_shown

NOT_PUT_IN = "That is no picture that was put into this page."


def _own(component: type, preprocess: Callable[[Any, Any], Any]) -> Any:
    """A component class that reads what comes from the browser by `preprocess`.

    An instance's own method would be lost: for a session in which it was updated, gradio makes the component
    anew. gradio's metaclass is passed over because it writes a stub beside the module of each class that it
    makes.
    """
    names = {"__module__": component.__module__, "__qualname__": component.__qualname__}
    return ABCMeta.__new__(
        type(component), component.__name__, (component,), {**names, "preprocess": preprocess}
    )


def _file(self: Any, payload: Any) -> str | None:
    """A file that came through the page; gradio looks only at requests that say that they hold files."""
    if payload is None:
        return None
    if not is_shown(payload.path):
        raise gr.Error(NOT_PUT_IN, print_exception=False)
    return str(payload.path)


def _as_given(self: Any, payload: Any) -> Any:
    return payload


Picture = _own(gr.Image, _file)
"""Hands over the file as it came, which gradio would open."""
Slider = _own(gr.Slider, _as_given)
"""Hands over also nothing, and numbers outside of its range."""
Number = _own(gr.Number, _as_given)
"""Hands over also nothing, and fractions."""
