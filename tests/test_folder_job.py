"""Folders of pictures into data sets: what is written, what is skipped, what goes on after a stop."""

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_detectors
from PIL import Image
from skimage import data
from typer.testing import CliRunner

from controlkit import files, folder_job, images, known_adapters, preprocessors
from controlkit.cli import app
from controlkit.picture_files import Captions, find_pictures, read_jsonl
from controlkit.preprocessors import write_depth_png16
from controlkit.silence import Silent

NAMES = ("astronaut", "coffee", "cat", "rocket")


@functools.cache
def photograph(name: str) -> np.ndarray:
    return np.ascontiguousarray(getattr(data, name)()[:160, :200])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with photos/: four pictures, one of them in a folder below, captions of three."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "space & co").mkdir(parents=True)
    for name in NAMES:
        place = folder / "space & co" if name == "rocket" else folder
        Image.fromarray(photograph(name)).save(place / f"{name}.png")
    (folder / "astronaut.txt").write_text("an astronaut\nsmiling\n")
    (folder / "coffee.caption").write_text("\ufeffa cup of coffee – hot")
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "space & co/rocket.png", "text": "a rocket"})
        + "\n\n"
        + json.dumps({"file_name": "cat.png", "caption": None})
    )
    return folder


class Outcome:
    """What the command said and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Preprocess = Callable[..., Outcome]


@pytest.fixture
def preprocess() -> Preprocess:
    def run(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, ["preprocess", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def edges(name: str, *thresholds: float) -> np.ndarray:
    return cv2.Canny(photograph(name), *(thresholds or (100, 200)))


def test_a_folder_becomes_a_data_set(photos: Path, preprocess: Preprocess) -> None:
    outcome = preprocess("canny,scribble", "photos", "-o", "set", "--sheet", "canny.low=50", "width=4")
    assert outcome.code == 0, outcome.err
    assert "8 maps made, 4 pictures complete, 1 without a caption" in outcome.out
    rows = rows_of(Path("set"))
    assert [*rows] == [
        "images/astronaut.png",
        "images/cat.png",
        "images/coffee.png",
        "images/space & co/rocket.png",
    ]
    for name, row in rows.items():
        stem = Path(name).stem
        assert images.load_picture(Path("set", name)).tobytes() == photograph(stem).tobytes()
        assert row["conditioning_image_file_name"] == row["canny_file_name"]
        made = images.load_picture(Path("set", row["canny_file_name"]))
        np.testing.assert_array_equal(made[..., 0], edges(stem, 50, 200))
        scribble = preprocessors.get("scribble", width=4)(photograph(stem))
        np.testing.assert_array_equal(
            images.load_picture(Path("set", row["scribble_file_name"])), scribble.image
        )
    texts = [row["text"] for row in rows.values()]
    assert texts == ["an astronaut smiling", "", "a cup of coffee – hot", "a rocket"]
    assert images.load_picture("set/sheet.png").shape[1] > 3 * 256
    assert not [path for path in Path("set").rglob("*") if path.name.startswith(".")]


def test_a_second_run_makes_what_is_missing(photos: Path, preprocess: Preprocess) -> None:
    assert preprocess("canny", "photos", "-o", "set").code == 0
    times = {path: path.stat().st_mtime_ns for path in Path("set", "canny").rglob("*.png")}
    victim = Path("set/canny/cat.png")
    victim.unlink()
    Path("set/canny/coffee.png").write_bytes(b"")  # as a power failure leaves it
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 0
    assert "2 maps made, 2 were there, 4 pictures complete" in outcome.out
    np.testing.assert_array_equal(images.load_picture(victim)[..., 0], edges("cat"))
    kept = [path for path in times if path.stem in ("astronaut", "rocket")]
    assert all(path.stat().st_mtime_ns == times[path] for path in kept)
    # a picture that has changed is done again, in the data set, too
    Image.fromarray(photograph("rocket")).save("photos/new.png")
    os.utime("photos/new.png", ns=(time.time_ns() + 10**9,) * 2)
    os.replace("photos/new.png", "photos/cat.png")
    assert "1 maps made, 3 were there" in preprocess("canny", "photos", "-o", "set").out
    np.testing.assert_array_equal(images.load_picture(victim)[..., 0], edges("rocket"))
    assert images.load_picture("set/images/cat.png").tobytes() == photograph("rocket").tobytes()


@pytest.mark.parametrize("has_links", [True, False])
def test_another_picture_of_the_same_name_is_not_taken_for_the_first(
    photos: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Of a second folder with the names of the first: its maps are not there, whatever they are called."""
    if not has_links:  # on another disk pictures are copied
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError))
    Path("more").mkdir()
    shutil.copy2("photos/coffee.png", "more/cat.png")
    Path("more/cat.txt").write_text("coffee")
    assert preprocess("canny", "photos", "-o", "set").code == 0
    before = {path: path.read_bytes() for path in Path("set").rglob("*") if path.is_file()}
    outcome = preprocess("canny", "more", "-o", "set")
    assert outcome.code == 2
    assert "set/images/cat.png is another picture than more/cat.png: rename it" in outcome.err
    assert {path: path.read_bytes() for path in Path("set").rglob("*") if path.is_file()} == before
    assert "4 were there" in preprocess("canny", "photos", "-o", "set").out
    assert preprocess("canny", "more", "-o", "set", "--overwrite").code == 0
    np.testing.assert_array_equal(images.load_picture("set/canny/cat.png")[..., 0], edges("coffee"))
    assert rows_of(Path("set"))["images/cat.png"]["text"] == "coffee"


