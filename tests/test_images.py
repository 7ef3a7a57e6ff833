"""Pictures in and out: every format has one defined result, and every bad file one plain line."""

import io
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.morphology
import torch
from PIL import Image, PngImagePlugin

from controlkit import images, png

GRADIENT = np.stack(np.meshgrid(np.arange(0, 240, 5), np.arange(0, 128, 4)), axis=-1)
PICTURE = np.dstack([GRADIENT, np.full(GRADIENT.shape[:2], 77)]).astype(np.uint8)  # 32 x 48


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file that announces a size."""
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + data
    checksum = struct.pack(">I", zlib.crc32(chunk))
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + checksum + struct.pack(">I4s", 1000, b"IDAT")
    )


# --- loading ---


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    image.save(tmp_path / "a b ü#.png")
    sources = [
        tmp_path / "a b ü#.png",
        str(tmp_path / "a b ü#.png"),
        encoded(image),
        image,
        PICTURE,
        PICTURE / np.float32(255),
        PICTURE.astype(np.float64) / 255,
        PICTURE.astype(np.uint16) * 257,
        torch.from_numpy(PICTURE).permute(2, 0, 1),
        torch.from_numpy(PICTURE).permute(2, 0, 1).float() / 255,
        (torch.from_numpy(PICTURE).permute(2, 0, 1).double() / 255).requires_grad_(),
    ]
    for source in sources:
        loaded = images.load_picture(source)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, PICTURE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    # What a camera stores for an upright picture, by the EXIF 2.3 table of orientations.
    stored = {
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.transpose(1, 0, 2),
        6: PICTURE.transpose(1, 0, 2)[::-1],
        7: PICTURE.transpose(1, 0, 2)[::-1, ::-1],
        8: PICTURE.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    np.testing.assert_array_equal(images.load_picture(data), PICTURE)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for image, kind in ((Image.fromarray(values), "PNG"), (Image.fromarray(values), "TIFF")):
        loaded = images.load_picture(encoded(image, kind))
        np.testing.assert_array_equal(loaded[..., 0].ravel(), np.arange(256))
        assert loaded.shape == (16, 16, 3)
    pgm = b"P5 2 1 65535\n" + struct.pack(">HH", 0, 65535)
    np.testing.assert_array_equal(images.load_picture(pgm)[0, :, 0], [0, 255])


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 10, 0, 255], [200, 10, 0, 0], [0, 0, 0, 127]]
    expected = [[200, 10, 0], [255, 255, 255], [128, 128, 128]]
    np.testing.assert_array_equal(images.load_picture(rgba)[0], expected)
    np.testing.assert_array_equal(images.load_picture(encoded(Image.fromarray(rgba)))[0], expected)
    np.testing.assert_array_equal(images.load_picture(Image.fromarray(rgba))[0], expected)
    np.testing.assert_array_equal(
        images.load_picture(torch.from_numpy(rgba).permute(2, 0, 1).float() / 255)[0], expected
    )


def test_maps_are_on_black() -> None:
    """Lines on a transparent layer, whatever colour the transparent pixels have."""
    drawn = np.zeros((4, 4, 4), np.uint8)
    drawn[1] = 255
    hidden = drawn.copy()
    hidden[..., :3] = 255
    for source in (drawn, Image.fromarray(drawn), encoded(Image.fromarray(hidden)), hidden):
        levels = images.load_map(source)
        assert np.array_equal(
            levels[..., 0], np.where(np.arange(4)[:, None] == 1, 255, 0) + 0 * levels[..., 0]
        )
    assert images.load_picture(hidden).min() == 255
    half = np.full((1, 1, 4), 128, np.uint8)
    assert images.load_map(half).tolist() == [[[64, 64, 64]]]
    assert images.load_picture(half).tolist() == [[[191, 191, 191]]]
    assert np.array_equal(images.load_pictures([drawn], behind=0)[0][0], images.load_map(drawn))


def test_every_mode_has_a_defined_result() -> None:
    base = Image.new("RGB", (2, 1))
    base.putpixel((0, 0), (255, 0, 0))
    base.putpixel((1, 0), (255, 255, 255))
    red_white = [[255, 0, 0], [255, 255, 255]]
    palette = base.quantize(2)
    transparent = palette.copy()
    transparent.info["transparency"] = int(np.asarray(palette)[0, 0])  # red becomes transparent
    cases: list[tuple[Image.Image | bytes, list[list[int]]]] = [
        (base.convert("CMYK"), red_white),
        (encoded(base.convert("CMYK"), "TIFF"), red_white),
        (palette, red_white),
        (encoded(transparent), [[255, 255, 255], [255, 255, 255]]),
        (base.convert("1", dither=Image.Dither.NONE), [[0, 0, 0], [255, 255, 255]]),
        (base.convert("L"), [[76, 76, 76], [255, 255, 255]]),
        (base.convert("LA"), [[76, 76, 76], [255, 255, 255]]),
        (base.convert("HSV"), red_white),
        (base.convert("RGBa"), red_white),
        (encoded(base, "GIF"), red_white),
        (encoded(base, "BMP"), red_white),
        (encoded(base, "WEBP", lossless=True), red_white),
        (encoded(base, "PPM"), red_white),
        (Image.fromarray(np.array([[0.0, 0.5]], np.float32)), [[0, 0, 0], [128, 128, 128]]),
    ]
    for source, expected in cases:
        np.testing.assert_array_equal(images.load_picture(source)[0], expected)


def test_lossy_formats_are_close() -> None:
    for kind in ("JPEG", "WEBP", "AVIF"):
        loaded = images.load_picture(encoded(Image.fromarray(PICTURE), kind, quality=95))
        assert loaded.shape == PICTURE.shape
        assert np.abs(loaded.astype(int) - PICTURE).mean() < 3


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0],
            kind,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if kind == "WEBP" else {}),
        )
        assert (images.load_picture(data) == [255, 0, 0]).all()


def test_grey_arrays_become_rgb() -> None:
    for array in (PICTURE[..., 0], PICTURE[..., :1]):
        np.testing.assert_array_equal(images.load_picture(array), PICTURE[..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(images.load_picture(np.array([[True, False]]))[0, :, 1], [255, 0])


def test_files_that_are_no_pictures_are_refused_in_one_line(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole, jpeg = encoded(noise), encoded(noise, "JPEG")
    contents = {
        b"": "is empty$",
        b"II*\0" + bytes(40): "is a TIFF of a sort that is not read here, or damaged",
        b"just a text": "is not a picture of a format that is read here",
        b"<!DOCTYPE html><html>": "is not a picture but an HTML page",
        b'  <svg xmlns="x">': "is not a picture but an SVG drawing",
        b'\xef\xbb\xbf [\n {"people": []}]': "a JSON file .a pose is drawn first: `controlkit draw FILE`",
        b'{"people": []}': "is not a picture but a JSON file",
        b"[paths]": "is not a picture of a format that is read here",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "is a HEIC picture, .* convert it to JPEG",
        b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer",
        whole[: len(whole) // 2]: "is damaged or truncated",
        jpeg[: len(jpeg) // 2]: "is damaged or truncated",
    }
    for content, message in contents.items():
        path = tmp_path / "x.png"
        path.write_bytes(content)
        for source, name in ((path, str(path)), (str(path), str(path)), (content, "the data given")):
            with pytest.raises(ValueError, match=message) as caught:
                images.load_picture(source)
            assert str(caught.value).startswith(name)
            assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_no_damaged_byte_is_a_traceback() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for kind in ("AVIF", "PNG", "WEBP", "TIFF", "GIF"):
        whole = encoded(noise, kind)
        for at in range(0, min(len(whole), 400), 3):
            damaged = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
            with suppress(ValueError):  # a byte of a pixel may change without harm
                assert images.load_picture(damaged).ndim == 3


@pytest.mark.parametrize("read", [images.load_mask, images.stored_size, images.read_png_text])
def test_what_is_no_file_is_refused(read: Any) -> None:
    for given in (None, 5, ["a.png"]):
        with pytest.raises(ValueError, match="a picture's file is a path or bytes, not a"):
            read(given)
    with pytest.raises(ValueError, match=r"'a\\x00b' is no file's name"):
        read("a\0b")


def test_a_mask_may_be_a_pil_image() -> None:
    layer = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    layer.putpixel((1, 1), (255, 0, 0, 255))
    for mask in (layer, Image.fromarray(np.eye(4, dtype=np.uint8) * 255), Image.fromarray(PICTURE)):
        buffer = io.BytesIO()
        mask.save(buffer, "PNG")
        assert np.array_equal(images.load_mask(mask), images.load_mask(buffer.getvalue()))
        assert np.array_equal(images.mask_as_read(mask), images.load_mask(mask))
    assert images.mask_as_read(PICTURE) is PICTURE


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.png does not exist$"):
        images.load_picture(tmp_path / "no.png")
    with pytest.raises(ValueError, match=r"is a folder, not a picture$"):
        images.load_picture(tmp_path)
    with pytest.raises(ValueError, match=r"not int$"):
        images.load_picture(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "height"), [(12000, 9000), (20000, 20000), (100_000, 2000)])
def test_bombs_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="pixels"):
        images.load_picture(png_header(width, height))
    assert time.perf_counter() - start < 0.5


def test_the_limit_is_the_callers() -> None:
    data = encoded(Image.fromarray(PICTURE))
    images.load_picture(data, max_pixels=32 * 48)
    with pytest.raises(ValueError, match=r"has 48 x 32 pixels; at most 1,535 pixels are read"):
        images.load_picture(data, max_pixels=32 * 48 - 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 3), np.float32) - 1, r"from -1 to -1; they must lie in \[0, 1\]"),
        (np.full((2, 2), 200.0), "from 200 to 200"),
        (np.full((2, 2), np.nan), "from nan to nan"),
        (np.zeros((3, 512, 512), np.uint8), r"shape \(3, 512, 512\)"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (np.zeros((2, 2, 2), np.uint8), "shape"),
        (np.zeros((2, 2), np.int64), "type int64"),
        (torch.zeros(4, 4), "shape"),
        (torch.zeros(1, 3, 4, 4), "shape"),
        (Image.fromarray(np.full((2, 2), 300.0, np.float32)), "from 300 to 300"),
        (Image.fromarray(np.full((2, 2), -5, np.int32)), "outside 0 to 65535"),
        (Image.new("RGB", (0, 4)), "^the picture is empty: 0 x 4 pixels$"),
        (np.ma.masked_invalid(np.array([[0.5, np.nan]])), "from nan to nan"),
        (np.ma.masked_greater(np.array([[0.5, 300.0]]), 1), "from 0.5 to 300"),
    ],
)
def test_arrays_without_a_meaning_are_refused(array: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.load_picture(array)


# --- size ---


def test_resize_averages_down_and_interpolates_up() -> None:
    checker = np.indices((8, 8)).sum(axis=0) % 2 * 255
    half = images.resize(checker.astype(np.uint8), 4, 4)
    assert set(np.unique(half)) <= {127, 128}  # the mean, not a sample
    ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (4, 1))
    doubled = images.resize(ramp, 32, 8)
    assert doubled.shape == (8, 32)
    assert (np.diff(doubled[0].astype(int)) >= 0).all()
    assert len(np.unique(doubled)) > 16  # new levels in between
    squeezed = images.resize(np.repeat(checker, 2, axis=0).astype(np.uint8)[:4], 4, 16)  # one axis each way
    assert squeezed.shape == (16, 4)
    assert set(np.unique(squeezed)) <= {127, 128}
    assert images.resize(PICTURE, 48, 32) is PICTURE


@pytest.mark.parametrize("size", [(7, 5), (128, 128), (31, 200), (1, 1)])
def test_nearest_makes_no_new_colours(size: tuple[int, int]) -> None:
    edges = (np.indices((64, 48)).sum(axis=0) % 7 == 0).astype(np.uint8)[..., None].repeat(3, axis=2) * 255
    resized = images.resize(edges, *size, nearest=True)
    assert resized.shape == (size[1], size[0], 3)
    assert set(np.unique(resized)) <= {0, 255}


def test_nearest_takes_the_centre() -> None:
    row = np.arange(9, dtype=np.uint8)[None]
    np.testing.assert_array_equal(images.resize(row, 3, 1, nearest=True), [[1, 4, 7]])
    np.testing.assert_array_equal(images.resize(row[:, :2], 4, 1, nearest=True), [[0, 0, 1, 1]])


def test_cover_cuts_the_centre_and_keeps_the_aspect() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (images.cover(wide, 10, 10) == 255).all()
    assert (images.cover(wide.transpose(1, 0, 2), 40, 40) == 255).all()
    assert images.cover(wide, 64, 8).shape == (8, 64, 3)
    # A picture and its map get the same cut: mark one pixel in both and find it again.
    picture, mask = np.zeros((90, 200, 3), np.uint8), np.zeros((90, 200, 3), np.uint8)
    picture[30:50, 100:120] = mask[30:50, 100:120] = 255
    smooth, hard = images.cover(picture, 128, 128), images.cover(mask, 128, 128, nearest=True)
    assert ((smooth > 127) != (hard > 127)).mean() < 0.005


def test_cover_of_a_strip_needs_no_huge_picture() -> None:
    strip = np.zeros((2, 3000, 3), np.uint8)
    strip[:, 1499:1501] = 200
    assert (images.cover(strip, 512, 512) == 200).all()
    assert images.cover(np.zeros((1, 1, 3), np.uint8), 64, 32).shape == (32, 64, 3)


def test_sizes_below_one_are_refused() -> None:
    for function in (images.resize, images.cover):
        with pytest.raises(ValueError, match="at least 1"):
            function(PICTURE, 0, 5)
        for side in (5.5, "5", None, True):
            with pytest.raises(ValueError, match="whole and at least 1"):
                function(PICTURE, 5, side)
        assert function(PICTURE, np.int64(5), 5).shape == (5, 5, 3)
    with pytest.raises(ValueError, match="at least 1 pixel, not 0"):
        images.at_resolution(PICTURE, 0)


@pytest.mark.parametrize("nearest", [False, True])
def test_one_channel_stays_an_axis(nearest: bool) -> None:
    grey = PICTURE[..., :1]
    for width, height in ((3, 3), (30, 30), (3, 30)):
        resized = images.resize(grey, width, height, nearest=nearest)
        assert resized.shape == (height, width, 1)
        assert np.array_equal(resized[..., 0], images.resize(grey[..., 0], width, height, nearest=nearest))
    assert images.resize_lines(np.zeros((8, 8, 1), np.uint8), 5, 5).shape == (5, 5, 1)


@pytest.mark.parametrize(
    "image", [PICTURE > 3, PICTURE.astype(np.int64), PICTURE[:0], Image.fromarray(PICTURE), None]
)
def test_what_cannot_be_resized_is_refused(image: Any) -> None:
    with pytest.raises(ValueError, match=r"^an image (of|is)"):
        images.resize(image, 5, 5)


# --- tensors ---


def test_the_two_ranges_differ() -> None:
    levels = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    pixel_values, controlnet_cond = images.picture_to_tensor(levels), images.map_to_cond(levels)
    assert (pixel_values.min(), pixel_values.max()) == (-1, 1)
    assert (controlnet_cond.min(), controlnet_cond.max()) == (0, 1)
    for tensor in (pixel_values, controlnet_cond):
        assert tensor.shape == (1, 3, 1, 2)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()


def test_channels_stay_red_green_blue() -> None:
    red = np.zeros((2, 4, 3), np.uint8)
    red[..., 0] = 255
    assert images.map_to_cond([red, red])[:, 0].min() == 1
    assert images.map_to_cond([red, red])[:, 1:].max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_pictures_survive_the_way_there_and_back(dtype: torch.dtype) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    levels[0, ..., 1] = levels[0, ..., 1].T
    there = images.picture_to_tensor(levels).to(dtype)
    (back,) = images.tensor_to_pictures(there)
    np.testing.assert_array_equal(back, levels[0])


def test_values_are_clipped_and_rounded_half_to_even() -> None:
    values = torch.tensor([-7.0, 9.0, 0.0, 2 / 255]).reshape(1, 1, 1, 4).expand(1, 3, 1, 4)
    np.testing.assert_array_equal(images.tensor_to_pictures(values)[0][0, :, 0], [0, 255, 128, 128])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_an_error(bad: float) -> None:
    x = torch.zeros(1, 3, 2, 2)
    x[0, 1, 1, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        images.tensor_to_pictures(x)


def test_batches_need_one_size_and_type() -> None:
    small, large = np.zeros((2, 2, 3), np.uint8), np.zeros((4, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="one size, found: 2 x 2, 2 x 4"):
        images.picture_to_tensor([small, large])
    with pytest.raises(ValueError, match="no image"):
        images.map_to_cond([])
    with pytest.raises(ValueError, match="uint8"):
        images.map_to_cond(small / 255)
    for given, name in ((Image.fromarray(small), "an Image"), (None, "a NoneType"), (["a.png"], "a str")):
        with pytest.raises(ValueError, match=f"not {name}"):
            images.map_to_cond(given)
    for levels in (small / 255, small[..., 0], Image.fromarray(small)):
        with pytest.raises(ValueError, match="a map is uint8 or uint16"):
            images.maps_to_levels([levels])
    with pytest.raises(ValueError, match=r"\(N, 3, height, width\)"):
        images.tensor_to_pictures(torch.zeros(3, 2, 2))


def test_levels_of_8_and_16_bits_become_16_and_a_network_takes_the_same() -> None:
    shallow = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16, 1)
    levels = images.maps_to_levels([shallow, deep])
    assert levels.dtype == torch.uint16
    alone = [images.levels_to_cond(images.maps_to_levels([one])) for one in (shallow, deep)]
    assert torch.equal(images.levels_to_cond(levels), torch.cat(alone))
    assert images.maps_to_levels([shallow, shallow]).dtype == torch.uint8
    with pytest.raises(ValueError, match="must be alike, found: 16 x 16 x 1 uint8, 16 x 16 x 2 uint8"):
        images.maps_to_levels([shallow, np.zeros((16, 16, 2), np.uint8)])
    with pytest.raises(ValueError, match="must be alike"):
        images.maps_to_levels([shallow, np.zeros((16, 16, 1), np.float32)])


# --- PNG ---


def test_png_keeps_pixels_and_text(tmp_path: Path) -> None:
    text = {"parameters": "a cat\nSteps: 20, Seed: 7", "controlkit": '{"prompt": "ein Bär 熊"}', "empty": ""}
    images.write_png(tmp_path / "a.png", PICTURE, text=text)
    np.testing.assert_array_equal(images.load_picture(tmp_path / "a.png"), PICTURE)
    assert images.read_png_text(tmp_path / "a.png") == text
    assert list(images.read_png_text(tmp_path / "a.png")) == list(text)
    with Image.open(tmp_path / "a.png") as image:  # other programs find it before they decode anything
        assert image.info["parameters"] == text["parameters"]
    assert images.encode_png(PICTURE, text=text) == (tmp_path / "a.png").read_bytes()


def test_text_chunks_are_latin1_where_possible() -> None:
    data = images.encode_png(PICTURE, text={"a": "Bär", "b": "熊"})
    assert b"tEXta\0B\xe4r" in data
    assert b"iTXtb\0\0\0\0\0" + "熊".encode() in data


def test_text_of_others_is_read(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 5000, zip=True)
    info.add_itxt("note", "熊", lang="ja")
    Image.fromarray(PICTURE).save(tmp_path / "a.png", pnginfo=info)
    assert images.read_png_text(tmp_path / "a.png") == {"parameters": "x" * 5000, "note": "熊"}
    Image.fromarray(PICTURE).save(tmp_path / "b.png")
    assert images.read_png_text(tmp_path / "b.png") == {}


def test_text_is_not_read_from_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(PICTURE), "JPEG"))
    with pytest.raises(ValueError, match=r"a\.png is not a picture of a format that is read here \(PNG\)"):
        images.read_png_text(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(images.encode_png(PICTURE)[:-40])
    with pytest.raises(ValueError, match=r"b\.png is damaged"):
        images.read_png_text(tmp_path / "b.png")


@pytest.mark.parametrize("keyword", ["", "k" * 80, "熊", "a\0b"])
def test_keywords_that_png_forbids(keyword: str) -> None:
    with pytest.raises(ValueError, match="PNG keyword"):
        images.encode_png(PICTURE, text={keyword: "x"})


def test_only_pictures_are_encoded(tmp_path: Path) -> None:
    for image in (PICTURE / 255, PICTURE[..., 0], PICTURE[:0]):
        with pytest.raises(ValueError, match="uint8"):
            images.write_png(tmp_path / "a.png", image)
    for other, name in (
        (Image.fromarray(PICTURE), "an Image"),
        (PICTURE.tolist(), "a list"),
        (None, "a NoneType"),
    ):
        with pytest.raises(ValueError, match=rf"is uint8 \(height, width, 3\), not {name}"):
            images.write_png(tmp_path / "a.png", other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (513, 300)])
def test_runs_are_coded_without_loss(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*size, 3), np.uint8) * (rng.uniform(size=(*size, 1)) < 0.1)
    data = images.encode_png(picture.astype(np.uint8), text={"a": "ü – b"}, plain=True)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.mode == "RGB"
        assert image.info["a"] == "ü – b"
        np.testing.assert_array_equal(np.asarray(image), picture)
    lines = np.zeros((512, 512, 3), np.uint8)
    lines[::40] = 255
    assert len(images.encode_png(lines, plain=True)) < len(images.encode_png(lines))


def test_a_header_tells_the_size(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    assert images.stored_size(tmp_path / "a.jpg") == (30, 20)
    with pytest.raises(ValueError, match="has 30 x 20 pixels; at most 599 pixels are read"):
        images.stored_size(tmp_path / "a.jpg", max_pixels=599)
    (tmp_path / "b.jpg").write_text("<html>")
    with pytest.raises(ValueError, match="is not a picture but an HTML page"):
        images.stored_size(tmp_path / "b.jpg")


@pytest.mark.parametrize("place", ["JPEG", "PNG", "PNG, behind the pixels"])
def test_the_size_is_that_of_the_upright_picture(place: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, told = Image.new("RGB", (30, 20)), exif.tobytes()
    if place == "PNG, behind the pixels":
        end = encoded(picture)[-12:]
        chunk = b"eXIf" + told.removeprefix(b"Exif\0\0")
        late = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        data = encoded(picture)[:-12] + late + end
        broken = bytearray(data)
        broken[data.index(b"IDAT") + 6] ^= 0xFF
        with pytest.raises(ValueError, match="is damaged or truncated"):
            images.stored_size(bytes(broken))
    else:
        data = encoded(picture, place, exif=told)
    assert images.stored_size(data) == (20, 30)
    assert images.load_picture(data).shape == (30, 20, 3)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_the_size_of_a_turned_picture_is_that_of_its_pixels(format, options, orientation) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(file, format, exif=exif, **options)
    height, width, _ = images.load_picture(file.getvalue()).shape
    assert (width, height) == ((20, 30) if orientation > 4 else (30, 20))
    assert images.stored_size(file.getvalue()) == (width, height)


def test_the_size_of_a_damaged_png_is_told_without_its_pixels() -> None:
    data = encoded(Image.effect_noise((64, 48), 50).convert("RGB"))
    for part in (data[: len(data) // 2], data[:60]):
        assert images.stored_size(part) == (64, 48)
        with pytest.raises(ValueError, match="is damaged or truncated"):
            images.load_picture(part)


# --- lines ---


def polygons(size: int, seed: int) -> np.ndarray:
    """One-pixel outlines, the same at every size, uint8 (size, size)."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((size, size), np.uint8)
    for corners in rng.uniform(0.05, 0.95, (8, 3, 2)):
        points = np.floor(corners * size).astype(np.int32)
        cv2.polylines(canvas, [points.reshape(-1, 1, 2)], isClosed=True, color=255)
    return canvas


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.77, 1.3, 2.0, 3.0])
def test_thin_lines_stay_whole_and_thin_at_other_sizes(scale: float) -> None:
    for seed in range(3):
        size = round(400 * scale)
        drawn = polygons(400, seed)
        resized = images.resize_lines(drawn, size, size)
        expected = polygons(size, seed)
        assert set(np.unique(resized)) == {0, 255}
        reach = np.ones((2 * max(1, round(scale)) + 1,) * 2, np.uint8)
        assert (cv2.dilate(expected, reach)[resized > 0] > 0).mean() > 0.99
        assert (cv2.dilate(resized, reach)[expected > 0] > 0).mean() > 0.97
        assert 0.8 < (resized > 0).sum() / (expected > 0).sum() < 1.2
        # what hangs together still does: nearest-neighbour resizing breaks lines into pieces
        pieces = cv2.connectedComponents(resized, connectivity=8)[0]
        assert pieces <= cv2.connectedComponents(drawn, connectivity=8)[0]


