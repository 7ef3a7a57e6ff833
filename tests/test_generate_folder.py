"""`controlkit generate` with folders: a picture for each one there, as if it had been asked for alone."""

import errno
import shutil
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from outcomes import Run

from controlkit import generate_folder, terminal
from controlkit.formats.finding import mark_of
from controlkit.generate_folder import Request, requests
from controlkit.generate_folder import run as run_requests
from controlkit.generate_plan import Plan, plan
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.infotext import parse
from controlkit.preprocessors import get


@pytest.fixture
def photos(generate: Run) -> Path:
    """Three photos, one in a folder below; the fixture `generate` has gone to an empty folder."""
    place = Path("my photos")
    for number, name in enumerate(("cat.png", "dog: 0.5.png", "more/cat.png")):
        picture = np.full((64, 64, 3), 40, np.uint8)
        picture[16:48, 8 + 8 * number : 44] = (200, 60 + 40 * number, 90)
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(place / name, picture)
    (place / "notes.txt").write_text("no picture")
    return place


@pytest.fixture
def of_base(run: Run, models: Path) -> Run:
    fixed = ("generate", "a cube", "--base", models / "sd1", "--adapter", f"canny={models / 'canny-sd1'}")
    return lambda *more: run(*fixed, "--steps", 2, *more)


def write_masks(photos: Path) -> None:
    """A mask of the left side for each of the photos, in a folder `masks`."""
    for path in photos.rglob("*.png"):
        mask = np.zeros(load_picture(path).shape, np.uint8)
        mask[:, :32] = 255
        kept = Path("masks") / path.relative_to(photos)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_png(kept, mask)


def test_each_picture_is_as_it_is_alone(of_base: Run, photos: Path) -> None:
    outcome = of_base("--control", f"canny={photos}:0.7:end=0.5")
    assert outcome.done().startswith("wrote 3 pictures into out, in ")
    for name in ("cat", "dog: 0.5", "more/cat"):
        of_base("--control", f"canny={photos / name}.png:0.7:end=0.5", "-o", "alone.png").done()
        assert np.array_equal(load_picture("alone.png"), load_picture(f"out/{name}.png"))


def test_each_picture_may_have_a_region_of_its_own(of_base: Run, photos: Path) -> None:
    write_masks(photos)
    write_png(Path("masks") / "cat.png", np.full((64, 64, 3), 255, np.uint8))
    of_base("--control", f"canny={photos}:0.7:mask=masks:end=0.5").done()
    for name in ("cat", "more/cat"):
        alone = f"canny={photos / name}.png:0.7:mask=masks/{name}.png:end=0.5"
        of_base("--control", alone, "-o", "alone.png").done()
        assert np.array_equal(load_picture("alone.png"), load_picture(f"out/{name}.png"))
    one = f"canny={photos / 'cat.png'}:mask=masks"  # the masks decide how many there are
    assert of_base("--control", one, "-o", "regions").done().startswith("wrote 3 pictures into regions")
    (Path("masks") / "cat.png").unlink()
    told = of_base("--control", f"canny={photos}:mask=masks").refused()
    assert told.startswith("masks has no picture of the name that one in my photos has: cat")


def test_a_job_that_was_stopped_goes_on(of_base: Run, photos: Path) -> None:
    asked = ("--control", f"canny={photos}", "-o", "made", "--seed", 3)
    of_base(*asked).done()
    times = {path: path.stat().st_mtime_ns for path in Path("made").rglob("*.png")}
    Path("made/more/cat.png").unlink()
    told = of_base(*asked).done()
    assert told.startswith("wrote 1 picture into made")
    assert told.endswith("; 2 made in the same way were there\n")
    assert [path for path, then in times.items() if path.stat().st_mtime_ns != then] == [
        Path("made/more/cat.png")
    ]
    Path("made/cat.png").write_bytes(Path("made/cat.png").read_bytes()[:-50])  # half a file is made again
    turned = np.rot90(load_picture(photos / "dog: 0.5.png"))
    write_png(photos / "dog: 0.5.png", np.ascontiguousarray(turned))
    assert of_base(*asked).done().startswith("wrote 2 pictures into made")
    assert of_base(*asked, "--guidance", 3).done().startswith("wrote 3 pictures into made")


