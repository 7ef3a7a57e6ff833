"""What of the studio page is there again after a reload: the fields, the pictures, what is in the making."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the studio page needs the extra ui")

import gradio
import numpy as np

from controlkit.figures import render
from controlkit.images import encode_png, write_png
from controlkit.studio import (
    drawn,
    gallery,
    making,
    private_folder,
    remembered,
    server,
    uploads,
    visitors,
)
from controlkit.studio.engine import Engine, Stopped, Telling, Wish
from controlkit.studio.running import WORKER
from controlkit.studio.slot import Latest

# gradio (6.31) and what it is built on use what Starlette is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # its event loops are never closed
]
WAIT = 60  # seconds; on a busy machine


@pytest.fixture
def memory(blocks: Any) -> remembered.Remembered:
    """What the page's browser remembers."""
    back = next(fn.fn for fn in blocks.fns.values() if getattr(fn.fn, "__name__", "") == "_back")
    found: remembered.Remembered = back.__self__
    return found


def back(memory: remembered.Remembered, kept: Any) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """What is kept from now on, the visitor's name, and the values of the fields that change."""
    now, visitor, _, *updates = memory._back(kept)
    json.dumps(now).encode()  # as it goes to the browser
    changed = {
        name: update["value"]
        for name, update in zip(memory.fields, updates, strict=True)
        if "value" in update
    }
    return now, visitor, changed


def photo(page_dir: Path) -> str:
    """A file that somebody put into the page."""
    return uploads.write_shown(encode_png(render(3).picture), "photo.png")


def test_every_field_comes_back(memory: remembered.Remembered, page_dir: Path) -> None:
    file = photo(page_dir)
    kept = {
        "photo": {"path": file}, "prompt": "a dög\n\"on\" <b>grass</b>", "negative": "dark", "count": 3,
        "seed": "17", "steps": 12, "guidance": "2.5", "scheduler": "euler", "syntax": "a1111", "width": "96",
        "height": "64",
    }  # fmt: skip
    for number in (1, 2, 3):
        kept |= {
            f"kind {number}": "depth", f"on {number}": True, f"low {number}": 20, f"high {number}": 60.0,
            f"scale {number}": 0.75, f"start {number}": 0.1, f"end {number}": 0.9, f"mode {number}": "guess",
            f"is_map {number}": True, f"adapter {number}": "/runs/mine/controlnet",
            f"pose {number}": {"of": "it", "people": [[1, 2, 1]]},
        }  # fmt: skip
    kept |= {"own 2": {"path": file}, "own 3": None}
    kept |= {
        "train source": "A folder", "train folder": "/home/me/photos", "train recipe": "tiny-depth",
        "train steps": 40, "train name": "mine",
    }  # fmt: skip
    assert set(kept) == set(memory.fields), "a field of the page is not remembered, or not tried here"
    wanted = {**kept, "photo": file, "own 2": file}
    wanted |= {f"adapter {number}": {"depth": "/runs/mine/controlnet"} for number in (1, 2, 3)}
    now, visitor, changed = back(memory, kept)
    assert changed == wanted
    assert now == {"visitor": visitor, **kept}


def test_a_first_visit_changes_nothing_and_names_are_secret(memory: remembered.Remembered) -> None:
    names = set()
    for kept in ({}, None, [], "visitor", 7, {"visitor": None}):
        now, visitor, changed = back(memory, kept)
        assert (now, changed) == ({"visitor": visitor}, {})
        names.add(visitor)
    assert len(names) == 6
    assert all(len(name) == 43 for name in names)
    for name in names:
        assert back(memory, {"visitor": name})[1] == name


@pytest.mark.parametrize(
    "forged",
    [None, True, -1, 1e9, 10**400, float("nan"), "no such thing", "x" * 30_000, "\ud800", [], [[]], {},
     {"path": 5}, {"path": "/etc/passwd"}, {"path": "{page_dir}/../secret.png"}, {"path": "{page_dir}"},
     {"path": "a\0b"}, {"path": "x" * 9000}, {"path": "{page_dir}/link.png"}, {"of": 5}],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)  # fmt: skip
