"""The studio page in a browser: every way through it by mouse and keyboard, on a desk and on a phone."""

import base64
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the studio page needs the extra ui")
pytest.importorskip("playwright", reason="playwright drives the browser")

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from controlkit import infotext
from controlkit.figures import render
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.studio import commands, run_folders, server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# gradio (6.31) and what it is built on use what Starlette is about to drop, and leave event loops open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:starlette"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
PATIENCE = 120_000  # milliseconds; on a busy machine
LONG = 900_000  # of what a training does, which first loads the libraries
NAMELESS = """() => [...document.querySelectorAll("button, input, textarea, circle")].filter((node) => {
  const box = node.getBoundingClientRect();
  const labels = [...(node.labels ?? [])].map((label) => label.innerText).join("");
  const name = node.getAttribute("aria-label") || labels || node.innerText || node.title || "";
  return box.width && box.height && !name.trim();
}).map((node) => node.outerHTML.slice(0, 200))"""

FAINT = """(least) => {
  const light = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(node.parentElement) : colour;
  };
  return [...document.querySelectorAll(".cm-line span")].filter((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < least;
  }).map((node) => node.innerText);
}"""
THREE_RIGHT = """(node) => { for (let k = 0; k < 3; k++)
  node.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true })); }"""
LATE = """() => { const plain = window.fetch; window.fetch = async (to, ...rest) => {
  if (String(to.url ?? to).includes("/queue/join")) await new Promise((done) => setTimeout(done, 700));
  return plain(to, ...rest); } }"""


class Quiet:
    """A report that nobody reads."""

    def status(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studio") / "runs"


@pytest.fixture(scope="module")
def address(runs: Path, loops: None) -> Iterator[str]:
    with server.opened("tiny", port=None, runs=str(runs), report=Quiet()) as address:
        yield address
    for run in run_folders.found(runs):  # of a test that failed
        if run.pid is not None:
            os.kill(run.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


LEFT = re.compile("AbortError|Connection errored out|network error|Failed to load resource")
KEPT = "localStorage.getItem('controlkit-studio')"
JUNK = "Error reading from localStorage"


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Open the page; afterwards nothing was complained of in its console, and no other host was asked."""
    contexts, complaints, hosts = [], [], []

    def visit(again: Page | None = None, expected: str | re.Pattern[str] = "", **settings: Any) -> Page:
        """again: a page of the same browser. expected: what gradio complains of when this is done to it."""
        context = browser.new_context(**settings) if again is None else again.context
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(PATIENCE)

        def heard(said: Any) -> None:
            if said.type == "error" and not (expected and re.search(expected, said.text)):
                complaints.append(said.text)

        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.append(request.url))
        page.goto(address)
        page.locator("#generate").wait_for()
        page.locator(".picture.map img").first.wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints
    assert not [url for url in hosts if not url.startswith((address, "data:", "blob:"))]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    write_png(tmp_path / "my photo.png", render(3).picture)
    return tmp_path / "my photo.png"


def upload(page: Page, file: Path) -> None:
    """Put another photo in the place of the one that is shown."""
    page.locator("#photo").get_by_label("Remove Image").click()
    page.locator("#photo input[type=file]").set_input_files(str(file))


def changed(page: Page, selector: str, before: str | None) -> str:
    """The address of a picture, once it is another one."""
    expect(page.locator(selector).first).not_to_have_attribute("src", before or "", timeout=PATIENCE)
    return page.locator(selector).first.get_attribute("src") or ""


def number(page: Page, label: str, value: str) -> None:
    """Type a number beside a slider."""
    field = page.get_by_label(f"number input for {label}").first
    field.fill(value)
    field.press("Enter")


def generate(page: Page, *, count: str = "1") -> None:
    """Generate as fast as may be, and wait."""
    number(page, "Pictures", count)
    if not page.get_by_label("number input for Steps").is_visible():
        page.locator("#more button").first.click()
    number(page, "Steps", "3")
    page.locator("#generate").click()
    page.get_by_text(re.compile(r"pictures? made")).wait_for()


def shown_record(page: Page) -> infotext.PictureRecord:
    """What the picture that is looked at was made with."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).last.click()
    return infotext.parse(read_png_text(download.value.path()), source="it")


def test_a_photo_becomes_a_picture_and_a_command(visit: Callable[..., Page], photo: Path) -> None:
    page = visit()
    first = page.locator(".picture.map img").first.get_attribute("src")
    upload(page, photo)
    edges = changed(page, ".picture.map img", first)
    for label, digits in (("Strong edges from", "60"), ("Weak edges from", "20")):  # as a person types
        field = page.get_by_label(f"number input for {label}").first
        field.select_text()
        page.keyboard.type(digits, delay=120)
        page.keyboard.press("Enter")
    expect(page.get_by_label("number input for Strong edges from").first).to_have_value("60")
    changed(page, ".picture.map img", edges)
    generate(page)
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(1)
    page.get_by_role("button", name="Copy as command").click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    copied = page.evaluate("navigator.clipboard.readText()")
    record = shown_record(page)
    assert copied == commands.command(record)
    from controlkit.preprocessors import get

    wanted = get("canny", low=20.0, high=60.0)(load_picture(photo)).image
    np.testing.assert_array_equal(load_picture(record.controls[0].path), wanted)


@pytest.mark.slow
def test_joints_are_moved_by_mouse_and_keyboard(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("radio", name="Pose").first.check(force=True)
    joint = page.locator(".pose-editor circle").nth(4)
    joint.wait_for()
    drawn = page.locator(".pose-editor image.drawn").get_attribute("href")
    box = joint.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] - 30, steps=4)
    page.mouse.up()
    expect(page.locator(".pose-editor image.drawn")).not_to_have_attribute("href", drawn or "")
    dragged = page.locator(".pose-editor image.drawn").get_attribute("href")
    focused = page.locator(".pose-editor circle:focus")
    place = focused.get_attribute("cx")
    focused.evaluate(THREE_RIGHT)
    expect(page.locator(".pose-editor image.drawn")).not_to_have_attribute("href", dragged or "")
    assert float(focused.get_attribute("cx") or 0) == pytest.approx(float(place or 0) + 3, abs=0.02)
    page.keyboard.press("PageDown")
    assert focused.get_attribute("data-joint") != joint.get_attribute("data-joint")
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".pose-editor image.drawn")).to_have_attribute("href", drawn or "")
    with page.expect_download() as download:
        page.get_by_role("button", name="Joints as JSON").click()
    assert len(json.loads(Path(download.value.path()).read_text())["people"]) == 1