def test_folders_go_together_by_names(of_base: Run, photos: Path) -> None:
    for path in photos.rglob("*.png"):
        kept = Path("edges") / path.relative_to(photos)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_png(kept, get("canny")(load_picture(path)).image)
    both = ("--map", "canny=edges", "--from", photos, "--strength", 0.5)
    assert of_base(*both, "-o", "both", "-n", 2).done().startswith("wrote 6 pictures into both, in ")
    of_base(
        "--map", "canny=edges/more/cat.png", "--from", photos / "more" / "cat.png", "--strength", 0.5
    ).done()
    assert np.array_equal(load_picture("out.png"), load_picture("both/more/cat-1.png"))

    Path("edges/more/cat.png").rename("edges/third.png")
    told = of_base("--from", photos, "--map", "canny=edges").refused()
    assert "my photos has no picture of the name that one in edges has: third" in told
    for name in "abcd":
        write_png(photos / f"{name}.png", np.zeros((64, 64, 3), np.uint8))
    told = of_base("--control", f"canny={photos}", "--from", "edges").refused()
    assert "edges has no picture of the name that one in my photos has: a, b, c and 2 more" in told
    told = of_base("--control", "canny=edges/cat.png", "--map", "canny=edges/cat.png", "--from", photos)
    assert told.done().startswith("wrote 7 pictures")


def test_folders_go_together_however_their_umlauts_are_spelt(of_base: Run, tmp_path: Path) -> None:
    picture = np.full((64, 64, 3), 90, np.uint8)
    picture[16:48, 16:48] = 220
    for folder, spelling in (("photos", "NFC"), ("starts", "NFD")):
        (tmp_path / folder).mkdir()
        write_png(tmp_path / folder / unicodedata.normalize(spelling, "für.png"), picture)
    for control, start in (("photos", "starts"), ("starts", "photos")):
        whole = Request((f"canny={control}",), (), start, None, "made")
        (one,) = requests(whole, Silent())
        assert [Path(path).parent.name for path in one.files] == [control, start]
    of_base("--control", "canny=photos", "--from", "starts", "-o", "made").done()
    assert [path.name for path in Path("made").iterdir()] == [unicodedata.normalize("NFC", "für.png")]


