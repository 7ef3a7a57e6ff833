"""`controlkit ui`: the page behind a port, on this machine alone unless somebody asks for more."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.studio.private_folder import private_folder
from controlkit.studio.uploads import MAX_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from controlkit.notices import Report

HOST = "127.0.0.1"
PORT = 7860
RUNS = "runs"
KEPT = "studio"  # the folder within it where pictures and their maps are kept
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]  # of this machine, to itself
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def check_installed() -> None:
    """Raise ValueError, before anything is loaded, unless gradio is there."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ValueError('the page needs gradio: pip install "controlkit[ui]"')


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def trainable(host: str, data: Sequence[str]) -> list[Path] | None:
    """The folders within which the pictures of a training have to lie: those that are named.

    None is anywhere: where none is named, and the page is reached from this machine alone. Raises ValueError
    for a name that is no folder.
    """
    for name in data:
        if not os.path.isdir(os.path.expanduser(name)):
            raise ValueError(f"{name} is not a folder: --data takes one with data sets for trainings")
    if not data and is_loopback(host):
        return None
    return [Path(os.path.realpath(os.path.expanduser(name))) for name in data]


_LAST_PORT = 65535


@contextmanager
def opened(
    base: str = "tiny", *, device: str = "auto", dtype: str | None = None, host: str = HOST,
    port: int | None = PORT, runs: str = RUNS, data: Sequence[str] = (), report: Report,
) -> Iterator[str]:  # fmt: skip
    """The page, served within the block; yields its address. port: None is any free one. data: as in
    `trainable`.

    Raises ValueError for a base, a device, a precision, a folder or a port that cannot be had.
    """
    check_installed()
    if port is not None and not 1 <= port <= _LAST_PORT:
        raise ValueError(f"the port must be a number from 1 to {_LAST_PORT}, not {port}")
    if os.path.exists(runs) and not os.path.isdir(runs):
        raise ValueError(f"{runs} is a file: --runs takes a folder for trainings and pictures")
    folders = trainable(host, data)
    page: Any = None
    engine: Any = None
    with private_folder() as place, _surroundings({**_QUIET, "GRADIO_TEMP_DIR": str(place)}):
        try:
            report.status(f"loading the libraries and the base {base}")
            from controlkit.studio.engine import Engine
            from controlkit.studio.look import css, js, theme
            from controlkit.studio.page import build

            engine = Engine(base, device=device, dtype=dtype)
            engine.load()
            page = build(engine, Path(os.path.abspath(runs)), folders)
            _, address, _ = _launch(page, host, port, theme=theme(), css=css(), js=js())
            yield address
        finally:
            if page is not None:
                page.close(verbose=False)
            if engine is not None:
                engine.stop()  # what a page that has gone left in the making


@contextmanager
def _surroundings(variables: Mapping[str, str]) -> Iterator[None]:
    """Within the block the environment has these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _launch(page: Any, host: str, port: int | None, **look: Any) -> Any:
    try:
        return page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            max_file_size=MAX_BYTES,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,  # or the browser keeps every request, and offers to tell another host
            footer_links=[],
            app_kwargs={"middleware": _guards(host)},
            **look,
        )
    except OSError as error:
        raise ValueError(f"cannot serve on {host}, port {port}: choose another --port or --host") from error


def _guards(host: str) -> list[Any]:
    """What stands before the page: one for this machine alone answers to no name but this machine's.

    Another site's name may be made to lead here (DNS rebinding), and its scripts would then read the page.
    Nor does it do what another site's page asks for.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if not is_loopback(host):
        return []
    names = [*LOOPBACK_NAMES, host]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False),
        Middleware(_own_pages_alone),
    ]


def _own_pages_alone(app: ASGIApp) -> ASGIApp:
    """Refuse what a page of another address asks for; browsers name its address as the Origin."""
    from starlette.datastructures import Headers
    from starlette.responses import PlainTextResponse

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        own = headers.get("host"), headers.get("x-forwarded-host")  # which no page of another site can give
        if "origin" in headers and headers["origin"].partition("://")[2] not in own:
            await PlainTextResponse("Asked for by a page of another address", 403)(scope, receive, send)
        else:
            await app(scope, receive, send)

    return guarded


def _free_port(host: str) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def told(address: str, host: str, runs: str) -> list[str]:
    """What is to be known of a page that is open."""
    lines = [f"the page is at {address} (Ctrl-C ends it)", f"pictures are kept in {Path(runs) / KEPT}"]
    if not is_loopback(host):
        lines.append(
            f"warning: anyone who reaches port {address.rsplit(':', 1)[-1].strip('/')} can use this machine"
        )
    return lines


def wait() -> None:
    """Until somebody ends it, by Ctrl-C or SIGTERM."""
    import signal
    import threading

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    while not ended.wait(1.0):
        pass
