"""Depth in files: every bit of it, in either sense, with its holes, and nothing that runs code."""

import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage import data

from controlkit import preprocessors
from controlkit.images import load_picture
from controlkit.preprocessors import depth_to_map, read_depth, write_depth_npy, write_depth_png16
from controlkit.training.data.map_files import read_levels

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
FLOATS = np.random.default_rng(0).uniform(0.5, 9, (13, 17)).astype(np.float32)


def from_file(source: Any, **options: Any) -> np.ndarray:
    return preprocessors.get("depth", model="file", **options)(source).image


# --- what comes in ---


@pytest.mark.parametrize("suffix", ["png", "tiff", "npy", "npz"])
def test_sixteen_bits_become_a_map_without_banding(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ramp.{suffix}"
    if suffix == "npy":
        np.save(path, RAMP)
    elif suffix == "npz":
        np.savez_compressed(path, depth=RAMP)
    else:
        Image.fromarray(RAMP).save(path)
    made = preprocessors.get("depth", model="file")(path)
    levels, counts = np.unique(made.image, return_counts=True)
    assert len(levels) == 256
    assert counts[1:-1].max() - counts[1:-1].min() <= 3 * 2  # as many pixels at each level
    assert (made.model, made.polarity, made.params) == (
        "file",
        "near-is-white",
        {"clip": 0, "fill": False},
    )
    np.testing.assert_array_equal(made.depth, RAMP)


def _pfm(values: np.ndarray, order: str = "<") -> bytes:
    head = f"Pf\n{values.shape[1]} {values.shape[0]}\n{'-1.0' if order == '<' else '1.0'}\n".encode()
    return head + values[::-1].astype(f"{order}f4").tobytes()


def _bytes(write: Any, values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, values, **options)
    return buffer.getvalue()


def _tiff(values: np.ndarray) -> bytes:
    return _bytes(lambda file, image: Image.fromarray(image).save(file, format="TIFF"), values)


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.mark.parametrize(
    "source",
    [
        _pfm(FLOATS),
        _pfm(FLOATS, ">"),
        _tiff(FLOATS),
        _bytes(np.save, FLOATS),
        _bytes(np.savez, FLOATS),
        FLOATS,
        FLOATS.astype(np.float64),
        FLOATS[:, :, None],
        np.dstack([FLOATS] * 3),
        torch.from_numpy(FLOATS),
        torch.from_numpy(FLOATS)[None],
        Image.fromarray(FLOATS),
    ],
    ids=lambda source: type(source).__name__,
)
def test_floats_are_read_exactly(source: Any) -> None:
    got = read_depth(source)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, FLOATS)
    np.testing.assert_allclose(read_depth(source, metric=True), 1 / FLOATS, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint16", "int64", "float16", ">f8", ">u2"])
def test_arrays_of_any_real_type(dtype: str) -> None:
    values = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(read_depth(_bytes(np.save, values.astype(dtype))), values)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "int32", "float32"])
@pytest.mark.parametrize(
    "how",
    [{"byteorder": ">", "compression": "zlib"}, {"byteorder": ">"}, {"byteorder": "<", "bigtiff": True}],
)
def test_tiffs_of_either_order_packed_and_large(dtype: str, how: dict[str, Any]) -> None:
    """Scientific software writes them; Pillow exchanges bytes that libtiff has put in order already."""
    values = (FLOATS * 3000).astype(dtype)
    content = _bytes(tifffile.imwrite, values, **how)
    np.testing.assert_array_equal(read_depth(content), values)
    if dtype == "float32":
        np.testing.assert_array_equal(
            load_picture(_bytes(tifffile.imwrite, FLOATS / 9, **how)), load_picture(FLOATS / 9)
        )
    if dtype == "uint16":
        np.testing.assert_array_equal(read_levels(content, "it", grey=True, depth=False), values)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_no_damaged_byte_of_a_bigtiff_is_a_traceback() -> None:
    whole = _bytes(tifffile.imwrite, (FLOATS * 20).astype(np.uint8), bigtiff=True)
    for at in range(8, 360):  # its header and its table of tags
        with suppress(ValueError):
            read_depth(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])