class Silent:
    """Tells nobody, and keeps what was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def status(self, text: str) -> None:
        pass

    def progress(self, done: int, total: int, text: str = "") -> None:
        pass


A, B, C, FULL = "a", "b", "c", "full"
OWN = "own"  # a fault of the picture at hand, which begins with its name


@pytest.mark.parametrize(
    ("faults", "ends_with", "made"),
    [
        ((A, A, None), A, 0),  # the same again, before anything was made: it is the request
        ((A, B, C, None), A, 0),  # or three that name no picture
        ((A, B, None, C), "", 1),
        ((OWN, OWN, OWN, None), "", 1),
        ((OWN, OWN), OWN, 0),  # nothing at all can be made
        ((None, A, A, A, None), "", 2),
        ((None, FULL, None), FULL, 1),
    ],
)
def test_faults_are_a_pictures_or_the_requests(
    faults: tuple[str | None, ...],
    ends_with: str,
    made: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [
        Request((f"canny={k}.jpg",), (), None, None, str(tmp_path / str(k) / "x.png"))
        for k in range(len(faults))
    ]

    def planned(request: Request) -> Any:
        fault, number = faults[asked.index(request)], asked.index(request)
        if fault is None:
            return SimpleNamespace(
                outputs=[Path(request.output), Path(request.output).with_name("kept.png")], notes=[]
            )
        error = ValueError(f"{number}.jpg: it is torn" if fault == OWN else fault)
        raise error from (OSError(errno.ENOSPC, "full") if fault == FULL else None)

    monkeypatch.setattr(generate_folder, "_session", lambda job, *_: job)
    monkeypatch.setattr(generate_folder, "_written", lambda job: job.outputs[:1])
    report = Silent()
    if ends_with:
        with pytest.raises(ValueError, match="0.jpg: it is torn" if ends_with == OWN else f"^{ends_with}$"):
            run_requests(asked, planned, report)  # type: ignore[arg-type]
    else:
        result = run_requests(asked, planned, report)  # type: ignore[arg-type]
        left = [request.output for request, fault in zip(asked, faults, strict=True) if fault]
        assert result.failed == left
        assert [note.split(": ")[1] for note in report.notes] == left  # each is told once
        there = [request.output for request, fault in zip(asked, faults, strict=True) if not fault]
        assert [str(path) for path in result.made] == there
        assert [path.name for path in result.kept] == ["kept.png"] * made
    done = {k for k, fault in enumerate(faults) if not fault} - ({2, 3} if ends_with else set())
    assert {int(path.name) for path in tmp_path.iterdir()} == done  # no folder of what failed


def test_what_cannot_be_read_is_left_out_and_named(of_base: Run, photos: Path) -> None:
    (photos / "dog: 0.5.png").write_bytes(b"nothing")
    outcome = of_base("--control", f"canny={photos}")
    assert outcome.code == 1
    assert "left out: out/dog: 0.5.png: my photos/dog: 0.5.png" in outcome.err
    assert outcome.out.endswith("; 1 left out\n")
    assert sorted(path.as_posix() for path in Path("out").rglob("*.png")) == [
        "out/cat.png",
        "out/more/cat.png",
    ]


def test_what_is_wrong_with_the_request_stops_it(of_base: Run, photos: Path) -> None:
    followed = ("--control", f"canny={photos}")
    for more, message in (
        (("--scheduler", "dddim"), "unknown scheduler 'dddim'"),
        (("-o", "made.png"), "my photos is a folder, so that -o names one, too, and not made.png"),
        (("-o", photos), "my photos holds what is followed: -o names another folder"),
        (("--grid", "seed=1,2"), "a grid is of one picture: name a file"),
    ):
        assert message in of_base(*followed, *more).refused()
    assert not Path("out").exists()
    Path("empty").mkdir()
    assert "empty: no picture is there" in of_base("--control", "canny=empty").refused()


@pytest.mark.slow
def test_what_is_made_within_the_folder_is_not_followed(of_base: Run, photos: Path) -> None:
    asked = ("--control", f"canny={photos}", "-o", photos / "made")
    assert of_base(*asked).done().startswith("wrote 3 pictures")
    assert of_base(*asked).done().startswith("wrote 0 pictures")


def test_large_folders_are_read_at_once_and_for_as_many_pictures_as_there_may_be(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(500):
        (photos / f"{number}-16bit.png").touch()
    followed = f"canny={photos}"
    before = time.process_time()
    with terminal.opened() as told:
        asked = requests(Request((), (followed,), None, None, str(tmp_path / "out")), told)
        assert len(asked) == 500
        assert time.process_time() - before < 1.5
        with pytest.raises(ValueError, match="the number of pictures must be from 1 to 1000, not 1001"):
            requests(Request((followed,), (), None, None, str(tmp_path / "out")), told, count=1001)


def test_notes_are_told_once(of_base: Run, photos: Path) -> None:
    outcome = of_base("--control", f"canny={photos}", "--guidance", 1, "--negative", "blue")
    assert outcome.done()
    assert outcome.err.count("loading the libraries and the base") == 1
    assert outcome.err.count("has no effect") == 1


def test_a_record_is_of_the_adapter_that_was_read(photos: Path, models: Path) -> None:
    adapter = Path(shutil.copytree(models / "canny-sd1", "adapter"))
    followed = [f"canny={photos / name}.png" for name in ("cat", "dog: 0.5")]
    made = [Request((one,), (), None, None, f"{k}.png") for k, one in enumerate(followed)]

    def planned(one: Request) -> Plan:
        if one is made[1]:
            weights = next(adapter.glob("*.safetensors"))
            weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
        given = {"prompt": "a cube", "base": str(models / "sd1"), "steps": 1}
        return plan(given, **vars(one), adapters=[f"canny={adapter}"])

    with terminal.opened() as told:
        assert len(run_requests(made, planned, told).made) == 2
    records = [parse(read_png_text(one.output), source=one.output) for one in made]
    marks = [control.adapter_mark for record in records for control in record.controls]
    assert marks[0] == marks[1] != mark_of(str(adapter))


def test_what_draws_maps_is_loaded_once(of_base: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(kind: str, **options: object) -> object:
        asked.append(kind)
        return get(kind, **options)

    monkeypatch.setattr("controlkit.preprocessors.get", counted)
    assert of_base("--control", f"canny={photos}", "--hires", 2).done().startswith("wrote 3 pictures")
    assert asked == ["canny"]


def test_the_first_picture_may_be_the_broken_one(of_base: Run, photos: Path) -> None:
    (photos / "cat.png").write_bytes(b"nothing")
    outcome = of_base("--control", f"canny={photos}")
    assert outcome.code == 1
    assert "left out: out/cat.png: my photos/cat.png" in outcome.err
    assert outcome.out.endswith("; 1 left out\n")
    for name in ("dog: 0.5", "more/cat"):
        (photos / f"{name}.png").write_bytes(b"nothing")
    shutil.rmtree("out")
    assert "my photos/cat.png is not a picture" in of_base("--control", f"canny={photos}").refused()
    assert not Path("out").exists()
    write_png(photos / "zebra.png", np.eye(64, dtype=np.uint8)[..., None].repeat(3, axis=-1) * 255)
    (photos / "more" / "cat.png").rename(photos / "eel.png")
    outcome = of_base("--control", f"canny={photos}")
    assert outcome.code == 1
    assert outcome.out.startswith("wrote 1 picture into out")
    assert outcome.out.endswith("; 3 left out\n")
    shutil.copy(photos / "eel.png", "start.png")
    shutil.copy(photos / "zebra.png", photos / "ape.png")
    shutil.copy(photos / "zebra.png", photos / "bee.png")
    told = of_base("--control", f"canny={photos}", "--from", "start.png", "-o", "new").refused()
    assert told.startswith("start.png is not a picture")


@pytest.mark.filterwarnings("ignore:my photos/dog")
def test_what_fails_while_a_picture_is_made_is_its_own(of_base: Run, photos: Path) -> None:
    wide = np.full((64, 256, 3), 90, np.uint8)
    wide[16:48, 110:140] = 200
    write_png(photos / "dog: 0.5.png", wide)
    write_masks(photos)
    asked = ("--control", f"canny={photos}", "--from", photos, "--mask", "masks")
    outcome = of_base(*asked, "--width", 64, "--height", 64)
    assert outcome.code == 1
    assert "left out: out/dog: 0.5.png: " in outcome.err
    assert outcome.out.startswith("wrote 2 pictures into out")


def test_nothing_that_is_followed_is_written_over(of_base: Run, photos: Path) -> None:
    again = photos / photos.name / "cat.png"
    again.parent.mkdir()
    shutil.copy(photos / "cat.png", again)
    before = (photos / "cat.png").read_bytes()
    message = of_base("--control", f"canny={photos}", "-o", ".").refused()
    assert "my photos/cat.png would overwrite what it is made from" in message
    assert (photos / "cat.png").read_bytes() == before
    assert "-o is empty" in of_base("--control", f"canny={photos}", "-o", "").refused()
    message = of_base("--control", f"canny={photos}", "--preview", "out/cat.png").refused()
    assert "the preview out/cat.png is one of the pictures" in message
    message = of_base("--control", f"canny={photos}", "-n", 2, "--preview", "out/more/cat-2.png").refused()
    assert "the preview out/more/cat-2.png is one of the pictures" in message
    Path("link").symlink_to(photos, target_is_directory=True)
    asked = ("--control", f"canny={photos}", "-o", Path("link") / "made")
    assert of_base(*asked).done().startswith("wrote 4 pictures")
    assert of_base(*asked).done().startswith("wrote 0 pictures")
    Path("round").symlink_to("about")
    Path("about").symlink_to("round")
    assert (
        "the folder about cannot be made" in of_base("--control", f"canny={photos}", "-o", "about").refused()
    )
    alone = ("--control", f"canny={photos / 'cat.png'}")
    assert "cannot write about/a.png" in of_base(*alone, "-o", "about/a.png").refused()
    assert "cannot write about/b.png" in of_base(*alone, "--preview", "about/b.png").refused()


@pytest.mark.filterwarnings("ignore:adapter .* learned to follow canny maps")
def test_a_depth_that_was_kept_in_many_ways_is_one_map(run: Run, models: Path, photos: Path) -> None:
    kept = ("--npy", "--png16", "model=tiny")
    run("preprocess", "depth", photos, "-o", "maps", *kept).done()
    asked = ("generate", "x", "--base", models / "sd1", "--adapter", f"depth={models / 'canny-sd1'}")
    outcome = run(*asked, "--steps", 1, "--map", "depth=maps/depth", "--from", photos)
    assert outcome.done().startswith("wrote 3 pictures into out")
    for path in Path("maps/depth").rglob("*.png"):
        path.unlink()
    outcome = run(*asked, "--steps", 1, "--map", "depth=maps/depth", "--from", photos)
    assert outcome.done().startswith("wrote 3 pictures into out")