@pytest.mark.slow
def test_a_map_that_is_late_takes_back_no_joint(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("radio", name="Pose").first.check(force=True)
    joint = page.locator(".pose-editor circle").nth(4)
    joint.focus()
    drawn = page.locator(".pose-editor image.drawn").get_attribute("href")
    place = float(joint.get_attribute("cx") or 0)
    page.evaluate(LATE)
    for _ in range(6):  # each is told on its own: the page waits a quarter of a second for more
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(400)
    page.wait_for_timeout(3000)
    expect(page.locator(".pose-editor image.drawn")).not_to_have_attribute("href", drawn or "")
    expect(page.locator(".pose-editor.moving, .moving .pose-editor")).to_have_count(0)
    assert float(joint.get_attribute("cx") or 0) == pytest.approx(place + 6, abs=0.02)


@pytest.mark.slow
def test_a_picture_follows_what_the_page_shows_at_the_click(visit: Callable[..., Page], photo: Path) -> None:
    page = visit()
    page.evaluate(LATE)
    upload(page, photo)
    page.get_by_role("radio", name="Depth").first.check(force=True)
    generate(page)
    record = shown_record(page)
    from controlkit.preprocessors import get

    assert record.controls[0].kind == "depth"
    wanted = get("depth", model="tiny")(load_picture(photo)).image
    np.testing.assert_array_equal(load_picture(record.controls[0].path), wanted)


@pytest.mark.slow
def test_joints_that_were_moved_outlive_other_maps(visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_role("radio", name="Pose").first.check(force=True)
    joint = page.locator(".pose-editor circle").nth(4)
    joint.focus()
    place = float(joint.get_attribute("cx") or 0)
    page.keyboard.press("Shift+ArrowRight")
    page.locator("#generate").focus()  # before the page would have told by itself
    generate(page)
    x = float(joint.get_attribute("cx") or 0)
    assert x == pytest.approx(place + 8, abs=0.02)
    record = shown_record(page)
    drawn = page.locator(".pose-editor image.drawn").get_attribute("href") or ""
    shown = load_picture(base64.b64decode(drawn.removeprefix("data:image/png;base64,")))
    np.testing.assert_array_equal(load_picture(record.controls[0].path), shown)
    page.get_by_label("Width").focus()
    page.locator("#generate").focus()
    page.get_by_role("radio", name="Edges").first.check(force=True)
    page.locator(".picture.map img").first.wait_for()
    page.get_by_role("radio", name="Pose").first.check(force=True)
    joint.wait_for()
    assert float(joint.get_attribute("cx") or 0) == x
    page.get_by_role("button", name="As found").click()
    expect(joint).to_have_attribute("cx", re.compile(rf"^{str(place)[:6]}"))
    with page.expect_download() as download:
        page.get_by_role("button", name="Save map").click()
    assert load_picture(download.value.path()).any()


@pytest.mark.slow
def test_a_finger_beside_a_joint_moves_it(visit: Callable[..., Page]) -> None:
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    page.get_by_role("radio", name="Pose").first.check(force=True)
    joint = page.locator(
        ".pose-editor circle[data-joint='0 10'], .pose-editor circle[data-joint='0 13']"
    ).last
    joint.scroll_into_view_if_needed()  # a foot, with no other joint near
    place = joint.get_attribute("cx")
    box = joint.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] + 8)
    page.mouse.down()
    page.mouse.move(box["x"] - 40, box["y"], steps=3)
    page.mouse.up()
    expect(joint).not_to_have_attribute("cx", place or "")