def test_eight_bits_and_channels(tmp_path: Path) -> None:
    grey = data.camera()[::4, ::4]
    Image.fromarray(grey).convert("RGB").save(tmp_path / "grey.jpg", quality=90)
    assert np.abs(read_depth(tmp_path / "grey.jpg") - grey).max() < 60
    assert np.abs(read_depth(tmp_path / "grey.jpg") - grey).mean() < 3
    for image in (grey, np.dstack([grey] * 3)):
        np.testing.assert_array_equal(read_depth(_png(image)), grey)
    np.testing.assert_array_equal(read_depth(Image.fromarray(grey).convert("P")), grey)
    deep = (grey.astype(np.uint16) << 8) + 7
    np.testing.assert_array_equal(read_depth(_png(np.dstack([deep] * 3))), deep)  # as Blender writes it


def test_transparent_pixels_are_holes() -> None:
    grey = np.arange(100, 200, dtype=np.uint16).reshape(10, 10) * 256
    alpha = np.full_like(grey, 65535)
    alpha[5, 5] = 0
    got = read_depth(_png(np.dstack([grey] * 3 + [alpha])))
    assert got[5, 5] == grey.min()
    got[5, 5] = grey[5, 5]
    np.testing.assert_array_equal(got, grey)


def test_a_batch_of_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FLOATS)
    write_depth_png16(tmp_path / "b.png", FLOATS)
    first, second = preprocessors.get("depth", model="file")([tmp_path / "a.npy", str(tmp_path / "b.png")])
    assert np.abs(first.image.astype(int) - second.image).max() <= 1


def test_other_options_apply_to_files() -> None:
    values = np.linspace(0, 1, 4000, dtype=np.float32).reshape(40, 100)
    values[0, 0] = -30
    assert len(np.unique(from_file(values, clip=1))) == 256
    assert len(np.unique(from_file(values))) < 12
    made = preprocessors.get("depth", model="file", resolution=20)(values)
    assert made.image.shape == (40, 100, 3)
    assert (made.image.min(), made.image.max()) == (0, 255)
    normal = preprocessors.get("normal", model="file", metric=True)(_bytes(np.save, values + 40))
    assert normal.polarity == "normals"
    assert normal.image.shape == (40, 100, 3)


# --- the two senses, and holes ---


def test_metric_depth_is_inverted() -> None:
    metres = np.array([[1.0, 2.0], [4.0, 5.0]], np.float32)
    assert from_file(metres, metric=True)[..., 0].tolist() == [[255, 96], [16, 0]]
    assert from_file(metres)[..., 0].tolist() == [[0, 64], [191, 255]]
    millimetres = (metres * 1000).astype(np.uint16)
    np.testing.assert_array_equal(from_file(millimetres, metric=True), from_file(metres, metric=True))


@pytest.mark.parametrize("hole", [0.0, np.nan, np.inf, -np.inf, -1.0, 1e-300])
def test_holes_are_black_and_leave_the_rest_alone(hole: float) -> None:
    metres = np.random.default_rng(1).uniform(0.5, 9, (20, 30))
    expected = from_file(metres, metric=True)
    holed = metres.copy()
    holes = np.zeros(metres.shape, bool)
    holes[3:7, 4:9] = True
    holes.flat[[metres.argmin(), metres.argmax()]] = False
    holed[holes] = hole
    got = from_file(holed, metric=True)
    assert (got[holes] == 0).all()
    np.testing.assert_array_equal(got[~holes], expected[~holes])


def test_holes_are_filled_from_the_nearest_measurement_on_request() -> None:
    metres = np.array([[2.0, 0, 0, 4, 4], [2, 2, np.nan, 4, np.inf]], np.float32)
    expected = np.array([[2.0, 2, 4, 4, 4], [2, 2, 2, 4, 4]])
    filled = read_depth(metres, metric=True, fill=True)
    np.testing.assert_allclose(filled[[0, 0, 1]][:, [0, 1, 3, 4]], 1 / expected[[0, 0, 1]][:, [0, 1, 3, 4]])
    assert set(1 / filled[[0, 1], 2]) <= {2.0, 4.0}  # as near to the one as to the other
    assert not read_depth(np.zeros((3, 3)), metric=True, fill=True).any()
    with pytest.raises(ValueError, match="fill is for model=file"):
        preprocessors.get("depth", model="tiny", fill=True)


@pytest.mark.parametrize("value", [0.0, 3.0, np.nan, np.inf])
@pytest.mark.parametrize("metric", [False, True])
def test_constant_depth_and_nothing_but_holes_are_black(value: float, metric: bool) -> None:
    assert not from_file(np.full((6, 7), value, np.float32), metric=metric).any()


