"""The studio page, driven as a program drives it: what comes of it is what the command line makes."""

import json
import os
import re
import runpy
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import seldom

pytest.importorskip("gradio", reason="the studio page needs the extra ui")

from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from outcomes import Run

from controlkit import infotext
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.figures import render
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.preprocessors import get
from controlkit.sampling import generate
from controlkit.studio import commands, run_folders, server
from controlkit.studio.running import WORKER

# gradio (6.31) and what it is built on use what Starlette and websockets are about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:starlette"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # its server's event loops are never closed
]
STEPS = 4


class Page(NamedTuple):
    """The page that is open: its address, the folder of the runs, and a photo."""

    address: str
    runs: Path
    photo: Path


class Quiet:
    """A report that nobody reads."""

    def status(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, loops: None) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("studio")
    write_png(folder / "photo.png", render(1).picture)
    runs = folder / "my runs"
    with server.opened("tiny", port=None, runs=str(runs), report=Quiet()) as address:
        yield Page(address, runs, folder / "photo.png")


@pytest.fixture
def client(page: Page, tmp_path: Path) -> Iterator[Client]:
    client = Client(page.address, verbose=False, download_files=str(tmp_path / "downloads"))
    yield client
    threading.Thread(target=client.close).start()  # which takes a second


def draw(
    client: Client, photo: Path, kind: str = "canny", *, is_map: bool = False, low: float = 100.0
) -> Any:
    """What the page shows of a photo's map."""
    name = "/device_map" if kind != "canny" and not is_map else "/map"
    return client.predict(kind, is_map, low, 200.0, "", "", handle_file(str(photo)), api_name=name)


def slot(*, on: bool = True, scale: Any = 1.0, start: Any = 0.0, end: Any = 1.0, mode: str = "balanced",
         kind: str = "canny", is_map: bool = False, low: Any = 100.0, high: Any = 200.0,
         pose: Any = None) -> tuple[Any, ...]:  # fmt: skip
    """The values of a control."""
    return (on, scale, start, end, mode, "", kind, is_map, low, high, pose)


SKIPPED = {"__type__": "update"}  # what stays as it is
NO_SLOT = (*slot(on=False), None)  # the second and the third have pictures of their own


def values(
    photo: Path | None, *, prompt: str = "a red figure", negative: str = "", seed: str = "3", count: Any = 1,
    steps: Any = STEPS, guidance: str = "", syntax: str = "plain", width: str = "",
    first: tuple[Any, ...] = slot(scale=0.8), second: tuple[Any, ...] = NO_SLOT,
) -> list[Any]:  # fmt: skip
    """The values of the page."""
    file = None if photo is None else handle_file(str(photo))
    settings = [prompt, negative, seed, count, steps, guidance, "ddim", syntax, width, "", file]
    return [*settings, *first, *second, *NO_SLOT]


def make(client: Client, photo: Path | None, **named: Any) -> Any:
    """What the page shows of a generation: what it was told last of each part, which may be told once."""
    job = client.submit(*values(photo, **named), api_name="/generate")
    job.result()
    told = list(zip(*job.outputs(), strict=True))
    return tuple(next((one for one in reversed(part) if one != SKIPPED), part[-1]) for part in told)


def picture_of(shown: Any) -> Path:
    """The file of the picture that the page shows."""
    found = [item for item in shown if isinstance(item, str) and item.endswith(".png")]
    return Path(found[0])


def in_a_shell(command: str) -> list[str]:
    """The words that `controlkit` would be given by a shell."""
    shown = subprocess.run(
        ["sh", "-c", f"controlkit() {{ printf '%s\\0' \"$@\"; }}; {command}"],
        check=True,
        capture_output=True,
        text=True,
    )
    return shown.stdout.split("\0")[:-1]