def test_what_was_forged_is_a_fresh_field(memory: remembered.Remembered, page_dir: Path, forged: Any) -> None:
    secret = page_dir.with_name("secret.png")
    write_png(secret, render(3).picture)
    if not (page_dir / "link.png").exists():
        (page_dir / "link.png").symlink_to(secret)
    if isinstance(forged, dict) and isinstance(forged.get("path"), str):
        forged = {"path": forged["path"].replace("{page_dir}", str(page_dir))}
    now, visitor, changed = back(memory, dict.fromkeys([*memory.fields, "visitor", "other"], forged))
    texts = {"prompt", "negative", "seed", "guidance", "width", "height", "train folder", "train name"}
    fits = {
        None: {"photo", "own 2", "own 3"},
        True: {name for name in memory.fields if name.startswith(("on ", "is_map"))},
        "no such thing": texts | {name for name in memory.fields if name.startswith("adapter")},
    }
    allowed = next((names for value, names in fits.items() if value is forged or value == forged), set())
    joints = {name for name in changed if name.startswith("pose")}  # looked at once their pose is there
    assert set(changed) - joints <= allowed
    assert set(now) == {"visitor", *changed}
    assert visitor != forged


def test_joints_that_were_forged_move_nothing(blocks: Any, page_dir: Path) -> None:
    draw = next(fn.fn for fn in blocks.fns.values() if getattr(fn.fn, "__name__", "") == "_draw_on_device")
    values = (None, "openpose", False, 100, 200, "", "", photo(page_dir))
    found = draw(Latest(), None, *values)[-1]
    people = found.map.poses.people.tolist()
    name = found.made_of.name
    people[0][4][:2] = [20.0, 30.0]
    for joints in (people[0][:3], "all", None, {}, [[[10**400] * 3] * 18], [[["a", None, 1]] * 18]):
        assert not draw(Latest(), {"of": name, "people": joints}, *values)[-1].hand
    assert not draw(Latest(), {"of": "another", "people": people}, *values)[-1].hand
    moved = draw(Latest(), {"of": name, "people": people}, *values)
    assert moved[-1].map.poses.people[0, 4, :2].tolist() == [20.0, 30.0]
    assert moved[1]["value"]["found"] == found.map.poses.people.tolist()


def test_a_map_that_comes_after_another_wish_is_not_shown(blocks: Any, page_dir: Path) -> None:
    """The page says what it wants to `_begin`; the device draws later, perhaps in the midst of that."""
    draw, begin = (
        next(fn.fn for fn in blocks.fns.values() if getattr(fn.fn, "__name__", "") == name)
        for name in ("_draw_on_device", "_begin")
    )
    latest, rest = Latest(), (100, 200, "", "", photo(page_dir))
    wanted = begin(latest, None, "openpose", False, *rest)
    assert wanted[-1] != gradio.skip()
    edges = begin(latest, None, "canny", False, *rest)[4]
    assert draw(latest, None, edges, "openpose", False, *rest) == [gradio.skip()] * 5
    begin(latest, edges, "openpose", False, *rest)
    assert draw(latest, None, edges, "openpose", False, *rest)[-1].map.kind == "openpose"


def made(page_dir: Path) -> gallery.Made:
    """A picture of nothing in particular."""
    return gallery.Made(uploads.write_shown(b"a picture", "picture.png"), None)  # type: ignore[arg-type]


def test_pictures_are_their_visitors_alone(page_dir: Path) -> None:
    kept, mine, other = visitors.Visitors(), visitors.token_of(None), visitors.token_of(None)
    first, second = made(page_dir), made(page_dir)
    kept.add(mine, first)
    kept.add(mine, second)
    assert kept.made(mine) == [second, first]
    for name in (other, "", mine[:-1], mine.swapcase()):
        assert kept.made(name) == []
        assert kept.run(name) is None
    Path(second.file).unlink()
    assert kept.made(mine) == [first]


def test_the_oldest_pictures_and_visitors_are_forgotten(page_dir: Path) -> None:
    kept = visitors.Visitors()
    many = [made(page_dir) for _ in range(visitors.MOST_KEPT + 3)]
    for one in many:
        kept.add("first", one)
    assert kept.made("first") == many[:2:-1]
    assert [one.there for one in many[:4]] == [False, False, False, True]
    others = [made(page_dir) for _ in range(visitors.MOST_VISITORS)]
    for number, one in enumerate(others):
        kept.made("first")  # who comes back stays
        kept.made(f"nobody {number}")  # who has made nothing takes no room
        kept.add(f"other {number}", one)
    assert len(kept.made("first")) == visitors.MOST_KEPT
    assert (kept.made("other 0"), others[0].there) == ([], False)
    assert kept.made("other 1") == [others[1]]


def test_who_starts_afresh_leaves_nothing(page_dir: Path) -> None:
    kept, mine = visitors.Visitors(), visitors.token_of(None)
    one, run = made(page_dir), SimpleNamespace(ended=False, stop=threading.Event())
    kept.add(mine, one)
    kept.begin(mine, run)  # type: ignore[arg-type]
    kept.forget(mine)
    kept.forget("nobody")
    assert (kept.made(mine), kept.run(mine), one.there) == ([], None, False)
    assert run.stop.is_set()


