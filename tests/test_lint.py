"""The lint: what it finds in damaged maps, that it lets good ones pass, and its command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from benchmarks import lint_samples as samples
from PIL import Image
from skimage import data

from controlkit import lint_job, preprocessors
from controlkit.images import write_png
from controlkit.preprocessors import draw_poses, guess_kind, lint
from controlkit.preprocessors.linting import KINDS

COUNT = 40
# Of 40 maps of the split "report": a little below what tests/benchmarks/lint.py measures on 200.
FLOORS = {
    ("canny", "inverted"): 40,
    ("canny", "a drawing on white"): 35,
    ("canny", "JPEG 30 to 95"): 36,
    ("canny", "resized smoothly"): 36,
    ("canny", "blurred"): 28,
    ("canny", "thickened"): 37,
    ("canny", "each channel alone"): 37,
    ("canny", "nearly empty"): 40,
    ("canny", "a pose"): 39,
    ("openpose", "BGR"): 35,
    ("openpose", "inverted"): 36,
    ("openpose", "on white or grey"): 38,
    ("openpose", "JPEG 30 to 95"): 38,
    ("openpose", "style v1.0"): 36,
    ("openpose", "a canny map"): 40,
    ("depth", "inverted"): 12,
    ("depth", "metric, far is white"): 8,
    ("depth", "a colour map"): 38,
    ("depth", "every 8th to 24th level"): 37,
    ("depth", "constant"): 40,
    ("depth", "a canny map"): 40,
    ("scribble", "inverted"): 30,
}


SELDOM = (  # slow tests
    *("blurred", "thickened", "each channel alone", "style v1.0", "on white or grey"),
    *("every 8th to 24th level", "metric, far is white", "a canny map", "a colour map"),
)


def codes(found: list[preprocessors.Finding]) -> list[str]:
    return [finding.code for finding in found]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng([99, seed])


@pytest.mark.parametrize("kind", samples.GOOD)
def test_good_maps_pass(kind: str) -> None:
    found = samples.codes_found(kind, samples.GOOD[kind], "report", COUNT)
    assert sum(map(bool, found)) <= 1, found


@pytest.mark.parametrize(
    ("kind", "damage", "make", "right"),
    [
        pytest.param(*row, id=f"{row[0]}: {row[1]}", marks=pytest.mark.slow if row[1] in SELDOM else ())
        for row in samples.DAMAGED
        if row[:2] in FLOORS
    ],
)
def test_damaged_maps_are_named(kind: str, damage: str, make: samples.Make, right: tuple[str, ...]) -> None:
    found = samples.codes_found(kind, make, "report", COUNT)
    assert sum(bool(one & set(right)) for one in found) >= FLOORS[kind, damage], found


def test_every_floor_belongs_to_a_damage() -> None:
    assert set(FLOORS) <= {row[:2] for row in samples.DAMAGED}


# --- what must pass ---


def one_joint() -> np.ndarray:
    return draw_poses([np.array([(60, 60, 1.0)] + [(0, 0, 0.0)] * 17)], 512, 512)


def few_edges() -> np.ndarray:
    image = np.zeros((512, 512, 3), np.uint8)
    cv2.circle(image, (256, 256), 90, (255, 255, 255))
    return image


def face_points() -> np.ndarray:
    image = np.zeros((300, 400, 3), np.uint8)
    for x in range(60, 340, 30):
        cv2.circle(image, (x, 150 + x % 40), 3, (255, 255, 255), -1)
    return image


def flat_wall() -> np.ndarray:
    wall = np.full((200, 300), 120, np.uint8) + rng().integers(0, 6, (200, 300), dtype=np.uint8)
    return cv2.merge([cv2.GaussianBlur(wall, (0, 0), 2)] * 3)


def facing_boards() -> np.ndarray:
    """Things of constant depth before one another: few levels, and no bands."""
    image = np.zeros((256, 256), np.uint8)
    for i, level in enumerate((40, 200, 90, 255, 130, 170)):
        cv2.rectangle(image, (30 * i, 60 + 10 * i), (30 * i + 70, 200), level, -1)
    return cv2.merge([image] * 3)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("openpose", one_joint),
        ("openpose", face_points),
        ("canny", few_edges),
        ("depth", flat_wall),
        ("depth", facing_boards),
    ],
)
def test_rare_but_right_maps_pass(kind: str, make: Callable[[], np.ndarray]) -> None:
    assert lint(make(), kind) == []


@pytest.mark.parametrize("side", [64, 2048])
def test_small_and_large_maps_pass(side: int) -> None:
    picture = cv2.resize(data.astronaut(), (side, side), interpolation=cv2.INTER_AREA)
    assert lint(preprocessors.get("canny")(picture)) == []
    body = samples.person(rng(), side, side) * (1, 1, 0) + (0, 0, 1)
    for style in ("v1.1", "xinsir"):
        assert lint(draw_poses([body], side, side, style=style), "openpose") == []


@pytest.mark.parametrize("kind", ["canny", "scribble", "softedge", "lineart_standard"])
@pytest.mark.parametrize("resolution", [0, 300])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "camera", "coins"])
def test_maps_made_here_pass(kind: str, resolution: int, name: str) -> None:
    made = preprocessors.get(kind, resolution=resolution)(getattr(data, name)())
    assert lint(made) == []


def test_a_chosen_style_is_not_worth_a_word() -> None:
    people, width, height = samples.poses("report", rng(3))
    image = samples.old_pose(people, width, height)
    assert codes(lint(image, "openpose")) == ["style"]
    chosen = preprocessors.Map(image=image, kind="openpose", polarity="openpose-18", params={"style": "v1.0"})
    assert lint(chosen) == []


# --- what must be found ---


def drawn_on_white() -> np.ndarray:
    """A few thick strokes, as a pen leaves them."""
    image = np.full((512, 512, 3), 255, np.uint8)
    cv2.polylines(image, [np.array([(60, 450), (60, 230), (256, 60), (450, 230), (450, 450)])], True, 0, 9)
    cv2.rectangle(image, (210, 300), (300, 450), 0, 14)
    cv2.circle(image, (380, 110), 40, 0, 6, cv2.LINE_AA)
    return image


def busy_edges() -> np.ndarray:
    """White edges so many and thick that little black is left between them."""
    edges = cv2.Canny(data.coffee(), 20, 40)
    return cv2.merge([cv2.dilate(edges, np.ones((9, 9), np.uint8))] * 3)


def test_a_drawing_on_white_is_inverted_and_busy_edges_are_too_many() -> None:
    found = lint(drawn_on_white(), "canny")
    assert codes(found) == ["inverted", "thick"]
    assert "invert it" in found[0].cure
    busy = busy_edges()
    assert (busy > 127).mean() > 0.6
    assert codes(lint(busy, "canny")) == ["full"]


def test_full_colours_with_smooth_ends_are_no_style_of_their_own() -> None:
    people, width, height = samples.poses("report", rng(3))
    image = samples.full_colour_pose(people, width, height)
    assert "full colour" in lint(image, "openpose")[0].message
    y, x = np.nonzero(image.any(axis=2))
    some = np.arange(0, len(y), 150)
    image[y[some], x[some]] //= 3
    (found,) = lint(image, "openpose")
    assert "full colour" in found.message


def test_hands_without_bodies_pass() -> None:
    image = np.zeros((512, 512, 3), np.uint8)
    for at in ((150, 200), (350, 330)):
        samples._add_hand(image, rng(1), np.array(at), 90)
    assert lint(image, "openpose") == []


def test_nobody_is_a_warning() -> None:
    (found,) = lint(np.zeros((64, 64, 3), np.uint8), "openpose")
    assert (found.code, found.severity) == ("empty", "warning")
    assert "nobody" in found.message


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_a_constant_map_is_found_whatever_the_kind(kind: str) -> None:
    assert codes(lint(np.full((32, 48, 3), 200, np.uint8), kind)) == ["constant"]
    assert codes(lint(np.zeros((32, 48, 3), np.uint8), kind)) == ["empty"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3000), (3, 3), (7, 5)])
@pytest.mark.parametrize("kind", ["", *KINDS])
def test_any_shape_is_looked_at(shape: tuple[int, int], kind: str) -> None:
    for levels in (2, 256):
        image = rng(levels).integers(0, levels, (*shape, 3), dtype=np.uint8) * np.uint8(255 // (levels - 1))
        assert all(found.message and found.cure for found in lint(image, kind))


def test_transparency_is_told_from_white(tmp_path: Path) -> None:
    clear = np.zeros((64, 64, 4), np.uint8)
    path = tmp_path / "pose.png"
    Image.fromarray(clear).save(path)
    for source in (clear, path, path.read_bytes(), Image.fromarray(clear)):
        assert codes(lint(source, "openpose")) == ["transparent"]
    people = one_joint()
    alpha = people.max(axis=2, keepdims=True)
    black = np.concatenate([0 * people, alpha], axis=2)  # drawn in black, and black is behind it
    assert codes(lint(black, "openpose")) == ["transparent"]
    assert codes(lint(np.concatenate([people, alpha], axis=2), "openpose")) == codes(lint(people, "openpose"))
    assert codes(lint(np.full((64, 64, 3), 255, np.uint8))) == ["constant"]


@pytest.mark.parametrize(
    ("size", "expected", "said"),
    [
        ((512, 512), [], ""),
        ((256, 256), ["size"], "256 x 256"),
        ((512, 384), ["aspect"], "512 x 384"),
    ],
)
def test_sizes_are_compared(size: tuple[int, int], expected: list[str], said: str) -> None:
    picture = data.astronaut()
    made = preprocessors.get("canny")(cv2.resize(picture, size))
    found = lint(made, picture=picture)
    assert codes(found) == expected
    assert all(said in finding.message for finding in found)


def test_holes_of_a_sensor_are_said_and_can_be_filled() -> None:
    metres = np.fromfunction(lambda y, x: 1 + (200 - y) / 100 + 0.2 * np.sin(x / 20), (200, 240))
    metres[rng(0).random(metres.shape) < 0.07] = 0.0
    (found,) = lint(preprocessors.get("depth", model="file", metric=True)(metres))
    assert found.code == "holes"
    assert "black specks (4.0% of it)" in found.message  # those that are not in what is far, black anyway
    assert "fill=true" in found.cure
    assert lint(preprocessors.get("depth", model="file", metric=True, fill=True)(metres)) == []


def test_a_turned_map_is_said_to_be_turned() -> None:
    picture = np.ascontiguousarray(data.coffee())
    made = preprocessors.get("canny")(np.ascontiguousarray(np.rot90(picture)))
    (found,) = lint(made, picture=picture)
    assert "turned" in found.message


def test_errors_come_before_warnings() -> None:
    made = preprocessors.get("canny")(data.astronaut()).image
    found = lint(255 - made, "canny", picture=np.zeros((256, 256, 3), np.uint8))
    assert codes(found) == ["inverted", "size"]


@pytest.mark.parametrize(
    ("kind", "guess"), [("softedge", "softedge"), ("normal", "normal"), ("canny", "canny")]
)
def test_kinds_are_guessed(kind: str, guess: str) -> None:
    made = [samples.GOOD[kind]("report", rng(seed)) for seed in range(20)]
    assert sum(guess_kind(image) == guess for image in made) >= 16


def test_a_photograph_is_no_kind_of_map() -> None:
    assert guess_kind(data.astronaut()) == ""
    assert lint(data.astronaut()) == []
    for kind in ("canny", "openpose", "depth", "normal", "hed"):
        assert codes(lint(data.astronaut(), kind)) == ["photo"]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown map 'cany' \(did you mean 'canny'\?\)"):
        lint(np.zeros((8, 8, 3), np.uint8), "cany")


def test_the_lint_needs_no_network_library(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np
from controlkit.preprocessors import lint
import controlkit.preprocessors.linting
from controlkit.preprocessors import lint as again
assert lint is again and callable(again)
for kind in ("canny", "openpose", "depth", "normal"):
    lint(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3), kind)
print(sorted({"torch", "diffusers", "transformers", "scipy", "skimage"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --- the command's job ---


def test_kinds_are_taken_from_option_note_name_and_folder(tmp_path: Path) -> None:
    edges = preprocessors.get("canny")(data.astronaut()).image
    (tmp_path / "depth").mkdir()
    write_png(tmp_path / "noted.png", edges, text={"controlkit": json.dumps({"kind": "scribble"})})
    for name in ("a.canny.png", "b_lineart_anime.png", "depth/c.png", "d.png"):
        write_png(tmp_path / name, edges)
    found = {file.path.name: file for file in lint_job.plan([str(tmp_path)]).maps}
    assert {name: (file.kind, file.said_by) for name, file in found.items()} == {
        "noted.png": ("scribble", "the file"),
        "a.canny.png": ("canny", "its name"),
        "b_lineart_anime.png": ("lineart_anime", "its name"),
        "c.png": ("depth", "its name"),
        "d.png": ("", ""),
    }
    forced = lint_job.plan([str(tmp_path / "*.png")], kind="canny")
    assert {file.kind for file in forced.maps} == {"canny"}


def test_the_job_reports_each_map_and_goes_on_after_a_broken_one(tmp_path: Path) -> None:
    edges = preprocessors.get("canny")(data.astronaut()).image
    write_png(tmp_path / "1.png", edges)
    write_png(tmp_path / "2.canny.png", 255 - edges)
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    (tmp_path / "4.png").write_bytes(b"")
    seen: list[tuple[int, int]] = []
    result = lint_job.run(lint_job.plan([str(tmp_path)]), lambda *step: seen.append(step))
    good, bad, cut, empty = result.verdicts
    assert (good.kind, good.guessed, good.lines()) == ("canny", True, [])
    (line,) = bad.lines()
    assert line.startswith(f"{tmp_path / '2.canny.png'}: canny: the edges are black on white")
    assert "Cure: invert it" in line
    assert codes(list(cut.findings)) == codes(list(empty.findings)) == ["unreadable"]
    assert result.findings == 3
    assert result.summary() == "looked at 4 maps: 3 with findings, 1 without"
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_job_says_of_how_many_maps_it_cannot_tell_the_kind(tmp_path: Path) -> None:
    write_png(tmp_path / "1.png", drawn_on_white())
    write_png(tmp_path / "2.png", np.ascontiguousarray(data.astronaut()))
    write_png(tmp_path / "3.png", few_edges())
    write_png(tmp_path / "4.png", np.full((64, 64, 3), 9, np.uint8))  # of which all is said
    job = lint_job.plan([str(tmp_path)])
    result = lint_job.run(job)
    assert [bool(verdict.findings) for verdict in result.verdicts] == [False, False, False, True]
    assert result.summary() == (
        "looked at 4 maps: 1 with findings, 3 without; the kind of 2 cannot be told, so only what holds for "
        "every map was checked: say it with --kind"
    )
    forced = lint_job.run(lint_job.plan([str(tmp_path / "[12].png")], kind="canny"))
    assert forced.summary() == "looked at 2 maps: 2 with findings, 0 without"
    alone = lint_job.run(lint_job.plan([str(tmp_path / "2.png")]))
    assert alone.summary().startswith("looked at 1 map: nothing found; its kind cannot be told, so only what")


def test_a_style_that_the_file_notes_is_accepted(tmp_path: Path) -> None:
    image = samples.old_pose(*samples.poses("report", rng(3)))
    note = {"kind": "openpose", "params": {"style": "v1.0"}}
    write_png(tmp_path / "noted.png", image, text={"controlkit": json.dumps(note)})
    write_png(tmp_path / "openpose.png", image)
    noted, silent = lint_job.run(lint_job.plan([str(tmp_path)])).verdicts
    assert codes(list(noted.findings)) == []
    assert codes(list(silent.findings)) == ["style"]


@pytest.mark.parametrize(
    "note", ["{", "[]", '{"kind": 3}', '{"kind": "??"}', '{"kind": "canny", "params": 1}']
)
def test_broken_notes_are_passed_over(tmp_path: Path, note: str) -> None:
    write_png(tmp_path / "x.png", few_edges(), text={"controlkit": note})
    assert lint_job.run(lint_job.plan([str(tmp_path / "x.png")])).findings == 0


def test_a_request_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown map 'dept'"):
        lint_job.plan([str(tmp_path)], kind="dept")
    with pytest.raises(ValueError, match="no picture is there"):
        lint_job.plan([str(tmp_path)])
    write_png(tmp_path / "x.png", few_edges())
    with pytest.raises(ValueError, match="does not exist"):
        lint_job.plan([str(tmp_path)], picture=os.fspath(tmp_path / "none.jpg"))


def test_the_job_compares_with_the_picture(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", few_edges())
    write_png(tmp_path / "photo.png", np.ascontiguousarray(data.coffee()))
    job = lint_job.plan([str(tmp_path / "x.png")], picture=str(tmp_path / "photo.png"))
    (verdict,) = lint_job.run(job).verdicts
    assert codes(list(verdict.findings)) == ["aspect"]