def test_the_way_from_a_photo_to_a_picture(page: Page, client: Client) -> None:
    shown = draw(client, page.photo, low=60.0)
    edges = get("canny", low=60.0, high=200.0)(load_picture(page.photo)).image
    np.testing.assert_array_equal(load_picture(shown[0]["value"]), edges)
    made = picture_of(make(client, page.photo, first=slot(scale=0.8, end=0.9, mode="unbalanced", low=60.0)))
    base = load_base("tiny")
    from controlkit.adapters import load_adapter

    control = Control(load_adapter("canny", base=base), edges, scale=0.8, end=0.9, mode="unbalanced")
    (expected,) = generate(base, "a red figure", controls=[control], steps=STEPS, seeds=[3])
    np.testing.assert_array_equal(load_picture(made), expected)
    record = infotext.parse(read_png_text(made), source=made)
    assert (record.prompt, record.seed, record.steps) == ("a red figure", 3, STEPS)
    assert read_png_text(made)["parameters"].startswith("a red figure\nSteps: 4")


@pytest.mark.parametrize("syntax", [pytest.param("plain", marks=pytest.mark.slow), "a1111"])
def test_the_command_and_the_script_make_the_same_picture(
    page: Page, client: Client, run: Run, syntax: str
) -> None:
    prompt = "a 'red' figure, $HOME \"quoted\"; (#1:1.3)"
    shown = make(client, page.photo, prompt=prompt, syntax=syntax)
    made = picture_of(shown)
    command, script = (
        text for text in shown if isinstance(text, str) and text.startswith(("controlkit", "import"))
    )
    record = infotext.parse(read_png_text(made), source=made)
    assert record.prompt_syntax == syntax
    assert (command, script.strip()) == (commands.command(record), commands.script(record).strip())
    run(*in_a_shell(command)).done()
    assert Path(commands.OUTPUT).read_bytes() == made.read_bytes()
    Path(commands.OUTPUT).unlink()
    Path("script.py").write_text(script, encoding="utf-8")
    runpy.run_path("script.py")
    assert load_picture(commands.OUTPUT).tobytes() == load_picture(made).tobytes()


def record_of(prompt: str, *controls: infotext.ControlRecord) -> infotext.PictureRecord:
    return infotext.PictureRecord(
        prompt=prompt, negative_prompt="- this", base="tiny", steps=1, scheduler="ddim", seed=0,
        controls=controls, guidance=1.0, width=64, height=64, device="cpu", dtype="float32", versions={},
    )  # fmt: skip


def test_the_script_says_of_an_adapter_that_it_pools() -> None:
    """A file in the original's layout does not, and would be used without."""
    controls = (
        infotext.ControlRecord(kind, "photo.png", "", False, "a.pth") for kind in ("shuffle", "canny")
    )
    script = commands.script(record_of("x", *controls))
    assert "Control(load_adapter('a.pth', base=base, kind='shuffle'), 'photo.png', kind='shuffle'" in script
    assert "Control(load_adapter('a.pth', base=base), 'photo.png', kind='canny'" in script
    named = commands.script(
        record_of("x", infotext.ControlRecord("canny", "p.png", "", False, "a_shuffle.pth"))
    )
    assert "load_adapter('a_shuffle.pth', base=base, kind='canny')" in named


@pytest.mark.parametrize("prompt", ["-n 4", "--help"])
def test_a_prompt_that_looks_like_an_option_stays_a_prompt(run: Run, prompt: str) -> None:
    record = record_of(prompt)
    run(*in_a_shell(commands.command(record))).done()
    again = infotext.parse(read_png_text(commands.OUTPUT), source="it")
    assert (again.prompt, again.negative_prompt) == (prompt, "- this")