class Slow:
    """An engine that makes pictures as they are let go; each is the same file."""

    name, device, dtype = "tiny", "cpu", None

    def __init__(self) -> None:
        self.next = threading.Semaphore(0)

    def generate(self, job: Any, report: Telling, *, preview: Any, finished: Any, noted: Any) -> None:
        """Make all pictures of a request."""
        report.status("generating")
        for k, file in enumerate(job.outputs):
            preview(np.full((8, 8, 3), k, np.uint8))
            while not self.next.acquire(timeout=0.05):
                report.waits()
            file.write_bytes(b"a picture")
            finished(k, record())


def record() -> Any:
    """What a picture of nothing was made with."""
    from controlkit.infotext import PictureRecord

    return PictureRecord(
        prompt="a cube", negative_prompt=None, base="tiny", steps=1, scheduler="ddim", seed=7, controls=(),
        guidance=1.0, width=64, height=64, device="cpu", dtype="float32", versions={},
    )  # fmt: skip


ASKED = ["a cube", "", "1", 2, 2, "", "ddim", "plain", "", "", None]


def page_of(session: str) -> Any:
    """A page as it was loaded once."""
    return SimpleNamespace(session_hash=session)


STATUS, GO, MADE, VIEW = 0, 1, 3, 5


def test_what_is_in_the_making_is_followed_by_the_next_page(page_dir: Path, tmp_path: Path) -> None:
    engine = Slow()
    making_ = making.Making(engine, tmp_path)  # type: ignore[arg-type]
    mine, other = visitors.token_of(None), visitors.token_of(None)
    making_._begin(page_of("one"))
    first = making_._make(page_of("one"), mine, *ASKED)
    next(first)
    first.close()  # the page is loaded anew
    making_._left(page_of("one"))
    engine.next.release()
    assert next(making_._follow(page_of("another"), other))[:5] == [gradio.skip()] * 5
    steps = making_._follow(page_of("two"), mine)
    begins = next(steps)
    assert begins[GO : GO + 2] == making.BUSY
    assert next(len(update[MADE]) for update in steps if update[MADE] != gradio.skip()) == 1
    steps.close()
    engine.next.release()
    steps = making_._follow(page_of("three"), mine)
    last = [*steps][-1]
    assert "2 pictures made" in last[STATUS]
    assert last[GO : GO + 2] == making.IDLE
    (again,) = making_._follow(page_of("four"), mine)
    assert len(again[MADE]) == 2
    assert again[VIEW]["value"] == again[MADE][0].file
    assert again[STATUS] == gradio.skip()
    assert not any(kept for name, kept in vars(making_.turns).items() if name != "_lock")


def test_what_the_page_before_began_can_be_cancelled(page_dir: Path, tmp_path: Path) -> None:
    making_ = making.Making(Slow(), tmp_path)  # type: ignore[arg-type]
    mine = visitors.token_of(None)
    first = making_._make(page_of("one"), mine, *ASKED)
    next(first)
    first.close()
    steps = making_._follow(page_of("two"), mine)
    next(steps)
    making_._stop(page_of("another"))
    assert making_.turns.wanted("two")
    making_._stop(page_of("two"))
    last = [*steps][-1]
    assert "0 of 2 finished" in last[STATUS]
    assert last[GO : GO + 2] == making.IDLE
    assert making_.visitors.run(mine) is None


def test_what_waits_is_given_up_with_its_page_and_what_a_program_makes(
    page_dir: Path, tmp_path: Path
) -> None:
    class Busy(Slow):
        def generate(self, job: Any, report: Telling, **named: Any) -> None:
            """Wait for a device that somebody else has."""
            while not self.next.acquire(timeout=0.05):
                report.waits()

    for engine, name in ((Busy(), visitors.token_of(None)), (Slow(), "")):
        making_ = making.Making(engine, tmp_path)  # type: ignore[arg-type]
        steps = making_._make(page_of("one"), name, *ASKED)
        next(steps)
        run = making_.visitors.run(name or f"{making.PROGRAM}one")
        assert run is not None
        steps.close()
        run.join()
        assert run.stopped


def test_an_error_is_told_to_the_page_that_is_there(page_dir: Path, tmp_path: Path) -> None:
    class Broken(Slow):
        def generate(self, *values: Any, **named: Any) -> None:
            """Fail once it is let go."""
            self.next.acquire()
            raise ValueError("the disk is full")

    engine = Broken()
    making_, mine = making.Making(engine, tmp_path), visitors.token_of(None)  # type: ignore[arg-type]
    first = making_._make(page_of("one"), mine, *ASKED)
    next(first)
    first.close()
    steps = making_._follow(page_of("two"), mine)
    next(steps)
    engine.next.release()
    with pytest.raises(gradio.Error, match="The disk is full"):
        list(steps)
    assert making_._refused(page_of("two")) == making.IDLE
    (after,) = making_._follow(page_of("three"), mine)
    assert after == [gradio.skip()] * len(after)


