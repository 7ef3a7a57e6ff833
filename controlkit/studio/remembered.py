"""What a browser remembers of the page: its fields, and the secret name of its visitor.

The browser keeps it itself. By the name the server finds the pictures; other browsers have other names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from controlkit.studio.toasts import readable
from controlkit.studio.uploads import is_shown
from controlkit.studio.visitors import token_of

NAME = "controlkit-studio"  # of what the browser keeps; it says nothing that would have to be kept secret
VISITOR = "visitor"
MOST_TEXT = 20_000  # characters of a field

_RESTORED = "() => { window.controlkitRestored = true; }"
# Files by their path; joints without their pictures, and those of a pose while another map is shown. Nothing
# before the page has what was kept: its first values would take the place of that.
_KEEP = """(kept, ...values) => {
  if (!window.controlkitRestored) return kept;
  const names = NAMES, now = { ...kept };
  values.forEach((value, k) => {
    if (value?.path) now[names[k]] = { path: value.path };
    else if (value?.people) now[names[k]] = { people: value.people, of: value.of };
    else if (!names[k].startsWith("pose")) now[names[k]] = value;
  });
  return now;
}"""


_AFRESH = f"""() => {{
  window.controlkitRestored = false;
  localStorage.removeItem("{NAME}");
  location.reload();
}}"""


@dataclass(frozen=True)
class Field:
    """One value. shown: the component that has it. event: tells that it changed. back: the component that
    takes what `read` makes of the kept values, by their names; it raises ValueError for what cannot be.
    """

    shown: Any
    event: Any
    back: Any
    read: Callable[[Mapping[str, Any]], Any]


def fields(components: Mapping[str, Any]) -> dict[str, Field]:
    """A field of each component, by its name: what it takes is what the component itself could have."""

    def field(name: str, one: Any) -> Field:
        return Field(one, one.change, one, lambda kept: _value(one, kept[name]))

    return {name: field(name, one) for name, one in components.items()}


class Remembered:
    """Keeps the fields in the browser, and brings them back to a page that is loaded.

    visitor: the secret name. restored: changes once, when that is done.
    """

    def __init__(self) -> None:
        self.kept = gr.BrowserState({}, storage_key=NAME, secret=NAME)
        self.visitor = gr.State("")
        self.restored = gr.State(None)
        self.fields: dict[str, Field] = {}

    def wire(self, page: gr.Blocks, fields: Mapping[str, Field]) -> None:
        """Listen to the page and to its fields."""
        self.fields = dict(fields)
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        back = [self.kept, self.visitor, self.restored, *(field.back for field in self.fields.values())]
        page.load(self._back, self.kept, back, **quiet)
        self.restored.change(None, None, None, js=_RESTORED, **quiet)
        keep = {
            "fn": None, "inputs": [self.kept, *(field.shown for field in self.fields.values())],
            "outputs": self.kept, "js": _KEEP.replace("NAMES", json.dumps([*self.fields])),
            "trigger_mode": "multiple",  # else the last of two changes can be lost
            **quiet,
        }  # fmt: skip
        events = [field.event for field in self.fields.values()]
        gr.on([event for event in events if hasattr(event, "has_trigger")], **keep)
        for event in events:
            if not hasattr(event, "has_trigger"):  # of a component that is ours
                event(**keep)

    def forgets(self, button: gr.Button, forget: Callable[[str], None]) -> None:
        """Let a button make this a first visit. forget: told the secret name."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        button.click(forget, self.visitor, None, **quiet).then(None, None, None, js=_AFRESH, **quiet)

    @readable
    def _back(self, kept: Any) -> list[Any]:
        """The kept values in their fields; whatever is none is left out, and the field stays as it is."""
        kept = kept if isinstance(kept, dict) else {}
        values = {name: _read(field, name, kept) for name, field in self.fields.items()}
        visitor = token_of(kept.get(VISITOR))
        good = {name: kept[name] for name, value in values.items() if value is not None}
        updates = [gr.skip() if value is None else value for value in values.values()]
        return [{VISITOR: visitor, **good}, visitor, object(), *updates]


def _read(field: Field, name: str, kept: Mapping[str, Any]) -> Any:
    """The update of a field; None where nothing that fits was kept."""
    try:
        return gr.update(value=field.read(kept)) if name in kept else None
    except ValueError:
        return None


def _value(component: Any, value: Any) -> Any:
    """A value that a component of the page could have. Raises ValueError for any other."""
    if isinstance(component, gr.Image):
        return None if value is None else file(value)
    if isinstance(component, gr.Checkbox):
        fits = isinstance(value, bool)
    elif isinstance(component, gr.Slider):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number and component.minimum <= value <= component.maximum
    elif isinstance(component, gr.Radio | gr.Dropdown):
        fits = value in [one for _, one in component.choices]
    else:
        return text(value)
    if not fits:
        raise ValueError("this field cannot have that value")
    return value


def text(value: Any) -> str:
    """A text of a field. Raises ValueError for anything else, and for one that no browser would show."""
    if not isinstance(value, str) or len(value) > MOST_TEXT:
        raise ValueError("this is no text of a field")
    value.encode()  # a UnicodeEncodeError is a ValueError, too
    return value


def file(value: Any) -> str:
    """A file that was put into the page and is still there. Raises ValueError for any other."""
    path = text(value.get("path") if isinstance(value, dict) else None)
    if not is_shown(path) or not os.path.isfile(path):
        raise ValueError("this file is not there")
    return path