def test_a_real_stereo_pair() -> None:
    """Middlebury's motorcycle: disparity in pixels, infinite where it is not known."""
    *_, disparity = data.stereo_motorcycle()
    unknown = np.isinf(disparity)
    assert 20000 < unknown.sum() < 40000
    made = preprocessors.get("depth", model="file")(disparity)
    assert made.depth is not None
    assert np.isfinite(made.depth).all()
    assert (made.image[unknown] == 0).all()
    known = made.image[..., 0][~unknown]
    low, high = disparity[~unknown].min(), disparity[~unknown].max()
    np.testing.assert_allclose(known, (disparity[~unknown] - low) / (high - low) * 255, atol=0.501)
    metres = np.where(unknown, 0, 994.978 * 0.193 / (disparity + 31.086))  # its calibration
    by_metres = from_file(metres, metric=True)
    np.testing.assert_allclose(by_metres[..., 0][~unknown], known, atol=1)


# --- what goes out ---


def test_png16_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "depth.png"
    write_depth_png16(path, FLOATS)
    with Image.open(path) as image:
        assert image.mode == "I;16"
        stored = np.asarray(image)
    assert (stored.min(), stored.max()) == (0, 65535)
    share = (FLOATS - FLOATS.min()) / np.ptp(FLOATS)
    np.testing.assert_allclose(stored / 65535, share, atol=1 / 65535)
    assert np.abs(from_file(path).astype(int) - depth_to_map(FLOATS)).max() <= 1
    write_depth_png16(path, np.ones((3, 4), np.float32))
    assert not read_depth(path).any()