def test_joints_are_found_moved_and_drawn(page: Page, client: Client) -> None:
    shown = draw(client, page.photo, "openpose")
    value, before = shown[1]["value"], json.loads(Path(shown[2]["value"]).read_text(encoding="utf-8"))
    assert len(before["people"]) == 1
    wrist = next(j for j in (4, 7, 13) if value["people"][0][j][2] > 0)
    value["people"][0][wrist][:2] = [20.0, 30.0]
    moved, file = client.predict(value, api_name="/pose")
    after = json.loads(Path(file["value"]).read_text(encoding="utf-8"))
    numbers = after["people"][0]["pose_keypoints_2d"]
    assert numbers[3 * wrist : 3 * wrist + 2] == [20.0, 30.0]
    assert moved["value"]["map"] != value["map"]
    shown = make(client, page.photo, first=slot(kind="openpose"))
    record = infotext.parse(read_png_text(picture_of(shown)), source="it")
    drawn = load_picture(record.controls[0].path)
    assert record.controls[0].kind == "openpose"
    assert drawn[30, 20].any(), "the wrist is not where it was moved to"


def map_of(shown: Any) -> tuple[str, np.ndarray]:
    """The kind and the map that a generation followed."""
    record = infotext.parse(read_png_text(picture_of(shown)), source="it")
    return record.controls[0].kind, load_picture(record.controls[0].path)


def test_a_picture_follows_the_map_of_the_photo_kind_and_size_that_are_asked_for(
    page: Page, client: Client, tmp_path: Path
) -> None:
    """Whatever map was drawn last: a person generates before the new one is shown."""
    draw(client, page.photo)
    write_png(tmp_path / "other.png", render(5).picture)
    other = load_picture(tmp_path / "other.png")
    kind, followed = map_of(make(client, tmp_path / "other.png"))
    np.testing.assert_array_equal(followed, get("canny")(other).image)
    kind, followed = map_of(make(client, tmp_path / "other.png", first=slot(kind="depth")))
    assert kind == "depth"
    np.testing.assert_array_equal(followed, get("depth", model="tiny")(other).image)
    _, followed = map_of(make(client, page.photo, width="64"))
    assert followed.shape[1] == 64


@pytest.mark.slow
def test_joints_that_were_moved_stay_while_their_photo_does(page: Page, client: Client) -> None:
    value = draw(client, page.photo, "openpose")[1]["value"]
    wrist = next(j for j in (4, 7, 13) if value["people"][0][j][2] > 0)
    value["people"][0][wrist][:2] = [20.0, 30.0]
    client.predict(value, api_name="/pose")
    shown = client.predict(
        "openpose", False, 100, 200, str(value["width"]), "", handle_file(str(page.photo)), api_name="/map"
    )
    assert "people" not in str(shown[:5]), "the size is as before, and the pose is found anew"
    for width, photo in (("77", handle_file(str(page.photo))), ("", None)):  # a wrong side, no photo
        hidden = client.predict("openpose", False, 1, 2, width, "", photo, api_name="/map")
        assert hidden[0]["value"] is None
    draw(client, page.photo, "canny")
    again = client.predict("openpose", False, 1, 2, "", "", handle_file(str(page.photo)), api_name="/map")
    assert again[1]["value"]["people"][0][wrist][:2] == [20.0, 30.0]
    assert again[1]["value"]["found"][0][wrist][:2] != [20.0, 30.0]
    _, drawn = map_of(make(client, page.photo, first=slot(kind="openpose")))
    assert drawn[30, 20].any()
    _, larger = map_of(make(client, page.photo, width=str(2 * value["width"]), first=slot(kind="openpose")))
    assert larger.shape[1] == 2 * drawn.shape[1]
    assert larger[60, 40].any(), "at another size the pose is found anew"