@pytest.mark.slow
def test_the_page_is_calm(visit: Callable[..., Page], tmp_path: Path) -> None:
    """No part of it is of another size than what is in it, and nothing jumps."""
    page = visit()
    head = page.locator(".masthead .base").bounding_box()
    page.get_by_role("tab", name="Train").click()
    page.locator("#start").wait_for()
    assert page.locator(".masthead .base").bounding_box() == head
    page.get_by_role("tab", name="Create").click()
    page.locator("#prompt textarea").fill("a red figure, " * 60)
    generate(page)
    expect(page.locator("#status .notes")).to_contain_text("more than 77 tokens")
    about = page.locator("#about .told").bounding_box()
    assert about is not None
    assert about["height"] < 120
    page.get_by_role("button", name="As a command").click()
    page.locator(".cm-content").first.wait_for()
    room = page.evaluate("[...document.querySelectorAll('.cm-scroller')].map((node) => node.offsetHeight)")
    assert max(room) <= 320
    Image.fromarray(render(3).picture).save(tmp_path / "scan.tif")
    upload(page, tmp_path / "scan.tif")
    page.wait_for_function("document.querySelector('#photo img')?.naturalWidth > 0")


@pytest.mark.slow
def test_cancelling_leaves_the_page_as_it_was(visit: Callable[..., Page]) -> None:
    page = visit()
    generate(page)
    before = page.locator("#result img").get_attribute("src")
    about = page.locator("#about").inner_text()
    number(page, "Steps", "100")
    number(page, "Pictures", "4")
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    page.locator("#preview img").wait_for()
    assert page.locator("#result").is_hidden()
    expect(page.locator("#cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("0 of 4 finished")
    expect(page.locator("#result img")).to_have_attribute("src", before or "")
    assert page.locator("#about").inner_text() == about
    expect(page.locator("#generate")).to_be_focused()
    page.get_by_role("button", name="Use as photo").click()
    changed(page, ".picture.map img", None)
    assert page.locator(".toast-body").count() == 0
    generate(page)
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(2)
    expect(page.locator("#strip button.thumbnail-item").first).to_have_class(re.compile("selected"))


@pytest.mark.slow
def test_a_click_after_one_that_was_cancelled_in_the_queue_counts(visit: Callable[..., Page]) -> None:
    other, page = visit(), visit()
    other.locator("#more button").first.click()
    number(other, "Pictures", "8")
    number(other, "Steps", "100")
    other.locator("#generate").click()
    other.locator("#preview img").wait_for()
    page.locator("#more button").first.click()
    number(page, "Steps", "3")
    number(page, "Pictures", "1")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Waiting for the device")
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("Cancelled")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Waiting for the device")
    other.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("1 picture made")
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(1)
    expect(page.locator("#generate")).to_be_visible()


@pytest.mark.slow
def test_errors_are_lines_and_the_page_stays_usable(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    (tmp_path / "broken.png").write_text("no picture")
    upload(page, tmp_path / "broken.png")
    told = page.locator(".findings").first
    expect(told).to_contain_text("broken.png is not a picture")
    expect(page.locator(".toast-body")).to_contain_text("broken.png is not a picture")
    assert page.locator(".toast-body").count() == 1, "three controls share the photo, and each shouts"
    assert page.locator(".picture.map img").first.is_hidden(), "the map of another photo is still shown"
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("broken.png is not a picture")
    assert "Traceback" not in page.locator("body").inner_text()
    page.locator("#photo").get_by_label("Remove Image").click()
    page.locator("#more button").first.click()
    page.get_by_label("Width").fill("77")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("must be a multiple of 8")
    page.get_by_label("Width").fill("")
    generate(page)


def test_what_the_browser_refuses_is_told(visit: Callable[..., Page]) -> None:
    page = visit()  # of a browser without a camera
    photo, told = page.locator("#photo"), page.locator(".toast-body")
    photo.get_by_label("Remove Image").click()
    photo.get_by_label("Capture from camera").click()
    photo.get_by_text("Click to Access Webcam").click()
    expect(told).to_contain_text("The browser finds no camera: upload a photo", timeout=PATIENCE)
    page.evaluate("navigator.clipboard.writeText('words')")
    photo.get_by_label("Paste from clipboard").click()
    expect(told).to_contain_text("There is no picture in the clipboard", timeout=PATIENCE)
    page.context.clear_permissions()
    photo.get_by_text("Paste from Clipboard").click()
    expect(told).to_contain_text("does not let this page read the clipboard", timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_seen(visit: Callable[..., Page], scheme: str) -> None:
    page = visit(color_scheme=scheme)
    generate(page)
    number(page, "Steps", "1")  # where the handle stands on the part of its line that is empty
    page.get_by_label("range slider for Steps").scroll_into_view_if_needed()
    line = np.int16(load_picture(page.get_by_label("range slider for Steps").screenshot()))
    coloured = np.ptp(line, axis=2) > 60
    assert coloured.any(), "the handle has the colour of what is around it"
    right = line[len(line) // 2, -20].mean()
    assert (right > 127) == (scheme == "light"), "the empty part of the line is the brightest"
    page.get_by_role("button", name="As a command").click()
    page.locator(".cm-line span").first.wait_for()
    assert page.evaluate(FAINT, 4.5) == []
    assert page.locator(".cm-scroller[tabindex='-1']").count() == 0, "the keyboard cannot scroll it"


@pytest.mark.slow
def test_the_keyboard_is_enough(visit: Callable[..., Page]) -> None:
    page = visit()
    generate(page, count="2")
    assert page.evaluate(NAMELESS) == []
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const node = document.activeElement, style = getComputedStyle(node);
            return [node.getAttribute("aria-label") || node.innerText || node.id, style.outlineStyle] }"""
        )
        if name:
            reached.append(str(name).split("\n")[0])
            assert outline != "none" or len(name) > 60, f"the focus on {name} is not to be seen"
    wanted = [
        "Create",
        "Train",
        "Upload file",
        "Scene 1",
        "range slider for Weak edges from",
        "Generate",
        "More maps and settings",
    ]
    wanted += ["Copy as command", "Copy as Python", "Use as photo", "Thumbnail 1 of 2"]
    assert [name for name in wanted if name not in reached] == []
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(4, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_no_horizontal_scroll(visit: Callable[..., Page], scheme: str) -> None:
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    generate(page, count="3")
    for tab in ("Create", "Train"):
        page.get_by_role("tab", name=tab).click()
        time.sleep(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", lightness)[:3])) > 382) is (scheme == "light")


@pytest.mark.slow
def test_a_result_goes_back_and_others_do_not_see_it(visit: Callable[..., Page]) -> None:
    page, other = visit(), visit()
    generate(page)
    edges = page.locator(".picture.map img").first.get_attribute("src")
    page.get_by_role("button", name="Use as photo").click()
    changed(page, ".picture.map img", edges)
    assert other.locator("#strip button.thumbnail-item").count() == 0


def loaded_anew(page: Page) -> None:
    """Reload the page, and wait until it has its values again."""
    page.reload()
    page.wait_for_function("window.controlkitRestored")


@pytest.mark.slow
def test_a_reload_loses_nothing(visit: Callable[..., Page], photo: Path) -> None:
    page = visit(expected=LEFT)
    upload(page, photo)
    page.locator("#prompt textarea").fill('a green dog, "quoted" <b>')
    page.get_by_role("radio", name="Depth").first.check(force=True)
    number(page, "Strength", "0.7")
    page.get_by_role("button", name="When and how").first.click()
    number(page, "Until", "0.8")
    page.locator("#more button").first.click()
    page.get_by_label("Negative prompt").fill("dark")
    page.get_by_label("Seed").fill("17")
    page.get_by_label("Scheduler").click()
    page.get_by_role("option", name="ddpm", exact=True).click()
    page.get_by_label("Width").fill("96")
    page.get_by_role("button", name="Map 2").click()
    page.get_by_label("Follow this map, too").first.check()
    generate(page, count="2")
    page.get_by_role("button", name="Copy as command").click()
    command = page.evaluate("navigator.clipboard.readText()")
    assert "--width 96" in command
    assert command.count("--map") == 2
    about = page.locator("#about").inner_text()
    loaded_anew(page)
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(2)
    expect(page.locator("#prompt textarea")).to_have_value('a green dog, "quoted" <b>')
    expect(page.locator("#about .told")).to_be_visible()
    assert page.locator("#about").inner_text() == about
    page.evaluate("navigator.clipboard.writeText('')")
    page.get_by_role("button", name="Copy as command").click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == command
    page.locator("#more button").first.click()
    expect(page.get_by_label("Seed")).to_have_value("17")
    expect(page.get_by_label("Scheduler")).to_have_value("ddpm")
    generate(page, count="2")  # the same two as before: all that makes them came back
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(4)
    page.get_by_role("button", name="Copy as command").click()
    assert page.evaluate("navigator.clipboard.readText()") == command
    loaded_anew(page)
    page.locator("#strip button.thumbnail-item").nth(3).click()
    expect(page.locator("#about")).to_contain_text("17")
    shown = page.locator("#photo img").first.get_attribute("src")
    page.get_by_role("button", name="Use as photo").click()
    changed(page, "#photo img", shown)
    assert page.locator(".toast-body").count() == 0
    assert visit().locator("#strip button.thumbnail-item").count() == 0
    again = visit(page, expected=LEFT)
    page.close()
    expect(again.locator("#strip button.thumbnail-item")).to_have_count(4)
    again.locator("#more button").first.click()
    again.evaluate("window.before = true")
    again.locator("#afresh").click()
    again.wait_for_function("!window.before && window.controlkitRestored")
    again.locator(".picture.map img").first.wait_for()
    assert again.locator("#strip button.thumbnail-item").count() == 0
    expect(again.locator("#prompt textarea")).not_to_have_value(re.compile("green dog"))


@pytest.mark.slow
def test_joints_that_were_moved_outlive_a_reload(visit: Callable[..., Page]) -> None:
    page = visit(expected=LEFT)
    page.get_by_role("radio", name="Pose").first.check(force=True)
    joint = page.locator(".pose-editor circle").nth(4)
    joint.focus()
    place = float(joint.get_attribute("cx") or 0)
    drawn = page.locator(".pose-editor image.drawn").get_attribute("href")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator(".pose-editor image.drawn")).not_to_have_attribute("href", drawn or "")
    moved = page.locator(".pose-editor image.drawn").get_attribute("href")
    loaded_anew(page)
    expect(page.locator(".pose-editor image.drawn")).to_have_attribute("href", moved or "", timeout=PATIENCE)
    page.get_by_role("radio", name="Edges").first.check(force=True)
    page.locator(".picture.map img").first.wait_for()
    loaded_anew(page)
    page.locator(".picture.map img").first.wait_for()
    page.get_by_role("radio", name="Pose").first.check(force=True)
    expect(page.locator(".pose-editor image.drawn")).to_have_attribute("href", moved or "", timeout=PATIENCE)
    assert float(joint.get_attribute("cx") or 0) == pytest.approx(place + 8, abs=0.02)
    page.get_by_role("button", name="As found").click()
    expect(page.locator(".pose-editor image.drawn")).to_have_attribute("href", drawn or "")


@pytest.mark.slow
def test_a_reload_opens_the_tab_that_was_open(visit: Callable[..., Page], runs: Path) -> None:
    page = visit(expected=LEFT)
    page.get_by_role("tab", name="Train").click()
    for _ in range(2):
        loaded_anew(page)
        page.get_by_role("tab", name="Train", selected=True).wait_for()
    (runs / "begun-since").mkdir(parents=True)  # it is looked at, as if it had been opened by hand
    (runs / "begun-since" / run_folders.LOG).write_text("error: it was not to be\n")
    expect(page.locator("#runs")).to_contain_text("begun-since: failed")
    shutil.rmtree(runs / "begun-since")
    visit(page, expected=LEFT).get_by_role("tab", name="Create", selected=True).wait_for()
    page.get_by_role("tab", name="Create").click()
    loaded_anew(page)
    page.get_by_role("tab", name="Create", selected=True).wait_for()


@pytest.mark.slow
def test_what_is_in_the_making_outlives_a_reload(visit: Callable[..., Page]) -> None:
    page = visit(expected=LEFT)
    page.locator("#more button").first.click()
    number(page, "Steps", "100")
    number(page, "Pictures", "3")
    page.locator("#generate").click()
    page.locator("#preview img").wait_for()
    loaded_anew(page)
    expect(page.locator("#cancel")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("3 pictures made", timeout=PATIENCE)
    expect(page.locator("#strip button.thumbnail-item")).to_have_count(3)
    expect(page.locator("#generate")).to_be_visible()
    page.locator("#generate").click()
    page.locator("#preview img").wait_for()
    again = visit(page, expected=LEFT)
    page.close()
    again.locator("#cancel").click()
    expect(again.locator("#status")).to_contain_text("of 3 finished", timeout=PATIENCE)
    expect(again.locator("#generate")).to_be_visible()
    assert again.locator(".toast-body").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("junk", ["", "x", "eHh4:eHh4", "null", "{}"])
def test_a_browser_that_remembers_nonsense_has_a_fresh_page(visit: Callable[..., Page], junk: str) -> None:
    page = visit(expected=f"{JUNK}|{LEFT.pattern}")
    prompt = page.locator("#prompt textarea").input_value()
    page.evaluate("junk => localStorage.setItem('controlkit-studio', junk)", junk)
    loaded_anew(page)
    page.locator(".picture.map img").first.wait_for()
    expect(page.locator("#prompt textarea")).to_have_value(prompt)
    assert page.locator(".toast-body").count() == 0
    before = page.evaluate(KEPT)
    page.locator("#prompt textarea").fill("a blue cube")
    page.wait_for_function(f"before => {KEPT} !== before", arg=before)
    loaded_anew(page)
    expect(page.locator("#prompt textarea")).to_have_value("a blue cube")


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_training_survives_a_reload_and_gives_an_adapter(visit: Callable[..., Page], runs: Path) -> None:
    page = visit()
    page.get_by_role("tab", name="Train").click()
    page.get_by_label("Steps").fill("60")  # the page looks every two seconds: one that is short ends unseen
    page.get_by_label("Name").fill("mine")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#run")).to_contain_text("Running.", timeout=LONG)
    page.reload()
    expect(page.get_by_label("Name")).to_have_value("mine")
    expect(page.get_by_label("Steps")).to_have_value("60")
    expect(page.locator("#run")).to_contain_text("Running.", timeout=PATIENCE)
    page.get_by_label("Name").fill("second")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator(".toast-body")).to_contain_text("The training mine is running")
    expect(page.locator("#run")).to_contain_text(re.compile(r"Step\s*[1-9]\d* of 60"), timeout=LONG)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#run")).to_contain_text("Stopped; it can be gone on with.", timeout=LONG)
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#run")).to_contain_text("Finished.", timeout=LONG)
    assert (runs / "mine" / "controlnet").is_dir()
    assert not (runs / "second").exists()
    expect(page.locator(".sheet img")).to_be_visible()
    page.get_by_role("button", name="Use its adapter").click()
    page.get_by_role("tab", name="Create", selected=True).wait_for()
    generate(page)
    page.get_by_role("button", name="Copy as command").click()
    expect(page.locator("#copied")).to_have_text("Copied.")
    assert str(runs / "mine" / "controlnet") in page.evaluate("navigator.clipboard.readText()")
    page.reload()
    page.locator(".picture.map img").first.wait_for()
    page.get_by_role("button", name="When and how").first.click()
    page.get_by_label("Adapter").first.click()
    expect(page.get_by_role("option", name="mine")).to_be_visible()