def test_maps_of_other_settings_are_not_mixed(photos: Path, preprocess: Preprocess) -> None:
    assert preprocess("canny", "photos", "-o", "set", "low=50").code == 0
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 2
    assert "set has canny maps made with low=50: give the same settings" in outcome.err
    assert preprocess("canny", "photos", "-o", "set", "--overwrite").code == 0
    np.testing.assert_array_equal(images.load_picture("set/canny/cat.png")[..., 0], edges("cat"))
    assert preprocess("softedge", "photos", "-o", "set").code == 0  # another kind joins
    row = rows_of(Path("set"))["images/cat.png"]
    assert row["canny_file_name"] == row["conditioning_image_file_name"] == "canny/cat.png"
    assert row["softedge_file_name"] == "softedge/cat.png"
    Path("set/preprocess.json").write_text("{")
    assert "preprocess.json is damaged" in preprocess("canny", "photos", "-o", "set").err
    assert preprocess("canny", "photos", "-o", "set", "--overwrite").code == 0


def test_a_broken_picture_is_reported_and_the_others_are_made(photos: Path, preprocess: Preprocess) -> None:
    whole = Path("photos/coffee.png").read_bytes()
    Path("photos/broken.png").write_bytes(whole[: len(whole) // 2])
    Path("photos/page.jpg").write_text("<html>404</html>")
    Path("photos/empty.webp").write_bytes(b"")
    for attempt in range(2):
        outcome = preprocess("canny", "photos", "-o", "set")
        assert outcome.code == 1
        assert "4 pictures complete" in outcome.out
        assert "3 FAILED" in outcome.out
        assert ("4 maps made" in outcome.out) == (attempt == 0)
        assert "skipped: photos/broken.png is damaged" in outcome.err
        assert "skipped: photos/page.jpg is not a picture but an HTML page" in outcome.err
        assert "skipped: photos/empty.webp is empty" in outcome.err
        assert "Traceback" not in outcome.err
    assert len(rows_of(Path("set"))) == 4
    assert not Path("set/images/broken.png").exists()


def test_inputs_are_never_overwritten(photos: Path, preprocess: Preprocess) -> None:
    assert preprocess("canny", "photos", "-o", "set").code == 0
    before = Path("set/canny/cat.png").read_bytes()
    outcome = preprocess("canny", "set/canny", "-o", "set", "--overwrite")
    assert outcome.code == 2
    assert "set/canny/astronaut.png is an input: choose another output folder" in outcome.err
    assert Path("set/canny/cat.png").read_bytes() == before
    # into the folder of the pictures itself: maps beside them, and no second copy of the pictures
    originals = {path: path.read_bytes() for path in photos.rglob("*.png")}
    assert preprocess("canny", "photos", "-o", "photos").code == 0
    assert preprocess("canny", "photos", "-o", "photos").out.count("0 maps made, 4 were there") == 1
    assert all(path.read_bytes() == content for path, content in originals.items())
    assert not Path("photos/images").exists()
    rows = rows_of(photos)
    assert {*rows} == {"astronaut.png", "cat.png", "coffee.png", "space & co/rocket.png"}
    assert rows["space & co/rocket.png"]["text"] == "a rocket"
    assert rows["space & co/rocket.png"]["canny_file_name"] == "canny/space & co/rocket.png"


def test_metadata_of_others_is_kept(photos: Path, preprocess: Preprocess) -> None:
    rows = [
        {"file_name": "cat.png", "text": "a cat", "source": "camera 1"},
        {"file_name": "gone.png", "text": "lost", "label": 3},
    ]
    Path("photos/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert preprocess("canny", "photos", "-o", "photos").code == 0
    assert rows_of(photos)["gone.png"] == rows[1]
    assert rows_of(photos)["cat.png"].items() >= rows[0].items()
    Path("photos/metadata.jsonl").write_text("{broken")
    outcome = preprocess("softedge", "photos", "-o", "photos")
    assert outcome.code == 2
    assert "metadata.jsonl, line 1: this is not JSON" in outcome.err
    assert Path("photos/metadata.jsonl").read_text() == "{broken"
    assert not Path("photos/softedge").exists()


def test_files_patterns_and_folders_are_found_once(photos: Path) -> None:
    Path("photos/notes.md").write_text("no picture")
    Path("photos/.hidden.png").write_bytes(b"x")
    found = find_pictures(["photos/*.png", "photos/cat.png", "photos"])
    assert [picture.name for picture in found] == ["astronaut", "cat", "coffee", "space & co/rocket"]
    shutil.copy("photos/cat.png", "photos/cat.PNG.bak.jpg")
    shutil.copy("photos/cat.png", "photos/CAT.jpg")  # one name where a disk does not tell cases apart
    names = [picture.name for picture in find_pictures(["photos"])]
    assert {"CAT-jpg", "cat-png", "cat.PNG.bak"} <= {*names}
    Path("other").mkdir()
    shutil.copy("photos/cat.png", "other/cat.png")
    with pytest.raises(ValueError, match=r"photos/cat\.png and other/cat\.png would both become cat"):
        find_pictures(["photos/cat.png", "other/cat.png"])
    shutil.copy("photos/cat.png", "other/CAT.PNG")
    with pytest.raises(ValueError, match=r"would both become CAT-png: rename one$"):
        find_pictures(["other"])
    for nothing, reason in [("no/such", "no such file"), ("photos/*.xyz", "nothing matches")]:
        with pytest.raises(ValueError, match=reason):
            find_pictures([nothing])
    Path("some [2024]").mkdir()  # brackets in the folder's name are letters
    shutil.copy("photos/cat.png", "some [2024]/cat.png")
    assert [picture.name for picture in find_pictures(["some [2024]/*.png"])] == ["cat"]
    assert [picture.path for picture in find_pictures(["some [[]2024]/c[a]t.png"])] == [
        Path("some [2024]/cat.png")
    ]
    Path("bare").mkdir()
    with pytest.raises(ValueError, match=r"bare: no picture is there \(files that end in \.avif"):
        find_pictures(["bare"])


def test_a_model_that_cannot_be_had_leaves_no_folder(photos: Path, preprocess: Preprocess) -> None:
    outcome = preprocess("depth", "photos", "-o", "set", "model=nobody/nothing")
    assert outcome.code == 2
    assert not Path("set").exists()


def test_linked_folders_are_looked_into_once(tmp_path: Path) -> None:
    for place in ("photos/own", "elsewhere/below"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / place / "a.png")
    links = {
        "linked": "elsewhere",
        "again": "elsewhere",
        "own-link": "photos/own",
        "up": "photos",
        "out": ".",
    }
    for name, target in links.items():
        (tmp_path / "photos" / name).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    found = find_pictures([str(tmp_path / "photos")])
    assert [picture.name for picture in found] == ["again/below/a", "own/a"]
    found = find_pictures([str(tmp_path / "photos")], leave_out=[tmp_path / "elsewhere"])
    assert [picture.name for picture in found] == ["own/a"]


def test_a_name_that_is_no_text_is_left_out_and_told(photos: Path, preprocess: Preprocess) -> None:
    shutil.copy("photos/cat.png", b"photos/caf\xe9.png")
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 1
    assert "its name is not UTF-8" in outcome.err
    assert "4 pictures complete" in outcome.out
    assert len(Path("set/metadata.jsonl").read_text().splitlines()) == 4


def test_maps_that_were_made_are_no_pictures(photos: Path, preprocess: Preprocess) -> None:
    preprocess("canny", "photos", "-o", "photos/set", "--sheet")
    assert "4 pictures complete" in preprocess("softedge", "photos", "-o", "photos/other").out
    assert "4 pictures complete" in preprocess("softedge", "photos/set", "-o", "of-the-set").out
    preprocess("canny", "photos", "-o", "photos")
    assert "4 pictures complete" in preprocess("softedge", "photos", "-o", "elsewhere").out
    assert "4 pictures complete" in preprocess("shuffle", "photos/set/canny", "-o", "of-maps").out


def test_the_output_folder_is_no_input(photos: Path, preprocess: Preprocess) -> None:
    for _ in range(2):
        assert "4 pictures complete" in preprocess("canny", "photos", "-o", "photos/set", "--sheet").out
        assert "4 pictures complete" in preprocess("canny", "photos/**/*.png", "-o", "photos/set").out
    outcome = preprocess("softedge", "photos/set/images", "-o", "photos/set")
    assert "4 pictures complete" in outcome.out
    assert rows_of(photos / "set")["images/cat.png"]["softedge_file_name"] == "softedge/cat.png"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"file_name": "a.png"}\n{broken', r"metadata\.jsonl, line 2: this is not JSON"),
        (b"[1]", r"metadata\.jsonl, line 1: this is not a JSON object"),
        (b"\xff\xfe", r"metadata\.jsonl is not UTF-8"),
    ],
)
def test_bad_metadata_names_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Captions().of(tmp_path / "a.png")


def test_captions_of_csv_and_odd_line_ends(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('file_name,text\r\na.png,"one, two"\r\n', newline="")
    assert Captions().of(tmp_path / "a.png") == "one, two"
    (tmp_path / "sub").mkdir()
    text = json.dumps({"file_name": "b.png", "text": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "sub" / "metadata.jsonl").write_text(f"\ufeff{text}\r\n")
    assert Captions().of(tmp_path / "sub" / "b.png") == "a b"
    assert Captions().of(tmp_path / "sub" / "c.png") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("canny,cany", "photos", "-o", "set"), r"unknown map 'cany' (did you mean 'canny'?)"),
        (("canny,canny", "photos", "-o", "set"), "each kind of map once"),
        (("canny,softedge", "photos", "-o", "set", "lo=3"), "unknown canny or softedge option 'lo'"),
        (("canny", "photos", "-o", "set", "softedge.safe=1"), "no softedge map is asked for"),
        (("canny", "photos", "-o", "set", "low=abc"), "canny's low is 'abc'"),
        (("canny", "photos", "-o", "set.png"), "photos is a folder: its maps go into a folder"),
        (("canny,softedge", "photos/cat.png", "-o", "x.png"), "-o must name a folder"),
        (("canny", "photos/cat.png", "photos/coffee.png", "-o", "x.JPG"), "-o must name a folder"),
        (("canny", "photos/cat.png", "-o", "x.jpg"), "must end in .png"),
        (("canny", "photos", "-o", "photos/cat.png/x"), "cannot"),
        (("canny", "photos", "-o", "set", "--workers", "0"), "must be at least 1"),
        (("canny", "photos", "-o", "set", "--npy"), "no depth map is asked for"),
        (("canny", "low=3"), "name a picture"),
        (("canny", "nowhere/", "-o", "set"), "no such file or folder"),
        (("canny", "photos", "-o", "photos/astronaut.txt"), "is a file"),
    ],
)
def test_mistakes_are_one_line(
    photos: Path, preprocess: Preprocess, arguments: tuple[str, ...], message: str
) -> None:
    outcome = preprocess(*arguments)
    assert outcome.code == 2, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if not line.endswith(" ...")]
    assert message in line
    assert not Path("set").exists() or not any(Path("set").rglob("*.png"))