@pytest.mark.slow
def test_a_joint_that_was_moved_this_moment_is_followed(page: Page, client: Client) -> None:
    value = draw(client, page.photo, "openpose")[1]["value"]
    wrist = next(j for j in (4, 7, 13) if value["people"][0][j][2] > 0)
    value["people"][0][wrist][:2] = [20.0, 30.0]
    _, drawn = map_of(make(client, page.photo, first=slot(kind="openpose", pose=value)))
    assert drawn[30, 20].any()
    _, of_another = map_of(make(client, page.photo, first=slot(kind="openpose", pose={**value, "of": "it"})))
    assert not of_another[30, 20].any(), "the joints of another photo are followed"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"negative": "blurry", "guidance": "1"}, "The negative prompt has no effect"),
        *seldom(
            ({"prompt": "a (red:1.4) figure"}, "is read as text"),
            ({"negative": "too dark " * 60}, "The prompt &#x27;too dark"),
            ({"first": slot(on=True, kind="canny", is_map=True)}, None),  # it is told beneath the map
            ({"prompt": "a red figure " * 40}, "The prompt &#x27;a red figure"),
            ({"first": slot(start=0.51, end=0.52)}, "The control by Edges has no effect"),
            ({"first": slot(scale=0)}, "No map guided this"),
        ),
    ],
)
def test_what_is_to_be_known_of_a_picture_is_told(
    page: Page, client: Client, change: dict[str, Any], told: str | None
) -> None:
    for _ in range(2):  # each time, not once in a process
        status = make(client, page.photo, **change)[0]
        assert "1 picture made" in status
        assert (told in status) if told else ("notes" not in status)
        assert "--" not in status
        assert str(page.runs) not in status


def test_without_a_photo_no_map_guides_and_that_is_said(page: Page, client: Client) -> None:
    draw(client, page.photo)
    shown = make(client, None)
    assert "No map guided this" in shown[0]
    assert infotext.parse(read_png_text(picture_of(shown)), source="it").controls == ()


def test_nobody_in_the_picture_is_said(client: Client, tmp_path: Path) -> None:
    write_png(tmp_path / "plain.png", np.full((128, 128, 3), 255, np.uint8))
    shown = draw(client, tmp_path / "plain.png", "openpose")
    assert "No person was found" in str(shown)


def test_a_wrong_map_is_explained(page: Page, client: Client) -> None:
    assert "picture, not like a map" in str(draw(client, page.photo, is_map=True))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"this is text", "not a picture"), (b"", "empty"), (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "picture")],
    ids=["text", "nothing", "the start of a PNG"],
)
def test_a_broken_file_is_a_line_and_no_map(
    page: Page, client: Client, tmp_path: Path, data: bytes, message: str
) -> None:
    draw(client, page.photo)
    (tmp_path / "broken.png").write_bytes(data)
    view, *_, told = draw(client, tmp_path / "broken.png")[:4]
    assert view["value"] is None, "the map of another photo is still shown"
    assert told["visible"]
    with pytest.raises(AppError) as refused:
        make(client, tmp_path / "broken.png")
    for line in (told["value"], str(refused.value)):
        assert line.startswith("broken.png")
        assert message in line
        assert "/" not in line.replace("and/or", ""), "it names a folder of the machine"
        assert "Traceback" not in line


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(client: Client, tmp_path: Path) -> None:
    write_png(tmp_path / "huge.png", np.zeros((6400, 6400, 3), np.uint8))
    assert "at most 40,000,000 pixels" in str(draw(client, tmp_path / "huge.png"))


