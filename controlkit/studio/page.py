"""The page as a whole: its head and its tabs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_file_obj_with_meta, traverse

from controlkit.studio.components import NOT_PUT_IN
from controlkit.studio.create_tab import CreateTab
from controlkit.studio.engine import Engine
from controlkit.studio.server import KEPT
from controlkit.studio.toasts import of_the_browser
from controlkit.studio.train_tab import NAME, TrainTab
from controlkit.studio.uploads import is_shown

TITLE = "ControlKit studio"
SHOWN = 24 * 60 * 60  # seconds for which the page's copies of pictures are there; looked at hourly


def build(engine: Engine, runs: Path, data: Sequence[Path] | None = None) -> Any:
    """The page for a loaded engine. runs: the folder of the trainings. data: as in `TrainTab`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60 * 60, SHOWN)) as page:
        gr.HTML(_head(engine.name))
        of_the_browser()
        with gr.Tabs() as tabs:
            with gr.Tab("Create", id="create") as first:
                create = CreateTab(engine, runs / KEPT, page)
            with gr.Tab(NAME, id="train") as second:
                train = TrainTab(engine, runs, data)
        create.remember(train.fields)
        train.wire(tabs, second, first, create)
    page.queue(default_concurrency_limit=8)
    page.preprocess_data = _own_files_alone(page.preprocess_data)
    return page


def _own_files_alone(preprocess: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Refuse the files of a request that did not come through the page.

    Addresses gradio would fetch from other hosts, and of places on this machine it would tell the whole path.
    """

    def refuse(file: Any) -> Any:
        if not is_shown(file["path"]):
            raise gr.Error(NOT_PUT_IN, print_exception=False)
        return file

    async def guarded(function: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        traverse(inputs, refuse, is_file_obj_with_meta)
        return await preprocess(function, inputs, *rest, **named)

    return guarded


def _head(base: str) -> str:
    return (
        '<header class="masthead"><h1>ControlKit</h1><p>Pictures that follow a map</p>'
        f'<span class="base">base <b>{escape(base)}</b></span></header>'
    )