def test_networks_see_batches_and_give_the_same_maps(photos: Path, preprocess: Preprocess) -> None:
    model = tiny_detectors.save_depth_model(photos.parent / "depth-model")
    one = preprocess("canny,depth", "photos", "-o", "one", f"model={model}", "--batch", "1", "--workers", "1")
    three = preprocess(
        "canny,depth", "photos", "-o", "three", f"depth.model={model}", "--batch", "3", "--npy"
    )
    assert one.code == three.code == 0, one.err + three.err
    for name in rows_of(Path("one")):
        stem = Path(name).relative_to("images").with_suffix("")
        first, second = (
            images.load_picture(Path(folder, "depth", f"{stem}.png")) for folder in ("one", "three")
        )
        assert np.ptp(first) > 100
        assert np.abs(first.astype(int) - second).max() <= 1
        assert np.load(Path("three", "depth", f"{stem}.npy")).shape == first.shape[:2]


def test_joints_lie_beside_pose_maps(photos: Path, preprocess: Preprocess) -> None:
    model = tiny_detectors.save_spot_finder(photos.parent / "pose-model")
    assert preprocess("openpose", "photos", "-o", "set", f"model={model}", "threshold=0").code == 0
    for row in rows_of(Path("set")).values():
        poses = preprocessors.read_poses(Path("set", row["openpose_json"]))
        drawn = preprocessors.draw_poses(poses.people, poses.width, poses.height)
        np.testing.assert_array_equal(images.load_picture(Path("set", row["openpose_file_name"])), drawn)