def test_an_upload_of_too_many_bytes_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(b"\0" * (server.MAX_BYTES + 1))
    with pytest.raises(Exception, match=r"(?i)size|large|413"):
        draw(client, tmp_path / "big.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "seven"}, "Seed must be a whole number"),
        ({"seed": "-1"}, "seed must be a whole number from 0"),
        ({"count": 16, "seed": str(2**63 - 1)}, "seed"),
        ({"count": None}, "Pictures: a number from 1 to 16, not nothing"),
        ({"count": 1.5}, "Pictures: a whole number from 1 to 16, not 1.5"),
        ({"count": 17}, "Pictures: a number from 1 to 16, not 17"),
        ({"steps": None}, "Steps: a number from 1 to 100, not nothing"),
        ({"steps": "many"}, "Steps: a number from 1 to 100, not many"),
        ({"guidance": "full"}, "Guidance must be a number"),
        ({"width": "77"}, "must be a multiple of 8"),
        ({"first": slot(scale=None)}, "Strength: a number from 0 to 2, not nothing"),
        ({"first": slot(start=0.6, end=0.4)}, "From is 0.6 and Until is 0.4: it has to begin before it ends"),
        ({"first": slot(low=None)}, "Weak edges from: a number from 0 to 600, not nothing"),
        ({"first": slot(high=9999)}, "Strong edges from: a number from 0 to 600, not 9999"),
        ({"second": (*slot(scale=3), None)}, "Strength of map 2: a number from 0 to 2, not 3"),
    ],
)
def test_a_wrong_number_is_a_line(page: Page, client: Client, change: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message):
        make(client, page.photo, **change)


def test_no_file_of_the_machine_is_served(page: Page, client: Client, tmp_path: Path) -> None:
    for path in ("/etc/passwd", str(page.photo), str(page.runs), "../../../../etc/passwd"):
        address = f"{page.address.rstrip('/')}/gradio_api/file={urllib.parse.quote(path)}"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address, timeout=10)
        assert refused.value.code in (403, 404), path


@pytest.mark.parametrize("marked", [True, False], ids=["marked as a file", "not marked"])
@pytest.mark.parametrize(
    "place", ["/etc/hostname", "{photo}", "/nowhere/at/all.png", "a/b.png", "https://nowhere.invalid/x.png"]
)
def test_no_picture_of_the_machine_is_opened(page: Page, place: str, marked: bool) -> None:
    """Whether or not the request says that it holds a file, and whether or not there is one."""
    given: dict[str, Any] = {"path": place.format(photo=page.photo)}
    if marked:
        given["meta"] = {"_type": "gradio.FileData"}
    address = f"{page.address.rstrip('/')}/gradio_api/call/map"
    body = json.dumps({"data": ["canny", True, 100, 200, "", "", given]}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request, timeout=10))["event_id"]
    answer = urllib.request.urlopen(f"{address}/{event}", timeout=20).read()
    assert b"event: error" in answer
    assert b"event: complete" not in answer
    assert b"does not exist" not in answer
    # gradio would ask a host, or tell a whole path
    assert b"no picture that was put into this page" in answer
    assert os.getcwd().encode() not in answer


def test_no_picture_of_the_machine_is_opened_after_the_page_was_changed(page: Page, client: Client) -> None:
    """For a session in which it was updated, gradio makes a component anew."""
    assert "1 picture made" in make(client, page.photo)[0]
    client.predict("openpose", False, None, 9999, "", "", handle_file(str(page.photo)), api_name="/map")
    for place in ("/etc/hostname", str(page.photo)):
        asked = values(None)
        asked[10] = {"path": place}
        with pytest.raises(AppError, match="no picture that was put into this page"):
            client.predict(*asked, api_name="/generate")
    with pytest.raises(AppError, match="Pictures: a number from 1 to 16, not nothing"):
        make(client, page.photo, count=None)