def test_a_program_has_the_pictures_of_its_own_session(page_dir: Path, tmp_path: Path) -> None:
    engine = Slow()
    making_ = making.Making(engine, tmp_path)  # type: ignore[arg-type]
    for session, count in (("one", 2), ("two", 2), ("one", 4)):
        engine.next.release(2)
        assert len([*making_._make(page_of(session), "", *ASKED)][-1][MADE]) == count
    for name in ("", "one", "session one"):
        assert visitors.token_of(name) != name, "a browser can name a program's session"


def test_who_waits_for_the_device_can_be_stopped() -> None:
    engine, stop = Engine("tiny"), threading.Event()
    quiet: dict[str, Any] = {"preview": None, "finished": None, "noted": None}
    with engine._busy, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(engine.generate, None, Telling(lambda *told: None, stop), **quiet)  # type: ignore[arg-type]
        time.sleep(0.3)
        assert not waits.done()
        stop.set()
        with pytest.raises(Stopped):
            waits.result(WAIT)
    engine.stop()
    assert not engine._stops


class Quiet:
    """A report that nobody reads."""

    def status(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:starlette")
def test_at_the_end_nothing_is_in_the_making_and_no_file_is_left(tmp_path: Path, loops: None) -> None:
    """Also of a page that has gone."""
    from gradio_client import Client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        patch.setattr("tempfile.tempdir", None)
        with server.opened("tiny", port=None, runs=str(tmp_path / "runs"), report=Quiet()) as address:
            client = Client(address, verbose=False, download_files=str(tmp_path / "downloads"))
            slot = (False, 1, 0, 1, "balanced", "", "canny", False, 100, 200, None)
            asked = ["a cube", "", "1", 16, 100, "", "ddim", "plain", "", "", None]
            job = client.submit(*asked, *slot, *slot, None, *slot, None, api_name="/generate")
            while not job.outputs():
                time.sleep(0.05)
            assert WORKER in [thread.name for thread in threading.enumerate()]
        assert not list((tmp_path / "temporary").glob("controlkit-*"))
    assert WORKER not in [thread.name for thread in threading.enumerate()]
    threading.Thread(target=client.close).start()  # which takes a second


_KILLED = """
import sys, time
from controlkit.studio.private_folder import private_folder
with private_folder() as place:
    (place / "photo.png").write_text("somebody's")
    print(place, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_page_left_goes_when_another_one_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    others = [tmp_path / name for name in ("controlkit-page", "controlkit-studio-abc", "other")]
    for other in others:
        other.mkdir()
    (tmp_path / f"{private_folder.PREFIX}link").symlink_to(tmp_path / "other")
    pages = [
        subprocess.Popen([sys.executable, "-c", _KILLED], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        places = [Path(page.stdout.readline().strip()) for page in pages if page.stdout is not None]
        pages[0].kill()
        pages[0].wait()
        assert [(place / "photo.png").is_file() for place in places] == [True, True]
        with private_folder.private_folder() as mine:
            assert [(place / "photo.png").is_file() for place in places] == [False, True]
            assert mine.is_dir()
        assert not mine.exists()
        assert all(other.is_dir() for other in others)
    finally:
        for page in pages:
            page.kill()
            page.communicate()


def test_a_map_is_made_once_however_many_ask(page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Engine("tiny"), []
    make = Engine.map

    def slowly(self: Engine, *values: Any, **named: Any) -> Any:
        asked.append(values)
        time.sleep(0.2)
        return make(self, *values, **named)

    monkeypatch.setattr(Engine, "map", slowly)
    maps, file = drawn.Maps(engine), photo(page_dir)
    made_of = drawn.MadeOf(file, Wish("canny"), (64, 64))
    with ThreadPoolExecutor(4) as pool:
        all_made = [job.result() for job in [pool.submit(maps.of, made_of) for _ in range(4)]]
    assert len(asked) == 1
    assert all(one is all_made[0] for one in all_made)
    for side in range(72, 72 + 8 * drawn.MOST_MAPS, 8):
        maps.of(drawn.MadeOf(file, Wish("canny"), (side, side)))
    assert len(maps._made) == drawn.MOST_MAPS
    assert maps.of(made_of) is not all_made[0]
    broken = drawn.MadeOf(str(page_dir / "gone.png"), Wish("canny"), (64, 64))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gone\.png"):
            maps.of(broken)
