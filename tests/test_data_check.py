"""A look at every pair before it is trained on: each sort of fault is found and named, at little cost."""

import functools
import io
import json
import os
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from skimage import data as photographs
from typer.testing import CliRunner

from controlkit import images, preprocessors
from controlkit.cli import app
from controlkit.training.config import ControlNetRecipe, parse_recipe
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data import check as check_module
from controlkit.training.data import check_facts
from controlkit.training.data.check import Check, check_examples, same_aspect
from controlkit.training.data.check_facts import look_at_map, look_at_picture
from controlkit.training.data.examples import ArrayPiece, Example, FilePiece, Piece
from controlkit.training.data.pairs import load_pairs
from controlkit.training.data.source_files import BytesPiece
from controlkit.training.data.source_recipe import recipe_of
from controlkit.training.data.sources import open_examples


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@functools.cache
def astronaut() -> np.ndarray:
    return photographs.astronaut()


def photograph(number: int = 0, *, width: int = 128, height: int = 96) -> np.ndarray:
    return np.ascontiguousarray(astronaut()[number : number + height, 100 : 100 + width])


def edges(picture: np.ndarray) -> np.ndarray:
    return preprocessors.get("canny")(picture).image


def encoded(array: np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def bomb(width: int, height: int, packed: bytes = zlib.compress(b"\0" * 99)) -> bytes:
    """A PNG whose header announces a huge picture; its check sums are right and it holds hardly any data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", packed) if packed else b""
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def make_set(folder: Path, count: int = 6) -> Path:
    """A sound data set: images/N.jpg, canny/N.png, metadata.jsonl."""
    rows = []
    for number in range(count):
        picture = photograph(number)
        put(folder / f"images/{number}.jpg", encoded(picture, "JPEG", quality=95))
        put(folder / f"canny/{number}.png", images.encode_png(edges(picture)))
        row = {"file_name": f"images/{number}.jpg", "text": "x", "canny_file_name": f"canny/{number}.png"}
        rows.append(json.dumps(row) + "\n")
    put(folder / "metadata.jsonl", "".join(rows))
    return folder


def checked(
    folder: Path, kind: str = "canny", settings: dict[str, Any] | None = None, **options: Any
) -> Check:
    data = DataRecipe(source=str(folder), **(settings or {}))
    return check_examples(open_examples(data, kind=kind), data=data, kind=kind, **options)


def found(check: Check, severity: str = "") -> list[tuple[int | None, str]]:
    return [(f.index, f.code) for f in check.findings if f.severity == severity or not severity]


def test_a_sound_data_set(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    for lint in (False, True):
        check = checked(folder, lint=lint)
        assert check.findings == []
        assert check.sizes == [(128, 96)] * 6
        assert check.usable == list(range(6))
        assert (check.captioned, check.problem(), check.counts) == (6, "", {})
        examples = open_examples(DataRecipe(source=str(folder)))
        assert check.digests == [example.picture.digest().hex() for example in examples]


# --- what cannot be used ---

GOOD_JPEG = encoded(photograph(), "JPEG", quality=95)
GOOD_PNG = encoded(photograph())
PROGRESSIVE = encoded(photograph(), "JPEG", quality=95, progressive=True)
FLIPPED = bytearray(GOOD_PNG)
FLIPPED[len(GOOD_PNG) // 2] ^= 1
ROWS = zlib.compress(b"".join(b"\0" + row.tobytes() for row in photograph()))
BROKEN = {
    "empty": b"",
    "text": b"this is a text",
    "page": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "half a JPEG": GOOD_JPEG[: len(GOOD_JPEG) // 2],
    "nearly a JPEG": GOOD_JPEG[:-200],
    "half a progressive JPEG": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "the start of a JPEG": GOOD_JPEG[:30],
    "half a PNG": GOOD_PNG[: len(GOOD_PNG) // 2],
    "the start of a PNG": GOOD_PNG[:20],
    "a flipped bit": bytes(FLIPPED),
    "a bomb": bomb(12_000, 9_000),
    "a larger bomb": bomb(20_000, 20_000),
    "nothing by nothing": bomb(0, 0),
    "no pixels": bomb(128, 96, b""),
    "a few rows": bomb(128, 96),
    "a damaged stream": bomb(128, 96, ROWS[:40] + bytes([ROWS[40] ^ 255]) + ROWS[41:]),
    "a stream that is cut off": bomb(128, 96, ROWS[:-30]),
    "an unknown filter": bomb(128, 96, zlib.compress((b"\x09" + bytes(128 * 3)) * 96)),
}


@pytest.mark.parametrize("lint", [False, True])
@pytest.mark.parametrize("place", ["images/2.jpg", "canny/2.png"])
@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(tmp_path: Path, what: str, place: str, lint: bool) -> None:
    folder = make_set(tmp_path / "set", 4)
    put(folder / place, BROKEN[what])
    check = checked(folder, lint=lint)
    assert found(check) == [(2, "broken")]
    assert check.usable == [0, 1, 3]
    (finding,) = check.findings
    assert finding.name == "images/2.jpg"
    assert finding.message.startswith(str(folder / place))
    assert "\n" not in finding.message
    assert finding.cure
    assert check.problem() == f"1 of 4 pairs cannot be used: {finding.message}"
    assert (check.sizes[2] is None) == place.startswith("images")


def test_bombs_are_refused_by_their_size_alone(tmp_path: Path) -> None:
    for size, limit in [((12_000, 9_000), "at most"), ((20_000, 20_000), "too large")]:
        with pytest.raises(ValueError, match=limit):
            look_at_picture(BytesPiece(bomb(*size), "x.png"), thorough=True)


@pytest.mark.parametrize("lint", [False, True])
def test_everything_else_that_is_an_error(tmp_path: Path, lint: bool) -> None:
    folder = make_set(tmp_path / "set", 7)
    (folder / "images/0.jpg").unlink()
    (folder / "canny/1.png").unlink()
    put(tmp_path / "secret.jpg", GOOD_JPEG)
    (folder / "images/2.jpg").unlink()
    os.symlink("../../secret.jpg", folder / "images/2.jpg")
    put(folder / "canny/3.png", images.encode_png(edges(photograph(width=96, height=128))))
    put(folder / "canny/4.png", images.encode_png(edges(photograph(width=96, height=96))))
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    rows[5] = json.dumps({"file_name": "images/5.jpg", "text": "x"})
    rows[6] = json.dumps({"file_name": "../secret.jpg", "text": "x", "canny_file_name": "canny/6.png"})
    put(folder / "metadata.jsonl", "\n".join(rows))
    check = checked(folder, lint=lint)
    expected = ["missing", "missing", "refused", "aspect", "aspect", "refused", "refused"]
    assert found(check, "error") == list(enumerate(expected))
    assert unpaired(check) == [("unpaired map", "canny/5.png"), ("unpaired picture", "images/6.jpg")]
    messages = [finding.message for finding in check.findings]
    for part, message in zip(
        [
            "0.jpg is not there",
            "1.png is not there",
            "leads out",
            "96 x 128, its picture 128 x 96",
            "96 x 96",
        ],
        messages,
        strict=False,
    ):
        assert part in message
    assert "turned by 90 degrees" in messages[3]
    assert "metadata.jsonl, line 6: the key 'canny_file_name' is missing" in messages[5]
    assert check.usable == []
    assert check.counts == {"missing": 2, "refused": 3, "aspect": 2, "unpaired map": 1, "unpaired picture": 1}
    assert check.problem(2).startswith("7 of 7 pairs cannot be used: ")
    assert check.problem(2).endswith("; and 5 more")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_sizes_are_upright(tmp_path: Path, suffix: str) -> None:
    folder = make_set(tmp_path / "set", 2)
    turned = Image.fromarray(np.rot90(photograph()).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, extra in [(0, {"exif": exif}), (1, {})]:
        (folder / f"images/{number}.jpg").unlink()
        turned.save(folder / f"images/{number}.{suffix}", **extra)
    text = (folder / "metadata.jsonl").read_text().replace(".jpg", f".{suffix}")
    put(folder / "metadata.jsonl", text)
    check = checked(folder)
    assert check.sizes == [(128, 96), (96, 128)]
    assert found(check, "error") == [(1, "aspect")]


def test_aspects() -> None:
    assert same_aspect((1000, 667), (512, 341))
    assert same_aspect((1000, 667), (768, 512))
    assert same_aspect((1920, 1080), (896, 512))  # rounded to 64
    assert not same_aspect((1920, 1080), (895, 512))
    assert not same_aspect((480, 512), (512, 512))
    assert not same_aspect((512, 768), (768, 512))
    assert same_aspect((3000, 2), (1500, 1))


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (640, 427), (720, 1000), (333, 250), (1600, 900)])
@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_maps_of_controlnet_aux_have_the_shape_of_their_pictures(
    size: tuple[int, int], resolution: int
) -> None:
    """It brings the shorter side to a resolution, and rounds each side to multiples of 64."""
    width, height = (round(side * resolution / min(size) / 64) * 64 for side in size)
    assert same_aspect(size, (width, height))
    assert not same_aspect(size, (min(width, height),) * 2)
    assert not same_aspect(size, (height, width))


def test_maps_rounded_to_multiples_of_64_are_noted_and_not_refused(tmp_path: Path) -> None:
    assert same_aspect((1080, 1350), (1024, 1344))  # each side rounded down
    assert not same_aspect((1080, 1350), (1024, 1280 - 64))
    assert not same_aspect((300, 400), (64, 64))  # of small maps, rounding would explain anything
    picture = Image.fromarray(photograph()).resize((400, 300))
    for name, size in (("a", (704, 512)), ("b", (512, 512))):
        put(tmp_path / f"{name}.png", encoded(np.asarray(picture)))
        put(tmp_path / f"conditioning/{name}.png", encoded(np.zeros((size[1], size[0], 3), np.uint8)))
    check = checked(tmp_path)
    assert [(f.index, f.code) for f in check.findings if f.code in ("size", "aspect")] == [
        (0, "size"),
        (1, "aspect"),
    ]


# --- poses ---


@pytest.mark.parametrize(
    ("pose", "code"),
    [
        ('{"people": [{"pose_keypoints_2d": [%s]}], "canvas_width": 64, "canvas_height": 48}', ""),
        ('\ufeff{"people": [{"pose_keypoints_2d": [%s]}]}', ""),
        ('{"people": []}', "nobody"),
        ('{"people": [{"pose_keypoints_2d": [%s]}], "canvas_width": 48, "canvas_height": 64}', "aspect"),
        ('{"people": [{"pose_keypoints_2d": [1, 2]}]}', "broken"),
        ('{"people": ', "broken"),
        ("[1, 2]", "broken"),
    ],
)
def test_poses(tmp_path: Path, pose: str, code: str) -> None:
    put(tmp_path / "set/images/a.png", encoded(photograph()))
    joints = ", ".join(["10, 20, 1"] * 18)
    put(tmp_path / "set/openpose/a.json", pose.replace("%s", joints))
    for _ in range(2):
        assert [code for _, code in found(checked(tmp_path / "set", "openpose"))] == [
            *([code] if code else []),
            "no caption",
        ]


# --- what is worth knowing ---


def test_notes(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 7)
    grey = np.repeat(photograph(1)[..., :1], 3, axis=2)
    put(folder / "images/1.jpg", encoded(grey, "JPEG", quality=90))
    put(folder / "images/2.jpg", (folder / "images/0.jpg").read_bytes())
    put(folder / "images/3.jpg", encoded(photograph(3, width=40, height=30), "JPEG"))
    put(folder / "images/4.jpg", encoded(photograph(4), "PNG"))
    put(folder / "canny/4.png", images.encode_png(edges(photograph(4, width=256, height=192))))
    put(folder / "images/6.jpg", (folder / "images/5.jpg").read_bytes())
    put(folder / "canny/6.png", (folder / "canny/5.png").read_bytes())
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    rows[0] = rows[0].replace('"x"', "null")
    put(folder / "metadata.jsonl", "\n".join(rows))
    check = checked(folder)
    assert check.usable == list(range(7))
    assert found(check, "note") == [
        (0, "no caption"),
        (1, "grey"),
        (2, "duplicate"),
        (3, "tiny"),
        (3, "size"),
        (4, "size"),
        (6, "duplicate"),
    ]
    messages = {finding.index: finding.message for finding in check.findings}
    assert messages[2] == "images/2.jpg is the same picture as images/0.jpg"
    assert messages[6] == "images/6.jpg is the same pair as images/5.jpg"
    small = checked(folder, settings={"resolution": 24, "caption": "a picture"})
    assert found(small, "note") == [(1, "grey"), (2, "duplicate"), (3, "size"), (4, "size"), (6, "duplicate")]
    large = checked(folder, settings={"resolution": 104})
    assert [index for index, code in found(large) if code == "tiny"] == list(range(7))


def test_pictures_of_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    (tmp_path / "phone").mkdir()
    for place, name in (("set", "a.heic"), ("set", "b.HEIC"), ("set", "c.jxl"), ("phone", "d.heic")):
        (tmp_path / place / name).touch()
    said: list[str] = []
    data = DataRecipe(source=str(folder), format="paired")
    open_examples(data, kind="canny", report=said.append)
    left = [line for line in said if "left out" in line]
    assert left == [
        "left out, for that format is not read: 2 of .heic",
        "left out, for that format is not read: 1 of .jxl",
    ]
    with pytest.raises(ValueError, match=r"holds no data set; left out, .*: 1 of \.heic; wanted"):
        open_examples(DataRecipe(source=str(tmp_path / "phone")))


def test_grey_pngs_show_in_a_thorough_look(tmp_path: Path) -> None:
    grey = np.repeat(photograph()[..., :1], 3, axis=2)
    put(tmp_path / "set/images/a.png", encoded(grey))
    put(tmp_path / "set/images/b.png", encoded(grey[..., 0].copy()[:, :64]))
    assert [code for _, code in found(checked(tmp_path / "set"))] == ["no caption"] * 2  # and is remembered
    check = checked(tmp_path / "set", lint=True)
    assert [code for _, code in found(check)] == ["grey", "no caption"] * 2


def test_what_is_wrong_with_maps(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 3)
    put(folder / "canny/1.png", images.encode_png(255 - edges(photograph(1))))
    for _ in range(2):  # the second time from memory
        check = checked(folder, lint=True)
        assert found(check) == [(1, "inverted")]
        assert check.findings[0].severity == "warning"
        assert str(folder / "canny/1.png") in check.findings[0].message
        assert check.usable == [0, 1, 2]
        assert checked(folder).findings == []
    assert found(checked(folder, kind="", lint=True)) == [(1, "inverted")]
    assert (
        checked(folder, kind="mine", lint=True, settings={"map_column": ("canny_file_name",)}).findings == []
    )


def test_maps_that_are_made_need_no_look(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 2)
    put(folder / "canny/1.png", b"")
    assert checked(folder, settings={"maps": "made"}).findings == []


def test_arrays_and_shards(tmp_path: Path) -> None:
    data = DataRecipe(source=str(tmp_path))
    good = Example("a", ArrayPiece(photograph()), "x", (ArrayPiece(np.zeros((96, 128), np.uint16)),))
    stack = Example("b", ArrayPiece(photograph(1)), "x", (ArrayPiece(np.zeros((96, 128, 5), np.float32)),))
    wrong = Example("c", ArrayPiece(np.zeros(7, np.uint8), "this"), "x", (ArrayPiece(np.zeros(5)),))
    for lint in (False, True):
        check = check_examples([good, stack, wrong], data=data, kind="canny", lint=lint)
        assert found(check) == [(2, "broken"), (2, "broken")]
        assert check.sizes == [(128, 96), (128, 96), None]
        assert check.findings[0].message.startswith("this has the shape (7,)")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in {"1.jpg": GOOD_JPEG, "1.map.png": b"text", "2.jpg": b"", "1.txt": b"x"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    shards = checked(tmp_path / "a.tar")
    assert found(shards) == [(0, "broken"), (1, "broken"), (1, "refused"), (1, "no caption")]


# --- memory and speed ---


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read from now on."""
    done: list[Path] = []
    read = FilePiece.read

    def noted(self: FilePiece) -> bytes:
        done.append(self.path)
        return read(self)

    monkeypatch.setattr(FilePiece, "read", noted)
    return done


def test_unchanged_files_are_not_read_again(tmp_path: Path, reads: list[Path]) -> None:
    folder = make_set(tmp_path / "set", 5)
    put(folder / "images/3.jpg", b"text")
    first = checked(folder)
    assert len(reads) == 10
    reads.clear()
    second = checked(folder)
    assert reads == [folder / "images/3.jpg"]  # what could not be read may have been repaired
    assert (first.sizes, first.digests, first.findings) == (second.sizes, second.digests, second.findings)
    reads.clear()
    put(folder / "canny/1.png", b"")
    assert found(checked(folder)) == [(1, "broken"), (3, "broken")]
    assert set(reads) == {folder / "images/3.jpg", folder / "canny/1.png"}
    reads.clear()
    checked(folder, remember=False)
    assert len(reads) == 10


def test_a_changed_file_of_the_same_size_and_date_is_read_again(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 2)
    path = folder / "images/1.jpg"
    assert checked(folder).findings == []
    status = path.stat()
    put(path, b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert found(checked(folder)) == [(1, "broken")]


def test_a_link_that_leads_out_is_not_taken_from_memory(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 2)
    assert checked(folder).findings == []
    os.rename(folder / "images", tmp_path / "images")
    os.symlink("../images", folder / "images")
    assert found(checked(folder), "error") == [(0, "refused"), (1, "refused")]


def test_a_quick_look_does_not_stand_for_a_thorough_one(tmp_path: Path, reads: list[Path]) -> None:
    folder = make_set(tmp_path / "set", 3)
    put(folder / "canny/1.png", images.encode_png(255 - edges(photograph(1))))
    assert checked(folder).findings == []
    assert found(checked(folder, lint=True)) == [(1, "inverted")]
    reads.clear()
    assert found(checked(folder, lint=True)) == [(1, "inverted")]
    assert reads == []
    other = make_set(tmp_path / "other", 3)
    checked(other, lint=True)
    reads.clear()
    checked(other)
    assert reads == []


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 0}', b"[]", b'{"version": 1, "files": 3}'])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, cache: Path, content: bytes) -> None:
    folder = make_set(tmp_path / "set", 2)
    checked(folder)
    (memory,) = (cache / "checks").iterdir()
    memory.write_bytes(content)
    assert checked(folder).usable == [0, 1]


def test_a_memory_that_cannot_be_kept_is_said_and_harmless(tmp_path: Path, cache: Path) -> None:
    folder = make_set(tmp_path / "set", 2)
    put(cache / "checks", "a file where a folder is wanted")
    said: list[str] = []
    assert checked(folder, report=said.append).usable == [0, 1]
    assert len(said) == 1
    assert said[0].startswith("what the check found is not kept: cannot make the folder")


def test_findings_stand_in_the_order_of_the_examples(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 40)
    for number in range(0, 40, 3):
        put(folder / f"images/{number}.jpg", b"")
    check = checked(folder)
    assert [index for index, _ in found(check)] == list(range(0, 40, 3))
    assert check.usable == [number for number in range(40) if number % 3]


def test_a_look_holds_few_pictures_at_once(tmp_path: Path) -> None:
    """However many pairs there are, only some are ahead of the one that is reported."""
    started, seen = [], []

    class Counted(Piece):
        name = "counted"

        def read(self) -> bytes:
            started.append(threading.get_ident())
            return GOOD_JPEG

    def progress(done: int, total: int) -> None:
        seen.append(len(started) - done)

    data = DataRecipe(source="x")
    examples = [Example(str(n), Counted(), "x") for n in range(400)]
    check = check_examples(examples, data=data, kind="canny", progress=progress, remember=False)
    assert len(check.usable) == 400
    assert max(seen) <= 4 * 32 + 1
    assert max(seen) <= 4 * check_module._cores() + 1


def test_an_interrupted_look_keeps_what_it_found(tmp_path: Path, reads: list[Path]) -> None:
    folder = make_set(tmp_path / "set", 40)

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(folder, progress=stop)
    reads.clear()
    assert len(checked(folder).usable) == 40
    assert len(reads) <= 40  # of 80


def test_a_png_by_its_check_sums_is_as_large_as_when_it_is_decoded() -> None:
    for array in (photograph(), photograph()[..., 0], np.zeros((5, 7), np.uint16), photograph()[:1, :1]):
        piece = BytesPiece(encoded(np.ascontiguousarray(array)), "x.png")
        quick, thorough = (look_at_picture(piece, thorough=thorough) for thorough in (False, True))
        assert (quick.width, quick.height, quick.digest) == (thorough.width, thorough.height, thorough.digest)
        assert look_at_map(piece, canvas=None, kind=None).width == quick.width


def test_a_png_is_unpacked_in_parts_and_may_have_several() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8)
    for array in (noise, noise[..., 0], noise[..., :2].copy().view(np.uint16)[..., 0]):
        assert check_facts._whole_png(encoded(np.ascontiguousarray(array))) == (401, 300)
    bits, palette = Image.fromarray(noise[..., 0]).convert("1"), Image.fromarray(noise).convert("P")
    for image in (bits, palette, Image.fromarray(noise).convert("RGBA"), bits.convert("LA")):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert check_facts._whole_png(file.getvalue()) == (401, 300)
    assert check_facts._whole_png(bomb(128, 96, ROWS)) == (128, 96)


XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["xmp", "raw profile"])
def test_a_png_turned_by_its_texts_has_the_size_that_visits_see(
    tmp_path: Path, how: str, packed: bool
) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    content = turned.tobytes()
    profile = f"\nexif\n{len(content):8d}\n{content.hex()}\n"
    texts = PngImagePlugin.PngInfo()
    if how == "xmp":
        texts.add_itxt("XML:com.adobe.xmp", XMP, zip=packed)
    else:
        texts.add_text("Raw profile type exif", profile, zip=packed)
    texts.add_text("prompt", "a cat")
    file = io.BytesIO()
    Image.fromarray(photograph()).save(file, "PNG", pnginfo=texts)
    put(tmp_path / "a.png", file.getvalue())
    check = checked(tmp_path)
    seen = images.load_picture(file.getvalue())
    assert check.sizes == [(96, 128)] == [(seen.shape[1], seen.shape[0])]


# --- what visits would refuse ---


def drawn_poses(folder: Path) -> Path:
    """Drawings of poses: two of bodies alone, one with a hand, one as a JPEG, one in another style."""
    joints = np.array([[10 + 5 * n, 8 + 4 * n, 1] for n in range(18)], float)[None]
    hand = np.zeros((1, 2, 21, 3))
    hand[0, 1] = [[60 + 2 * (n % 5), 10 + 3 * (n // 5), 1] for n in range(21)]
    body = preprocessors.Poses(joints, width=128, height=96)
    drawings = {
        "a.png": images.encode_png(preprocessors.poses_to_map(body).image),
        "b.png": images.encode_png(preprocessors.poses_to_map(replace(body, hands=hand)).image),
        "c.jpg": encoded(preprocessors.poses_to_map(body).image, "JPEG"),
        "d.png": images.encode_png(preprocessors.poses_to_map(body, style="v1.0").image),
        "e.png": images.encode_png(preprocessors.poses_to_map(body).image),
    }
    for number, (name, content) in enumerate(drawings.items()):
        put(folder / f"images/{Path(name).stem}.jpg", encoded(photograph(number), "JPEG"))
        put(folder / f"images/{Path(name).stem}.txt", "x")
        put(folder / f"openpose/{name}", content)
    return folder


@pytest.mark.parametrize("kind", ["openpose", ""])
@pytest.mark.parametrize("lint", [False, True])
def test_drawings_that_cannot_be_mirrored_are_named(tmp_path: Path, kind: str, lint: bool) -> None:
    folder = drawn_poses(tmp_path / "set")
    settings = {"flip": 0.5}
    assert found(checked(folder, kind, lint=lint), "error") == []
    for _ in range(2):  # the second time from memory
        check = checked(folder, kind, settings=settings, lint=lint)
        assert found(check, "error") == [(1, "unfit"), (2, "unfit"), (3, "unfit")]
        assert check.usable == [0, 4]
        assert "openpose/b.png cannot be mirrored" in check.errors[0].message
        assert "data.flip=0" in check.errors[0].message
        assert found(checked(folder, kind, lint=lint), "error") == []
        assert found(checked(folder, "canny", settings=settings | {"map_column": "openpose"}), "error") == []


def test_a_training_refuses_such_drawings_before_its_first_step(tmp_path: Path) -> None:
    folder = drawn_poses(tmp_path / "set")
    table = {"task": "controlnet", "map": "openpose", "out": "-", "steps": 100, "batch_size": 1}
    table |= {"learning_rate": 1e-4, "data": {"source": str(folder), "holdout": 0, "flip": 0.5}}
    with pytest.raises(ValueError, match=r"3 of 5 pairs cannot.*b\.png.*c\.jpg.*d\.png.*data.bad=skip"):
        load_pairs(adapters(table), report=lambda _: None)
    table["data"] |= {"bad": "skip"}
    assert load_pairs(adapters(table), report=lambda _: None).trained == [0, 4]


def test_pairs_cannot_be_left_out_without_a_look_at_them(tmp_path: Path) -> None:
    """Nor can a run that leaves some out go on without: it would be of other pairs."""
    table = {"task": "controlnet", "map": "canny", "out": "-", "steps": 100, "batch_size": 1}
    table |= {"learning_rate": 1e-4}
    data = {"source": str(tmp_path), "bad": "skip", "check": False}
    with pytest.raises(ValueError, match=r"data\.check=false looks for nothing: leave data\.check=true"):
        adapters(table | {"data": data})
    for more in ({"streaming": True}, {"bad": "stop"}):
        assert not adapters(table | {"data": data | more}).data.check


def adapters(table: dict[str, Any]) -> ControlNetRecipe:
    recipe = parse_recipe(table, where="here")
    assert isinstance(recipe, ControlNetRecipe)
    return recipe


def test_coloured_maps_that_must_be_grey_are_named(tmp_path: Path) -> None:
    folder = drawn_poses(tmp_path / "set")
    grey = encoded(photograph()[..., 0].copy())
    put(folder / "openpose/e.png", grey)
    (folder / "openpose/d.png").unlink()
    put(folder / "openpose/d.json", json.dumps({"people": [{"pose_keypoints_2d": [9, 9, 1] * 18}]}))
    check = checked(folder, "openpose", settings={"map_mode": "grey", "flip": 0.5})
    assert found(check, "error") == [(n, "unfit") for n in range(4)]
    assert "a.png is coloured, and data.map_mode is grey" in check.errors[0].message
    assert "d.json is a pose, which is drawn in colours" in check.errors[3].message


def test_depth_in_files_of_numbers(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", 2)
    depth = np.linspace(0, 1, 96 * 128, dtype=np.float32).reshape(96, 128)
    for number, array in enumerate((depth, depth[:, :64])):
        (folder / "depth").mkdir(exist_ok=True)
        np.save(folder / f"depth/{number}.npy", array)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"depth": f"depth/{number}.npy"} for number, row in enumerate(rows)]
    put(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    for lint in (False, True):
        assert found(checked(folder, "depth", lint=lint)) == [(1, "aspect")]
    assert found(checked(folder, "seg", settings={"map_column": "depth"}))[0] == (0, "broken")


# --- files that are in no pair ---


def unpaired(check: Check) -> list[tuple[str, str]]:
    return [(f.code, f.name) for f in check.findings if f.index is None]


def test_maps_of_no_picture(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("a", "below/b", "below/ü c"):
        put(root / f"{name}.png", encoded(photograph()))
        put(root / f"{name}.txt", name)
    for name in ("a", "b", "below/ü c", "gone", "below/a", "gone too"):
        put(root / f"conditioning/{name}.png", encoded(edges(photograph())))
    put(root / "conditioning/notes.txt", "no map")
    check = checked(root)
    names = ["conditioning/below/a.png", "conditioning/gone too.png", "conditioning/gone.png"]
    assert unpaired(check) == [("unpaired map", name) for name in names]
    assert check.usable == [0, 1, 2]
    assert check.counts["unpaired map"] == 3
    assert "maps       3 of 3, and 3 in no pair" in check.table()
    assert "  conditioning/gone.png is the map of no picture" in check.table()
    assert check.about_unpaired() == "in no pair: 3 maps, such as conditioning/below/a.png"
    limited = checked(root, settings={"limit": 1})
    assert (len(limited.sizes), unpaired(limited)) == (1, unpaired(check))  # what limit leaves out has a pair
    assert unpaired(checked(root, settings={"maps": "made"})) == []


def test_files_that_no_row_names(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", 2)
    assert unpaired(checked(root)) == []
    put(root / "images/new.jpg", GOOD_JPEG)
    put(root / "top.png", GOOD_PNG)
    put(root / "canny/9.png", GOOD_PNG)
    put(root / "depth/0.png", GOOD_PNG)
    put(root / "sheet.png", GOOD_PNG)  # of controlkit preprocess --sheet
    put(root / "readme.json", "{}")
    put(root / ".hidden/x.png", GOOD_PNG)
    put(root / "test/metadata.jsonl", '{"file_name": "y.png"}')  # a data set of its own
    put(root / "test/y.png", GOOD_PNG)
    check = checked(root)
    assert unpaired(check) == [
        ("unpaired map", "canny/9.png"),
        ("unpaired map", "depth/0.png"),
        ("unpaired picture", "images/new.jpg"),
        ("unpaired picture", "top.png"),
    ]
    assert check.about_unpaired() == "in no pair: 2 maps and 2 pictures, such as canny/9.png"
    assert "pictures   all 128 x 96, and 2 in no pair" in check.table()
    assert "  images/new.jpg is named by no row of metadata.jsonl" in check.table()


def test_files_of_other_columns_are_named(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", 1)
    joints = json.dumps({"people": [{"pose_keypoints_2d": [9, 9, 1] * 18}]})
    for name in ("openpose/0.json", "openpose/1.json"):
        put(root / name, joints)
    row = json.loads((root / "metadata.jsonl").read_text())
    row |= {"openpose_json": "./openpose\\\\0.json", "file_name": ".\\images/0.jpg"}
    put(root / "metadata.jsonl", json.dumps(row))
    assert unpaired(checked(root)) == [("unpaired map", "openpose/1.json")]


def test_a_folder_that_cannot_be_listed_is_said(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", 1)
    os.symlink(tmp_path, root / "elsewhere")
    check = checked(root)
    assert [f.code for f in check.findings] == ["unread folder"]
    assert "leads out of the data set" in check.findings[0].message
    assert check.usable == [0]


def test_the_training_says_it_in_one_line(tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", 9)
    put(root / "canny/x.png", GOOD_PNG)
    lines: list[str] = []
    table = {"task": "controlnet", "map": "canny", "out": "-", "steps": 100, "batch_size": 1}
    table |= {"learning_rate": 1e-4, "data": {"source": str(root), "holdout": 2}}
    load_pairs(adapters(table), report=lines.append)
    assert lines[1:] == ["in no pair: 1 map, such as canny/x.png (controlkit data check names them)"]


@pytest.mark.parametrize(
    ("pairs", "wanted", "held", "said"),
    [
        (32, 8, 8, ""),
        (20, 8, 5, "5 of 20 pairs are held out, not 8: a quarter at most"),
        (8, 8, 2, "2 of 8 pairs are held out, not 8: a quarter at most"),
        (7, 8, 0, "7 pairs are too few to hold some out: what is shown is trained on"),
        (4, 1, 1, ""),
        (3, 1, 0, "3 pairs are too few to hold some out: what is shown is trained on"),
        (20, 0, 0, ""),
    ],
)
def test_of_few_pairs_a_quarter_is_held_out(tmp_path: Path, pairs, wanted, held, said) -> None:
    root, lines = make_set(tmp_path / "set", pairs), []
    table = {"task": "controlnet", "map": "canny", "out": "-", "steps": 100, "batch_size": 1}
    table |= {"learning_rate": 1e-4, "data": {"source": str(root), "holdout": wanted, "check": False}}
    found = load_pairs(adapters(table), report=lines.append)
    assert len(found.held_out) == held
    assert len(found.trained) == pairs - held
    assert found.shown == found.held_out if held else len(found.shown) == min(4, pairs)
    assert lines[1:] == ([said] if said else [])


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("same", "held", "apart"), [(2, 4, 4), (4, 2, 6), (20, 0, 0)])
def test_no_picture_is_held_out_and_trained_on_in_another_pair(tmp_path, same, held, apart, check) -> None:
    root, lines = make_set(tmp_path / "set", 32), []
    pictures = [root / f"images/{number}.jpg" for number in range(32)]
    for number, picture in enumerate(pictures):  # as with several captions of one picture
        picture.write_bytes(pictures[number - number % same].read_bytes())
    table = {"task": "controlnet", "map": "canny", "out": "-", "steps": 100, "batch_size": 1}
    table |= {"learning_rate": 1e-4, "data": {"source": str(root), "holdout": 8, "check": check}}
    found = load_pairs(adapters(table), report=lines.append)
    shown = {pictures[index].read_bytes() for index in found.held_out}
    assert len(shown) == len(found.held_out) == held
    assert shown.isdisjoint(pictures[index].read_bytes() for index in found.trained)
    assert len(found.trained) == 32 - held - apart
    if not held:
        assert len({pictures[index].read_bytes() for index in found.shown}) == len(found.shown) == 2
    said = f"{apart} more pairs, which show the pictures of those that are held out, are not trained on"
    assert (said in lines) == bool(held), lines


# --- the command ---


@pytest.fixture
def run() -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


def test_the_command(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    folder = make_set(tmp_path / "set", 20)
    sheet, report = tmp_path / "sheet.png", tmp_path / "found.json"
    code, out, err = run(folder, "--map", "canny", "--sheet", sheet, "--json", report, "limit=18")
    assert code == 0, out + err
    assert "pairs      18, of which 18 can be used" in out
    assert "pictures   all 128 x 96" in out
    assert "captions   18 of 18" in out
    assert "all can be used" in out
    assert f"wrote {sheet}" in out
    assert images.load_picture(sheet).shape[1] > 6 * 256
    assert json.loads(report.read_text())["usable"] == 18
    for number in range(12):
        put(folder / f"canny/{number}.png", b"<html>")
    code, out, err = run(folder, "--map", "canny", "--json", report)
    assert code == 1
    assert "error: broken, 12" in out
    assert f"{folder}/canny/4.png is not a picture but an HTML page" in out
    assert "canny/5.png" not in out
    assert "and 7 more" in out
    assert "looked at 20 pairs" in out
    assert [f["index"] for f in json.loads(report.read_text())["findings"]] == list(range(12))


def test_the_command_shows_poses_and_pictures_without_maps(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    put(tmp_path / "set/images/a.png", encoded(photograph()))
    joints = [number for n in range(18) for number in (5 * n + 10, 4 * n + 5, 1)]
    pose = {"people": [{"pose_keypoints_2d": joints}]}
    put(tmp_path / "set/openpose/a.json", json.dumps(pose))
    sheet = tmp_path / "sheet.png"
    assert run(tmp_path / "set", "--map", "openpose", "--sheet", sheet)[0] == 0
    with_pose = images.load_picture(sheet)
    assert run(tmp_path / "set", "--map", "openpose", "--sheet", sheet, "maps=made")[0] == 0
    assert images.load_picture(sheet).shape[1] < with_pose.shape[1]


def test_warnings_do_not_change_the_exit_code(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    folder = make_set(tmp_path / "set", 2)
    put(folder / "canny/1.png", images.encode_png(255 - edges(photograph(1))))
    code, out, _ = run(folder, "--map", "canny")
    assert code == 0
    assert "warning: inverted, 1" in out
    code, out, _ = run(folder, "--map", "canny", "--no-lint")
    assert "inverted" not in out
    put(folder / "canny/x.png", GOOD_PNG)
    code, out, _ = run(folder, "--map", "canny", "--no-lint")
    assert code == 0
    assert "warning: unpaired map, 1\n  canny/x.png is named by no row of metadata.jsonl" in out


def test_numbers_are_depth_alone(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    put(tmp_path / "set/images/a.png", GOOD_PNG)
    (tmp_path / "set/maps").mkdir()
    np.save(tmp_path / "set/maps/a.npy", photograph()[..., 0].astype(np.float32))
    assert run(tmp_path / "set", "--map", "depth", "--sheet", tmp_path / "sheet.png")[0] == 0
    for kind in ([], ["--map", "canny"]):
        code, out, _ = run(tmp_path / "set", *kind)
        assert code == 1
        assert "maps/a.npy holds numbers (npy, npz, pfm, EXR), which are read where the map is depth" in out


def test_maps_whose_kind_cannot_be_told_are_said(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "set"
    put(folder / "images/1.png", GOOD_PNG)
    put(folder / "maps/1.png", encoded(photograph(1)))
    for _ in range(2):  # the second time from memory
        code, out, _ = run(folder)
        assert code == 0
        assert f"note: unknown kind, 1\n  {folder}/maps/1.png: its kind cannot be told, so only" in out
        assert "cure: say what the maps are with --map KIND" in out
    assert "unknown kind" not in run(folder, "--map", "canny")[1]
    (folder / "maps").rename(folder / "canny")  # which says it
    assert "warning: photo, 1" in run(folder)[1]


def test_pictures_without_a_map_are_told_what_to_do(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    put(tmp_path / "set/a.png", GOOD_PNG)
    (tmp_path / "set/conditioning").mkdir()
    code, out, _ = run(tmp_path / "set", "--map", "canny")
    assert code == 1
    assert "error: no map, 1" in out
    assert "conditioning has no map for a.png: a file a.png, .jpg ... is wanted" in out
    assert "cure: bring the maps, take the pictures out, or have maps made" in out
    assert out.rstrip().endswith("none of them can be used")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["no/such/folder/here"], "no/such/folder/here does not exist"),
        (["world"], "the bundled world is drawn"),
        (["set", "limt=3"], "unknown key 'limt' in [data] (did you mean 'limit'?)"),
        (["set", "resolution=17"], "data.resolution: "),
        (["set", "map_column=nope"], "has no column 'nope'"),
        (["set", "--sheet", "a.jpg"], "must end in .png"),
        (["set", "--json", "no/such/a.json"], "cannot write no/such/a.json"),
        (["empty"], "empty holds no data set"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
    arguments: list[str],
    problem: str,
) -> None:
    make_set(tmp_path / "set", 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert problem in err
    assert err.count("\n") == 1


def test_keys_are_taken_as_a_training_has_them(tmp_path: Path) -> None:
    for given in ({"bad": "skip"}, {"data.bad": "skip"}):
        assert recipe_of(str(tmp_path), "canny", given, where="data check").bad == "skip"
    with pytest.raises(ValueError, match="unknown key 'bat'"):
        recipe_of(str(tmp_path), "canny", {"data.bat": "skip"}, where="data check")