@pytest.mark.parametrize(
    ("name", "code"),
    [("localhost", 200), ("127.0.0.1", 200), ("[::1]", 200), ("attacker.example", 400), ("", 400)],
)
def test_a_page_for_this_machine_answers_to_no_other_name(page: Page, name: str, code: int) -> None:
    """Or a site whose name is made to lead here could read it from the browser (DNS rebinding)."""
    port = urllib.parse.urlsplit(page.address).port
    request = urllib.request.Request(f"{page.address.rstrip('/')}/config", headers={"Host": f"{name}:{port}"})
    try:
        answered = urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as refused:
        answered = refused.code
    assert answered == code


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        (None, 200),
        ("{own}", 200),
        ("http://attacker.example", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_a_page_for_this_machine_does_nothing_for_another_sites_page(
    page: Page, origin: str | None, code: int
) -> None:
    own = page.address.rstrip("/")
    about = b'Content-Disposition: form-data; name="files"; filename="a.png"'
    form = b"--x\r\n" + about + b"\r\n\r\nx\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    headers |= {} if origin is None else {"Origin": origin.format(own=own)}
    try:
        answered = urllib.request.urlopen(
            urllib.request.Request(f"{own}/gradio_api/upload", form, headers), timeout=20
        ).status
    except urllib.error.HTTPError as refused:
        answered = refused.code
    assert answered == code


def test_two_at_once_are_served_in_turn(page: Page) -> None:
    clients = [Client(page.address, verbose=False) for _ in range(2)]
    jobs = []
    for number, one in enumerate(clients):
        asked = values(None, prompt="a cube", seed=str(number), count=2, steps=12)
        jobs.append(one.submit(*asked, api_name="/generate"))
    ranks = set()
    while not all(job.done() for job in jobs):
        ranks |= {job.status().rank for job in jobs if job.status().rank is not None}
        time.sleep(0.02)
    seeds = []
    for job in jobs:
        strips = [item for item in job.result() if isinstance(item, list | dict) and "seed" in str(item)]
        seeds.append(sorted(set(re.findall(r"seed-(\d+)", str(strips)))))
    assert seeds == [["0", "1"], ["1", "2"]], "a gallery holds somebody else's pictures"
    assert ranks, "nobody was told a place in the queue"


def test_cancelling_keeps_what_is_finished(page: Page, client: Client) -> None:
    asked = values(None, prompt="a cube", seed="5", count=8, steps=20)
    job = client.submit(*asked, api_name="/generate")
    while not any("picture-seed" in str(output) for output in job.outputs()):
        assert not job.done()
        time.sleep(0.05)
    client.predict(api_name="/cancel")
    last = job.result(timeout=30)
    assert "Cancelled" in str(last)
    assert re.search(r"[1-7] of 8 finished", str(last))
    assert WORKER not in [thread.name for thread in threading.enumerate()], "the generation goes on"


def test_a_training_that_cannot_be_begun_is_a_line(page: Page, client: Client) -> None:
    with pytest.raises(AppError, match="is not a folder"):
        client.predict("A folder", "/no/such/folder", "tiny-canny", 20, "none", api_name="/train")
    with pytest.raises(AppError, match="1 to 64 letters, digits"):
        client.predict("The bundled world", "", "tiny-canny", 20, "../outside", api_name="/train")
    for steps in (-3, None, 12.7):
        with pytest.raises(AppError, match=r"Steps: a .*number from 1 to"):
            client.predict("The bundled world", "", "tiny-canny", steps, "none", api_name="/train")
    assert not list(page.runs.glob("*none*"))


def test_the_state_of_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.log").write_text("error: no pictures in photos\n")
    assert run_folders.look(folder).state == "failed"
    (folder / "config.toml").write_text('task = "controlnet"\nsteps = 40\n')
    (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 0.2}\n')
    (folder / "checkpoints").mkdir()
    assert run_folders.look(folder).line == "mine: stopped, step 10 of 40"
    from controlkit.training.lock import holder, locked

    assert holder(folder) is None
    with locked(folder):
        assert run_folders.look(folder).state == "running"
    (folder / "controlnet").mkdir()
    assert [run.state for run in run_folders.found(tmp_path)] == ["finished"]


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("studio", False)],
)
def test_a_page_that_others_reach_is_warned_of(host: str, alone: bool) -> None:
    lines = server.told("http://x:7860/", host, "runs")
    assert any("warning" in line for line in lines) is not alone


def test_without_gradio_one_line_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    assert run("ui").refused() == 'the page needs gradio: pip install "controlkit[ui]"'