def test_npy_comes_back(tmp_path: Path) -> None:
    write_depth_npy(tmp_path / "depth.npy", FLOATS)
    np.testing.assert_array_equal(read_depth(tmp_path / "depth.npy"), FLOATS)
    assert sorted(os.listdir(tmp_path)) == ["depth.npy"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        write_depth_png16(tmp_path / "depth.png", np.array([[np.nan, 1]], np.float32))
    with pytest.raises(ValueError, match="does not exist"):
        write_depth_npy(tmp_path / "no" / "depth.npy", FLOATS)
    assert not os.listdir(tmp_path)


# --- what is refused ---


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_pickles_are_not_run(tmp_path: Path) -> None:
    evil = np.array([_Evil(tmp_path / "marker")], object)
    np.save(tmp_path / "evil.npy", evil, allow_pickle=True)
    np.savez(tmp_path / "evil.npz", evil)
    for name in ("evil.npy", "evil.npz"):
        with pytest.raises(ValueError, match=rf"{name} holds Python objects, which could run code"):
            read_depth(tmp_path / name)
    assert not (tmp_path / "marker").exists()


def _npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">I", zlib.crc32(body))
        + (b"\0\0\1\0IDAT" + bytes(256))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello", "is not a picture"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (_png(RAMP)[:2000], "damaged"),
        (_tiff(FLOATS)[:200], "damaged"),
        (_bytes(np.save, FLOATS)[:200], "damaged"),
        (_bytes(np.savez, FLOATS)[:200], "damaged"),
        (_pfm(FLOATS)[:200], "damaged"),
        (b"Pf\n17", "damaged"),
        (b"\x93NUMPY\x01\x00", "damaged"),
        (_bytes(np.save, FLOATS).replace(b"{", b"e"), "damaged"),
        (_npy_header((10**6, 10**6)), "at most 89,478,485"),
        (b"Pf\n1000000 1000000\n-1\n", "at most 89,478,485"),
        (_png_header(20000, 20000), "at most 89,478,485"),
        (
            _bytes(lambda file, _: np.savez(file, a=FLOATS, b=FLOATS), FLOATS),
            "must hold one array; it holds a, b",
        ),
        (_bytes(np.save, np.zeros((2, 3, 4, 5))), r"has the shape \(2, 3, 4, 5\); depth is"),
        (_bytes(np.save, np.zeros((0, 5))), r"has the shape \(0, 5\)"),
        (_bytes(np.save, np.zeros((2, 3), complex)), "type complex128"),
        (_bytes(np.save, np.zeros((2, 3), "U3")), "type <U3"),
        (_png(data.coffee()), "is coloured"),
        (_png(data.coffee().astype(np.uint16) * 256), "is coloured"),
    ],
)
def test_what_is_no_depth_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "depth.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_depth(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "data given" in str(caught.value)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        read_depth(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_depth(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="not int"):
        read_depth(7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coloured"):
        read_depth(data.coffee())


# --- OpenEXR ---


def _exr(
    channels: dict[str, np.ndarray],
    *,
    compression: int = 3,
    version: int = 2,
    top: int = -3,
    left: int = 5,
    shown: tuple[int, int, int, int] | None = None,
) -> bytes:
    """Write an OpenEXR file by its specification: scanlines, channels in alphabetical order."""
    names = sorted(channels)
    height, width = channels[names[0]].shape
    kinds = {np.dtype("<u4"): 0, np.dtype("<f2"): 1, np.dtype("<f4"): 2}

    def attribute(name: str, kind: str, value: bytes) -> bytes:
        return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value

    listed = b"".join(
        name.encode() + b"\0" + struct.pack("<iIii", kinds[channels[name].dtype], 0, 1, 1) for name in names
    )
    window = struct.pack("<4i", left, top, left + width - 1, top + height - 1)
    head = struct.pack("<II", 20000630, version) + b"".join(
        [
            attribute("channels", "chlist", listed + b"\0"),
            attribute("compression", "compression", bytes([compression])),
            attribute("dataWindow", "box2i", window),
            attribute("displayWindow", "box2i", window if shown is None else struct.pack("<4i", *shown)),
            attribute("lineOrder", "lineOrder", b"\0"),
            attribute("pixelAspectRatio", "float", struct.pack("<f", 1.0)),
        ]
    )
    head += b"\0"
    rows = 16 if compression == 3 else 1
    blocks = []
    for first in range(0, height, rows):
        raw = b"".join(
            channels[name][row].tobytes() for row in range(first, min(first + rows, height)) for name in names
        )
        packed = _exr_packed(raw, compression)
        blocks.append(struct.pack("<ii", top + first, len(packed)) + packed)
    at = len(head) + 8 * len(blocks)
    offsets = []
    for block in blocks:
        offsets.append(at)
        at += len(block)
    return head + struct.pack(f"<{len(offsets)}Q", *offsets) + b"".join(blocks)


def _exr_packed(raw: bytes, compression: int) -> bytes:
    if compression == 0:
        return raw
    values = np.frombuffer(raw, np.uint8)
    split = np.concatenate([values[0::2], values[1::2]]).astype(np.int64)
    split[1:] = np.diff(split) + 128
    coded = (split & 255).astype(np.uint8).tobytes()
    if compression == 1:  # run lengths, all of them literal, at most 127 long
        runs = [coded[at : at + 127] for at in range(0, len(coded), 127)]
        packed = b"".join(struct.pack("<b", -len(run)) + run for run in runs)
    else:
        packed = zlib.compress(coded)
    return packed if len(packed) < len(raw) else raw


@pytest.mark.parametrize("compression", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<u4"])
def test_exr_depth_is_read(compression: int, dtype: str) -> None:
    smooth = np.add.outer(np.arange(37.0), np.arange(90.0) // 8)
    depth = smooth.astype(dtype)
    other = np.zeros(depth.shape, "<f2")
    content = _exr({"A": other, "ViewLayer.Depth.Z": depth, "R": other}, compression=compression)
    np.testing.assert_array_equal(read_depth(content, metric=False), depth.astype(np.float32))
    assert len(content) < 37 * 90 * (np.dtype(dtype).itemsize + 4) or compression < 2


def test_exr_runs_are_unrolled() -> None:
    from controlkit.preprocessors.exr import _unrolled

    assert _unrolled(struct.pack("<b", 4) + b"x" + struct.pack("<b", -3) + b"abc") == b"xxxxxabc"


@pytest.mark.parametrize(
    ("depth", "others"),
    [
        (["ViewLayer.Depth.Z"], ["ViewLayer.Combined.R", "ViewLayer.Normal.X", "ViewLayer.Normal.Y"]),
        (["ViewLayer.Depth.Z"], ["ViewLayer.Denoising Depth.Z", "ViewLayer.Mist.Z", "ViewLayer.Zebra.Z"]),
        (["ViewLayer.Depth.Z"], [f"ViewLayer.Normal.{axis}" for axis in "XYZ"]),
        (["Z"], ["R", "left.Z", "forward.left.v", "right.Depth.Z"]),
        (["depth"], ["R", "G", "B", "N.X", "N.Y", "N.Z"]),
        (["Depth.V"], ["R", "G", "B", "UV.U", "UV.V"]),
        (["Depth.R"], ["R", "G", "B", "A"]),
        (["Depth.R", "Depth.G", "Depth.B"], ["R", "G", "B", "A"]),
        (["left.Z"], ["left.R", "left.A", "N.X", "N.Y", "N.Z"]),
    ],
    ids=lambda names: names[0],
)
def test_of_an_exr_with_several_passes_the_depth_is_read_as_a_distance(
    depth: list[str], others: list[str]
) -> None:
    content = _exr({name: FLOATS.astype("<f4") for name in depth} | dict.fromkeys(others, FLOATS[::-1]))
    np.testing.assert_allclose(read_depth(content), 1 / FLOATS, rtol=1e-6)
    np.testing.assert_array_equal(read_depth(content, metric=False), FLOATS)


@pytest.mark.parametrize(
    ("depth", "others"),
    [(["Y"], ["right.Y"]), (["R", "G", "B"], ["UV.U", "UV.V"]), (["only.V"], ["UV.U", "UV.V"])],
    ids=lambda names: names[0],
)
def test_of_an_exr_without_z_what_lies_in_no_layer_is_read_as_it_is(
    depth: list[str], others: list[str]
) -> None:
    content = _exr({name: FLOATS.astype("<f4") for name in depth} | dict.fromkeys(others, FLOATS[::-1]))
    np.testing.assert_array_equal(read_depth(content), FLOATS)


def test_a_distance_is_inverted_unless_it_is_told_not_to_be(tmp_path: Path) -> None:
    (tmp_path / "z.exr").write_bytes(_exr({"Z": FLOATS}))
    np.testing.assert_array_equal(from_file(tmp_path / "z.exr"), from_file(FLOATS, metric=True))
    np.testing.assert_array_equal(from_file(tmp_path / "z.exr", metric="false"), from_file(FLOATS))
    made = preprocessors.get("normal", model="file")(tmp_path / "z.exr")
    np.testing.assert_array_equal(made.depth, read_depth(FLOATS, metric=True))
    for metric, same in ((None, True), (True, True), (False, False)):  # of data.options; None is its default
        levels = read_levels(_exr({"Z": FLOATS}), "z", grey=False, depth=True, metric=metric)
        np.testing.assert_array_equal(levels, from_file(FLOATS, metric=same))
    with pytest.raises(ValueError, match="must be true or false"):
        preprocessors.get("depth", model="file", metric="perhaps")


@pytest.mark.parametrize("fill", [False, True])
def test_a_renderers_sky_is_far_and_leaves_the_range_alone(fill: bool) -> None:
    depth = FLOATS.astype("<f4")
    depth[:5] = 1e10
    depth[12, 3] = np.nan
    got = read_depth(_exr({"Z": depth}), fill=fill)
    assert (got[:5] == (1 / depth[5:][depth[5:] > 0]).min()).all()
    assert (got[12, 3] == got[0, 0]) != fill


def test_an_exr_is_placed_in_the_picture_that_was_rendered() -> None:
    height, width = FLOATS.shape
    larger = read_depth(_exr({"Z": FLOATS}, left=4, top=7, shown=(0, 0, 29, 24)))
    assert larger.shape == (25, 30)
    np.testing.assert_allclose(larger[7 : 7 + height, 4 : 4 + width], 1 / FLOATS, rtol=1e-6)
    assert (larger[:7] == larger.min()).all()
    inner = read_depth(_exr({"Z": FLOATS}, left=-4, top=-3, shown=(0, 0, 9, 5)))
    np.testing.assert_allclose(inner, 1 / FLOATS[3:9, 4:14], rtol=1e-6)
    assert not read_depth(_exr({"Z": FLOATS}, left=50, top=0, shown=(0, 0, 9, 5))).any()
    grey = FLOATS.astype("<f4")
    coloured = _exr({"R": grey, "G": grey, "B": grey}, left=0, top=0, shown=(0, 0, width, height))
    assert read_depth(coloured).shape == (height + 1, width + 1)


def test_exr_of_equal_colours_is_depth() -> None:
    grey = FLOATS.astype("<f4")
    np.testing.assert_array_equal(read_depth(_exr({"R": grey, "G": grey, "B": grey})), grey)
    with pytest.raises(ValueError, match="coloured"):
        read_depth(_exr({"R": grey, "G": grey, "B": grey * 2}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_exr({"Z": FLOATS}, compression=4), "^the data given is an EXR with PIZ compression, .*; save it"),
        (_exr({"Z": FLOATS}, compression=7), "^the data given is an EXR with B44A compression, which is not"),
        (_exr({"Z": FLOATS}, version=2 | 0x200), "^the data given is an EXR in tiles, which is not read"),
        (_exr({"Z": FLOATS}, version=2 | 0x1800), "is an EXR of several parts and with deep pixels, which"),
        (_exr({"U": FLOATS, "W": FLOATS}), r"^the data given has no channel Z .*\(it has U, W\)"),
        (_exr({"X": FLOATS, "Y": FLOATS, "Z": FLOATS}), "has no channel Z that is a depth"),
        (
            _exr({"a.Z": FLOATS, "b.Z": FLOATS}),
            r"several channels that may be its depth \(a.Z, b.Z\): keep one",
        ),
        (_exr({"L.Depth.Z": FLOATS, "M.Depth.Z": FLOATS}), r"several .*\(L.Depth.Z, M.Depth.Z\)"),
        (_exr({f"{eye}.{one}": FLOATS for eye in "LM" for one in "RGB"}), r"several .*\(L.R, M.R\)"),
        (_exr({"left.Y": FLOATS, "right.Y": FLOATS}), r"several .*\(left.Y, right.Y\)"),
        (_exr({"Z": FLOATS}, shown=(0, 0, 99999, 99999)), "has 100000 x 100000 pixels; at most"),
        (_exr({"Z": FLOATS})[:-50], "cut short"),
        (_exr({"Z": FLOATS})[:90], "damaged"),
        (_exr({"Z": FLOATS})[:30], "damaged"),
    ],
)
def test_other_exr_is_refused_with_the_cure(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_depth(content)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_no_damaged_byte_of_an_exr_is_a_traceback() -> None:
    whole = _exr({"Z": FLOATS, "R": FLOATS})
    for at in range(600):
        damaged = bytearray(whole)
        damaged[at] = 255 - damaged[at]
        with suppress(ValueError):
            assert read_depth(bytes(damaged)).ndim == 2


def test_a_grey_map_of_16_bits_keeps_its_numbers() -> None:
    """PGM in millimetres, as sensors write it: not the 8 bits of a picture."""
    millimetres = np.linspace(1000, 5000, 64 * 48).astype(np.uint16).reshape(48, 64)
    for content in (
        b"P5 64 48 65535\n" + millimetres.astype(">u2").tobytes(),
        b"P5 64 48 5000\n" + millimetres.astype(">u2").tobytes(),
        b"P2 64 48 65535\n" + b" ".join(b"%d" % value for value in millimetres.ravel()),
    ):
        assert np.array_equal(read_depth(content), millimetres)


PHOTOMETRIC = {1: "minisblack", 3: "rgb"}


def _exif_chunk(exif: Image.Exif) -> bytes:
    """A PNG's, behind its header."""
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_depth_that_lies_on_its_side_is_turned_as_a_picture_is(suffix: str, turn: int, channels: int) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = turn
    picture, deep = io.BytesIO(), io.BytesIO()
    Image.fromarray(levels).save(picture, "png", exif=exif)
    expected = load_picture(picture.getvalue())[..., 0]
    values = np.dstack([levels.astype(np.uint16) * 257] * channels)
    if suffix == "tiff":
        tifffile.imwrite(
            deep, values.squeeze(), photometric=PHOTOMETRIC[channels], extratags=[(274, 3, 1, turn)]
        )
    elif channels == 1:
        Image.fromarray(values[..., 0]).save(deep, "png", exif=exif)
    else:
        plain = _png(values)
        end_of_header = 8 + 25
        deep.write(plain[:end_of_header] + _exif_chunk(exif) + plain[end_of_header:])
    content, wanted = deep.getvalue(), expected.astype(np.uint16) * 257
    assert np.array_equal(read_depth(content), wanted)
    assert np.array_equal(read_levels(content, "it", grey=True, depth=False), wanted)