def test_wide_strokes_stay_wide_and_binary() -> None:
    strokes = cv2.dilate(polygons(400, 0), np.ones((9, 9), np.uint8))
    half = images.resize_lines(cv2.merge([strokes] * 3), 200, 200)
    assert half.shape == (200, 200, 3)
    assert set(np.unique(half)) == {0, 255}
    expected = images.resize(strokes, 200, 200) >= 128
    np.testing.assert_array_equal(half[..., 0] > 0, expected)
    assert images.resize_lines(strokes, 400, 400) is strokes


def test_thinning_keeps_what_is_connected() -> None:
    thick = cv2.dilate(polygons(300, 1), np.ones((7, 7), np.uint8))
    thin = images.thin(thick)
    assert (thick[thin > 0] > 0).all()
    assert cv2.connectedComponents(thin)[0] == cv2.connectedComponents(thick)[0]
    blocks = cv2.erode(thin, np.ones((2, 2), np.uint8), anchor=(0, 0))
    assert (blocks > 0).sum() < 0.02 * (thin > 0).sum()
    np.testing.assert_array_equal(images.thin(thin), thin)
    skeleton = skimage.morphology.skeletonize(thick > 0)
    near = cv2.dilate(skeleton.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert near[thin > 0].mean() > 0.99  # an independent thinning runs along the same lines
    assert not images.thin(np.zeros((5, 5), np.uint8)).any()


def test_a_resolution_sets_the_shorter_side() -> None:
    picture = np.zeros((480, 640, 3), np.uint8)
    assert images.at_resolution(picture, 512).shape == (512, 683, 3)
    assert images.at_resolution(picture.transpose(1, 0, 2), 96).shape == (128, 96, 3)
    assert images.at_resolution(picture, 480) is picture
    assert images.at_resolution(np.zeros((2, 3000, 3), np.uint8), 512).shape == (16, 24000, 3)


def test_a_png_that_was_cut_off_is_not_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert not png.is_whole(file)
    for plain in (False, True):
        data = images.encode_png(np.zeros((8, 8, 3), np.uint8), text={"prompt": "a"}, plain=plain)
        file.write_bytes(data)
        assert png.is_whole(file)
        for length in (0, 5, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:length])
            assert not png.is_whole(file)