def test_black_maps_are_named_and_counted(photos: Path, preprocess: Preprocess) -> None:
    for index in range(12):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(f"photos/plain{index:02d}.png")
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 0
    assert "16 maps made, 16 pictures complete, 12 maps black" in outcome.out
    notes = [line for line in outcome.err.splitlines() if "is black" in line]
    assert len(notes) == folder_job.BLACK_NAMED
    assert notes[0].startswith("set/canny/plain00.png is black: nothing was found")


def test_a_full_disk_stops_the_job_in_one_line(photos: Path, tmp_path: Path) -> None:
    """On a real file system of one megabyte."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root may mount a file system")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        command = [
            sys.executable,
            "-m",
            "controlkit",
            "preprocess",
            "canny",
            "photos",
            "-o",
            str(place / "set"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "the disk is full" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        for path in place.rglob("*.png"):
            images.load_picture(path)  # what is there is whole
        assert not list(place.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_kill_between_the_maps_and_their_picture_loses_no_pair(
    photos: Path, preprocess: Preprocess
) -> None:
    preprocess("canny", "photos", "-o", "set")
    kept = sorted(path for path in Path("set").rglob("*") if path.is_file() and "canny" not in path.parts)
    whole = Path("set/metadata.jsonl").read_text()
    picture = next(path for path in kept if path.suffix in (".png", ".jpg"))
    picture.unlink()
    Path("set/metadata.jsonl").unlink()
    outcome = preprocess("canny", "photos", "-o", "set")
    assert "4 pictures complete" in outcome.out
    assert Path("set/metadata.jsonl").read_text() == whole
    assert picture.is_file()


def test_jobs_that_end_at_once_keep_each_others_rows(photos: Path, preprocess: Preprocess) -> None:
    preprocess("canny", "photos", "-o", "set")
    edges_alone = rows_of(Path("set"))
    job = folder_job.plan(["softedge"], ["photos"], {}, output="set")
    with files.one_at_a_time("set"):  # another job, that has read what is there, and adds to it
        other = threading.Thread(target=folder_job.run, args=(job, Silent()))
        other.start()
        other.join(1.0)
        rows = [{**row, "depth_file_name": "depth/a.png"} for row in edges_alone.values()]
        Path("set/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.join()
    wanted = {"canny_file_name", "depth_file_name", "softedge_file_name"}
    assert all(wanted <= row.keys() for row in rows_of(Path("set")).values())
    record = json.loads(Path("set/preprocess.json").read_text())
    assert set(record["maps"]) == {"canny", "softedge"}


def test_a_pipe_among_pictures_is_named_and_not_waited_for(photos: Path, preprocess: Preprocess) -> None:
    os.mkfifo("photos/pipe.png")
    # were it waited for, this lets it go
    writer = threading.Timer(20, lambda: os.close(os.open("photos/pipe.png", os.O_WRONLY | os.O_NONBLOCK)))
    writer.start()
    outcome = preprocess("canny", "photos", "-o", "set")
    writer.cancel()
    assert outcome.code == 1
    assert "skipped: photos/pipe.png is a pipe, a socket or a device, and a file is wanted" in outcome.err
    assert "4 pictures complete, 1 without a caption, 1 FAILED" in outcome.out


def test_a_folder_that_cannot_be_listed_is_named(
    photos: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("space & co"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 2
    assert outcome.err == "error: the folder photos/space & co cannot be read: Permission denied\n"


def test_a_picture_that_goes_while_its_maps_are_made_is_left_out(
    photos: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def vanish(source: str, target: Path) -> None:
        if source.endswith("cat.png"):
            os.unlink(source)
        link(source, target)

    monkeypatch.setattr(os, "link", vanish)
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 1
    assert "skipped: photos/cat.png cannot be read: No such file or directory" in outcome.err
    assert set(rows_of(Path("set"))) == {
        f"images/{n}.png" for n in ("astronaut", "coffee", "space & co/rocket")
    }


def test_folders_that_lie_too_deep_are_one_plain_line(
    photos: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(*_: object, **__: object) -> None:  # as Python 3.11 does from a thousand folders on
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(os, "walk", walk)
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 2
    assert outcome.err == "error: photos has more folders in each other than can be looked into\n"


def test_a_picture_that_cannot_be_kept_leaves_nothing_behind(
    photos: Path, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = os.replace

    def replace(source: Path, target: Path) -> None:
        if "images" in Path(target).parts:
            raise OSError(errno.EIO, "Input/output error", str(source))
        renamed(source, target)

    monkeypatch.setattr(os, "replace", replace)
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 2
    assert "error: cannot write set/images/" in outcome.err
    assert not list(Path("set").rglob(".*.tmp"))


def test_a_killed_job_goes_on(photos: Path, preprocess: Preprocess) -> None:
    for index in range(60):
        Image.fromarray(data.astronaut()[index:, :]).save(f"photos/n{index:02d}.png", compress_level=0)
    command = [
        sys.executable,
        "-m",
        "controlkit",
        "preprocess",
        "canny",
        "photos",
        "-o",
        "set",
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(Path("set").rglob("canny/*.png"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path for path in Path("set/canny").rglob("*.png") if not path.name.startswith(".")}
    assert 5 <= len(done) < 64
    for path in done:
        images.load_picture(path)
    outcome = preprocess("canny", "photos", "-o", "set")
    assert outcome.code == 0
    assert f"{64 - len(done)} maps made, {len(done)} were there, 64 pictures complete" in outcome.out


@pytest.mark.slow
def test_two_processes_share_the_work(photos: Path) -> None:
    Path("photos/page.jpg").write_text("<html>")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    command = [*launch, "-m", "controlkit", "preprocess", "canny", "photos", "-o", "set"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr[-3000:]  # for the page
    assert done.stdout.count("4 maps made, 4 pictures complete, 1 without a caption, 1 FAILED") == 1
    shares = [line for line in done.stderr.splitlines() if line.endswith("pictures ...")]
    assert sorted(shares) == ["canny: 2 of 2 pictures ...", "canny: 3 of 3 pictures ..."]
    assert len(rows_of(Path("set"))) == 4
    np.testing.assert_array_equal(images.load_picture("set/canny/cat.png")[..., 0], edges("cat"))


def test_the_umask_decides_who_may_read(photos: Path, preprocess: Preprocess) -> None:
    before = os.umask(0o077)
    try:
        assert preprocess("canny", "photos", "-o", "private").code == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in Path("private/canny").rglob("*.png")}
    assert modes == {0o600}


def test_the_settings_of_a_plan_are_those_of_its_kinds(photos: Path) -> None:
    job = folder_job.plan(
        ["canny", "softedge"], ["photos"], {"resolution": "64", "canny.low": "9"}, output="set"
    )
    assert job.folder.settings == {
        "canny": {"resolution": "64", "low": "9"},
        "softedge": {"resolution": "64"},
    }


def test_depth_files_become_maps_without_banding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans/sub").mkdir(parents=True)
    metres = np.linspace(1, 1.5, 300 * 40, dtype=np.float32).reshape(40, 300)
    np.save("scans/a.npy", metres)
    levels = np.linspace(30000, 31000, 300 * 40).astype(np.uint16).reshape(40, 300)
    Image.fromarray(levels).save("scans/sub/b.png")
    (tmp_path / "scans" / "broken.npy").write_bytes(b"\x93NUMPY")
    result = CliRunner().invoke(
        app, ["preprocess", "depth", "scans", "model=file", "metric=yes", "-o", "maps"]
    )
    assert result.exit_code == 1, result.stderr
    assert "skipped: scans/broken.npy" in result.stderr
    assert "2 maps made, 2 pictures complete, 1 FAILED" in result.stdout
    for name in ("a", "sub/b"):
        made = images.load_picture(f"maps/depth/{name}.png")
        assert made[0, 0, 0] == 255  # near is white: metres grow with distance
        assert made[-1, -1, 0] == 0
        assert len(np.unique(made)) == 256
    assert not Path("maps/metadata.jsonl").exists()
    single = CliRunner().invoke(
        app, ["preprocess", "depth", "scans/a.npy", "model=file", "metric=yes", "-o", "a.png", "--png16"]
    )
    assert single.exit_code == 0, single.stderr
    np.testing.assert_array_equal(images.load_picture("a.png"), images.load_picture("maps/depth/a.png"))
    with Image.open("a-16bit.png") as deep:
        assert len(np.unique(np.asarray(deep))) == 40 * 300


def test_captions_are_found_however_umlauts_are_spelt(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "für") for form in ("NFC", "NFD"))
    (tmp_path / f"{apart}.TXT").write_text("a cat")
    assert Captions().of(tmp_path / f"{composed}.png") == "a cat"
    (tmp_path / f"{apart}.TXT").unlink()
    row = {"file_name": f"{apart}.png", "text": "a dog"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False))
    assert Captions().of(tmp_path / f"{composed}.png") == "a dog"


def test_a_caption_that_cannot_be_read_is_named(photos: Path, preprocess: Preprocess) -> None:
    (photos / "astronaut.txt").write_bytes("für alle".encode("latin-1"))
    outcome = preprocess("canny", "photos", "-o", "ds")
    assert outcome.code == 1
    assert "left out of metadata.jsonl: photos/astronaut.txt is not UTF-8 text" in outcome.err
    assert "1 FAILED" in outcome.out


def test_a_name_as_long_as_it_may_be(photos: Path, preprocess: Preprocess) -> None:
    (photos / "astronaut.png").rename(photos / f"{'x' * 251}.png")
    assert preprocess("canny", "photos", "-o", "ds").code == 0
    assert any("x" * 251 in row["file_name"] for row in read_jsonl(Path("ds", "metadata.jsonl")))


def test_depth_beside_a_map_never_replaces_what_it_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preprocess: Preprocess
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("m16.npy", np.linspace(1, 9, 3072).reshape(48, 64))
    before = Path("m16.npy").read_bytes()
    given = ("depth", "m16.npy", "model=file", "metric=true", "--npy", "-o", "m16.png")
    assert "m16.npy would overwrite what it is made from" in preprocess(*given).err
    assert Path("m16.npy").read_bytes() == before
    write_depth_png16(Path("z-16bit.png"), np.linspace(0, 1, 3072, dtype=np.float32).reshape(48, 64))
    before = Path("z-16bit.png").read_bytes()
    given = ("depth", "z-16bit.png", "model=file", "--png16", "-o", "z.png")
    assert "z-16bit.png would overwrite what it is made from" in preprocess(*given).err
    assert Path("z-16bit.png").read_bytes() == before


def test_what_belongs_beside_maps_is_made_where_the_maps_are_there(
    photos: Path, preprocess: Preprocess
) -> None:
    Path("depths").mkdir()
    for name, far in (("a", 5), ("b", 9)):
        np.save(f"depths/{name}.npy", np.linspace(1, far, 3072).reshape(48, 64))
    given = ("depth", "depths", "model=file", "-o", "set")
    assert preprocess(*given).code == 0
    assert "2 maps made" in preprocess(*given, "--npy").out
    np.testing.assert_array_equal(np.load("set/depth/b.npy"), np.load("depths/b.npy").astype(np.float32))
    Path("set/depth/a.npy").unlink()
    assert "1 maps made, 1 were there" in preprocess(*given, "--npy").out
    assert "0 maps made, 2 were there" in preprocess(*given).out
    before = Path("set/depth/a.npy").read_bytes()
    inside = ("depth", "set/depth/a.npy", "set/depth/b.npy", "model=file", "-o", "set")
    assert "set/depth/a.npy is an input: choose another output folder" in preprocess(*inside, "--npy").err
    assert Path("set/depth/a.npy").read_bytes() == before


def test_a_picture_that_is_called_as_the_sheet_is_stays_and_counts(
    photos: Path, preprocess: Preprocess
) -> None:
    shutil.copy("photos/cat.png", "photos/sheet.png")
    before = Path("photos/sheet.png").read_bytes()
    for sources in (("photos",), ("photos/sheet.png", "photos/coffee.png")):
        outcome = preprocess("canny", *sources, "-o", "photos", "--sheet")
        assert "photos/sheet.png is there, and no sheet of maps: rename it" in outcome.err
    assert "5 maps made" in preprocess("canny", "photos", "-o", "photos").out
    assert "5 maps made" in preprocess("canny", "photos", "-o", "set", "--sheet").out
    assert Path("photos/sheet.png").read_bytes() == before
    again = preprocess("canny", "set", "-o", "more", "--sheet")  # where the sheet is one
    assert "5 maps made" in again.out
    assert preprocess("canny", "set", "-o", "set", "--sheet").code == 0


def test_joints_that_are_gone_are_found_again(photos: Path, preprocess: Preprocess) -> None:
    given = ("openpose", "photos", "model=tiny", "-o", "set")
    assert preprocess(*given).code == 0
    Path("set/openpose/cat.json").unlink()
    assert "1 maps made, 3 were there" in preprocess(*given).out
    assert Path("set/openpose/cat.json").is_file()


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("canny", 'controlkit generate "a red figure" --map canny=m.png'),
        ("lineart_standard", "controlkit generate PROMPT --base sd15 --map lineart_standard=m.png"),
    ],
)
def test_the_command_that_follows_a_map_names_a_base_that_can(
    photos: Path, preprocess: Preprocess, kind: str, command: str
) -> None:
    assert command in preprocess(kind, "photos/astronaut.png", "-o", "m.png").out
    known_adapters.check(kind, "", "sd15" if "sd15" in command else "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos/astronaut.png", "--workers", 0), "--workers and --batch must be at least 1"),
        (("photos/astronaut.png", "--batch", -3), "--workers and --batch must be at least 1"),
        (("photos/astronaut.png", "-o", ""), "-o names nothing"),
        (("",), "name a picture, a folder or a pattern"),
    ],
)
def test_of_one_picture_as_much_is_asked(
    photos: Path, preprocess: Preprocess, arguments: tuple[object, ...], message: str
) -> None:
    outcome = preprocess("canny", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
