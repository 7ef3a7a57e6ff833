"""Where examples come from: every layout, read in its order; what leads out of a data set is never read."""

import csv
import functools
import io
import json
import os
import re
import shlex
import shutil
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from controlkit import folder_job, images, preprocessors
from controlkit.training.config import ControlNetRecipe, load_recipe
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example, Examples, FilePiece, Piece
from controlkit.training.data.sources import open_examples, recognise
from controlkit.training.data.visits import Visits

NAMES = ("astronaut", "coffee", "cat", "rocket")
CAPTIONS = {"astronaut": "an astronaut", "coffee": "a cup – hot", "cat": "a cat", "rocket": ""}


@functools.cache
def photograph(name: str) -> np.ndarray:
    return np.ascontiguousarray(getattr(photographs, name)()[:96, :128])


@functools.cache
def edges(name: str) -> np.ndarray:
    return preprocessors.get("canny")(photograph(name)).image


def encoded(array: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, quality=95)
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def opened(source: Path | str, kind: str = "canny", **settings: Any) -> Examples:
    return open_examples(DataRecipe(source=str(source), **settings), kind=kind)


def pixels(piece: Piece) -> np.ndarray:
    content = piece.read()
    return images.load_picture(content)


def names(examples: Examples) -> list[str]:
    return [example.name for example in examples]


def is_whole(examples: Examples) -> bool:
    """Whether the examples are the four photographs with their edges and captions, in their order."""
    assert len(examples) == len(NAMES)
    for name, example in zip(NAMES, examples, strict=True):
        assert np.array_equal(pixels(example.picture), photograph(name)), name
        assert [np.array_equal(pixels(piece), edges(name)) for piece in example.maps] == [True], name
        assert example.caption == CAPTIONS[name]
    return True


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def put_pictures(folder: Path, *, pictures: str, maps: str) -> None:
    for name in NAMES:
        put(folder / pictures / f"{name}.png", encoded(photograph(name)))
        put(folder / maps / f"{name}.png", encoded(edges(name)))


def imagefolder(folder: Path, *, map_key: str = "conditioning_image_file_name") -> Path:
    put_pictures(folder, pictures="images", maps="canny")
    rows = [
        {"file_name": f"images/{name}.png", "text": CAPTIONS[name], map_key: f"canny/{name}.png"}
        for name in NAMES
    ]
    put(folder / "metadata.jsonl", jsonl(rows))
    return folder


# --- files that list pictures ---


@pytest.mark.parametrize(
    "map_key", ["conditioning_image_file_name", "conditioning_image", "canny_file_name", "control", "hint"]
)
def test_an_imagefolder(tmp_path: Path, map_key: str) -> None:
    folder = imagefolder(tmp_path / "set", map_key=map_key)
    assert is_whole(opened(folder))
    assert is_whole(opened(folder / "metadata.jsonl", format="imagefolder"))
    assert names(opened(folder))[0] == "images/astronaut.png"


def test_an_imagefolder_with_splits(tmp_path: Path) -> None:
    imagefolder(tmp_path / "set" / "train")
    assert is_whole(opened(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"holds no data set; data.split=test, and it has train"):
        opened(tmp_path / "set", split="test")


def test_metadata_csv(tmp_path: Path) -> None:
    put_pictures(tmp_path, pictures="images", maps="maps")
    lines = [f'images/{name}.png,maps/{name}.png,"{CAPTIONS[name]}"' for name in NAMES]
    put(tmp_path / "metadata.csv", "\r\n".join(["﻿file_name,conditioning_image,caption", *lines]))
    assert is_whole(opened(tmp_path))
    put(tmp_path / "metadata.csv", "file_name,text\na.png,one,two\n")
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: more fields"):
        opened(tmp_path)


@pytest.mark.parametrize("as_array", [False, True])
def test_fill50k(tmp_path: Path, as_array: bool) -> None:
    put_pictures(tmp_path, pictures="target", maps="source")
    rows = [
        {"source": f"source/{name}.png", "target": f"target/{name}.png", "prompt": CAPTIONS[name]}
        for name in NAMES
    ]
    put(tmp_path / "prompt.json", json.dumps(rows, indent=1) if as_array else jsonl(rows))
    assert recognise(DataRecipe(source=str(tmp_path))) == ("fill50k", str(tmp_path / "prompt.json"))
    assert is_whole(opened(tmp_path))
    assert is_whole(opened(tmp_path / "prompt.json"))


def test_a_caption_in_a_table_may_have_any_length(tmp_path: Path) -> None:
    longest = csv.field_size_limit()
    caption = "w" * (longest + 1)
    put(tmp_path / "metadata.csv", f"file_name,text\n1.png,{caption}\n")
    (example,) = opened(tmp_path, maps="made")
    assert example.caption == caption
    assert csv.field_size_limit() == longest


def test_a_listing_that_is_not_read_is_told(tmp_path: Path) -> None:
    folder = imagefolder(tmp_path)
    said: list[str] = []
    put(folder / "metadata.csv", "file_name,text\nimages/cat.png,another\n")
    assert is_whole(opened(folder))
    open_examples(DataRecipe(source=str(folder)), kind="canny", report=said.append)
    assert said[1] == f"{folder}: metadata.csv is not read, for metadata.jsonl lies beside it"


def test_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    folder = imagefolder(tmp_path)
    text = (folder / "metadata.jsonl").read_text()
    put(folder / "metadata.jsonl", "﻿\r\n" + text.replace("\n", "\r\n\r\n  \r\n"))
    assert is_whole(opened(folder))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "a.png", ', "metadata.jsonl, line 3: this is not JSON"),
        ('["a.png"]', "metadata.jsonl, line 3: this is not a JSON object"),
        ("[" * 100_000, "metadata.jsonl, line 3: this is not JSON"),
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, line: str, problem: str) -> None:
    put(tmp_path / "metadata.jsonl", f'{{"file_name": "a.png"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=problem):
        opened(tmp_path)


def test_a_broken_array_and_a_file_that_is_no_text(tmp_path: Path) -> None:
    put(tmp_path / "prompt.json", '[{"target": "a.png"},\n  nonsense]')
    with pytest.raises(ValueError, match=r"prompt.json: this is not JSON .*line 2"):
        opened(tmp_path)
    put(tmp_path / "prompt.json", "[1]")
    with pytest.raises(ValueError, match=r"prompt.json, entry 1: this is not a JSON object"):
        opened(tmp_path)
    put(tmp_path / "prompt.json", b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"prompt.json is not UTF-8 text"):
        opened(tmp_path)


def rows_of(folder: Path, *rows: dict[str, Any]) -> Examples:
    """The pairs of a data set whose first row is sound."""
    put(folder / "a.png", encoded(photograph("cat")))
    put(folder / "metadata.jsonl", jsonl([{"file_name": "a.png", "text": "x", "hint": "a.png"}, *rows]))
    return opened(folder)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x", "hint": "a.png"}, "line 2: the key 'file_name' is missing"),
        ({"file_name": None, "text": "x", "hint": "a.png"}, "line 2, file_name: a file's name is wanted"),
        ({"file_name": " ", "text": "x", "hint": "a.png"}, "line 2, file_name: a file's name is wanted"),
        ({"file_name": "a\0.png", "text": "x", "hint": "a.png"}, "line 2, file_name: a file's name"),
        ({"file_name": "a.png", "text": 5, "hint": "a.png"}, "line 2, text: a caption is a text, not 5"),
    ],
)
def test_a_row_that_lacks_something_says_so_when_it_is_read(
    tmp_path: Path, row: dict[str, Any], problem: str
) -> None:
    good, bad = rows_of(tmp_path, row)
    assert pixels(good.picture).shape == (96, 128, 3)
    with pytest.raises(ValueError, match=problem):
        bad.picture.read()


def test_a_row_without_its_map(tmp_path: Path) -> None:
    _, bad = rows_of(tmp_path, {"file_name": "a.png", "text": "x"})
    assert pixels(bad.picture).shape == (96, 128, 3)
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: the key 'hint' is missing"):
        bad.maps[0].read()


def test_captions_of_every_sort(tmp_path: Path) -> None:
    given = [None, ["first", "second"], [], "two\n lines", "emoji 🦊 ‮rtl", "", ["", None, "third"]]
    examples = rows_of(tmp_path, *({"file_name": "a.png", "text": text, "hint": "a.png"} for text in given))
    expected = ["x", "", "first", "", "two lines", "emoji 🦊 ‮rtl", "", "third"]
    assert [example.caption for example in examples] == expected
    assert [example.captions for example in examples[2:4]] == [("first", "second"), ("",)]
    examples = opened(tmp_path, caption="a picture")
    assert [example.caption for example in examples] == [text or "a picture" for text in expected]


# --- what leads out ---


@pytest.mark.parametrize(
    "name", ["../secret.png", "images/../../secret.png", "/{}/secret.png", "C:\\secret.png", "..\\secret.png"]
)
def test_names_that_lead_out_are_not_read(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret.png", encoded(photograph("cat")))
    (tmp_path / "set" / "images").mkdir(parents=True)
    name = name.format(tmp_path.as_posix().strip("/"))
    _, bad = rows_of(tmp_path / "set", {"file_name": name, "text": "x", "hint": name})
    for piece in (bad.picture, *bad.maps):
        with pytest.raises(ValueError, match=r"line 2, .* leads out of the data set and is not read"):
            piece.read()
        with pytest.raises(ValueError, match="leads out"):
            piece.digest()


def test_links_are_followed_inside_and_nowhere_else(tmp_path: Path) -> None:
    put(tmp_path / "secret.png", encoded(photograph("cat")))
    folder = tmp_path / "set"
    rows = [{"file_name": name, "hint": "a.png"} for name in ("inside.png", "outside.png", "away/secret.png")]
    examples = rows_of(folder, *rows)
    os.symlink("a.png", folder / "inside.png")
    os.symlink("../secret.png", folder / "outside.png")
    os.symlink("..", folder / "away")
    assert pixels(examples[1].picture).shape == (96, 128, 3)
    for example in examples[2:]:
        with pytest.raises(ValueError, match="leads out of the data set"):
            example.picture.read()


def test_a_data_set_may_itself_be_reached_by_a_link(tmp_path: Path) -> None:
    imagefolder(tmp_path / "there")
    os.symlink("there", tmp_path / "here")
    assert is_whole(opened(tmp_path / "here"))


def test_a_listing_that_is_a_link_out(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere.jsonl", '{"file_name": "a.png"}')
    (tmp_path / "set").mkdir()
    os.symlink("../elsewhere.jsonl", tmp_path / "set" / "metadata.jsonl")
    with pytest.raises(ValueError, match="leads out of the data set"):
        opened(tmp_path / "set")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    _, bad = rows_of(tmp_path, {"file_name": "pipe.png", "hint": "a.png"})
    with pytest.raises(ValueError, match=r"pipe.png is not a file"):
        bad.picture.read()


# --- which column ---


def test_columns_by_name(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(photograph("cat")))
    put(tmp_path / "b.png", encoded(edges("cat")))
    put(
        tmp_path / "metadata.jsonl",
        jsonl([{"bild": "a.png", "karte": "b.png", "karte2": "a.png", "satz": "x"}]),
    )
    settings = {"picture_column": "bild", "map_column": ("karte", "karte2"), "caption_column": "satz"}
    (example,) = opened(tmp_path, **settings)
    assert [piece.name for piece in (example.picture, *example.maps)] == [
        str(tmp_path / name) for name in ("a.png", "b.png", "a.png")
    ]
    assert example.caption == "x"
    with pytest.raises(ValueError, match=r"no column with pictures.*bild, karte, karte2, satz"):
        opened(tmp_path)
    for option in ("picture_column", "map_column", "caption_column"):
        with pytest.raises(ValueError, match=rf"data.{option}: .* has no column 'kart'.*columns: .*satz"):
            opened(tmp_path, **{**settings, option: "kart"})


def test_the_maps_of_the_kind_that_is_trained(tmp_path: Path) -> None:
    row = {"file_name": "a.png", "canny_file_name": "c.png", "depth_file_name": "d.png"}
    row["conditioning_image_file_name"] = "c.png"
    put(tmp_path / "metadata.jsonl", jsonl([row]))

    def map_names(kind: str, **settings: Any) -> list[str]:
        (example,) = opened(tmp_path, kind, **settings)
        return [Path(piece.name).name for piece in example.maps]

    assert map_names("canny") == ["c.png"]
    assert map_names("depth") == ["d.png"]
    assert map_names("") == ["c.png"]
    assert map_names("softedge") == []  # and not canny's, which the column with the common name holds
    assert map_names("depth", maps="made") == []
    assert map_names("", map_column=("depth", "canny_file_name")) == ["d.png", "c.png"]  # by kind, by name
    with pytest.raises(ValueError, match=r"no column 'softedge'"):
        map_names("", map_column=("depth", "softedge"))
    with pytest.raises(ValueError, match=r"no column with maps of softedge.*data.maps=made"):
        map_names("softedge", maps="files")
    del row["conditioning_image_file_name"]
    put(tmp_path / "metadata.jsonl", jsonl([row]))
    with pytest.raises(ValueError, match=r"several kinds: name one with data.map_column: canny_file_name, d"):
        map_names("")


def test_pictures_that_may_be_the_maps_are_not_passed_over(tmp_path: Path) -> None:
    """Where a column's name says nothing, nobody's maps are replaced by others without a word."""
    for name in ("a.png", "e.png"):
        put(tmp_path / name, encoded(photograph("cat")))
    row = {"file_name": "a.png", "text": "x", "edge_file_name": "e.png"}
    put(tmp_path / "metadata.jsonl", jsonl([row]))
    with pytest.raises(
        ValueError, match=r"pictures in edge_file_name, too: .*data.map_column=edge_file_name"
    ):
        opened(tmp_path)
    (piece,) = opened(tmp_path, map_column=("edge",))[0].maps
    assert piece.name.endswith("e.png")
    assert opened(tmp_path, maps="made")[0].maps == ()
    plain = {"file_name": "a.png", "text": "x", "width": 3, "license": "CC-BY 4.0", "path": "a.png"}
    put(tmp_path / "metadata.jsonl", jsonl([plain]))
    assert opened(tmp_path)[0].maps == ()


def test_columns_of_maps_hold_maps(tmp_path: Path) -> None:
    """A number called depth and a web site called source are no maps."""
    put(tmp_path / "a.png", encoded(photograph("cat")))
    row = {"file_name": "a.png", "text": "x", "source": "laion", "depth": 0.5}
    put(tmp_path / "metadata.jsonl", jsonl([row]))
    assert opened(tmp_path)[0].maps == ()
    put(tmp_path / "metadata.jsonl", jsonl([row | {"conditioning_image": "a.png"}]))
    assert len(opened(tmp_path)[0].maps) == 1


@pytest.mark.parametrize(
    "value",
    [
        "https://example.org/a.jpg",
        {"bbox": [[0, 0, 9, 9]], "category": [1]},
        {"Make": "a camera"},
        [[0, 0, 9, 9], [1, 2, 3, 4]],
        [[1.5, 2.5, 1.0]] * 17,
    ],
)
def test_columns_that_hold_no_maps_are_not_asked_about(tmp_path: Path, value: Any) -> None:
    """Addresses, boxes, points and what a camera said stand in many data sets."""
    put(tmp_path / "a.png", encoded(photograph("cat")))
    put(tmp_path / "metadata.jsonl", jsonl([{"file_name": "a.png", "text": "x", "about": value}]))
    assert opened(tmp_path)[0].maps == ()


def test_a_folder_that_may_hold_the_maps_is_not_trained_on(tmp_path: Path) -> None:
    for name in NAMES:
        for folder, picture in (("train", photograph(name)), ("train_cond", edges(name))):
            put(tmp_path / "kohya" / folder / f"{name}.png", encoded(picture))
            put(tmp_path / "inside" / folder.removeprefix("train") / f"{name}.png", encoded(picture))
        for place in ("kohya/train", "inside", "concepts/1_cat", "concepts/1_dog"):
            put(tmp_path / place / f"{name}.txt", name)
            put(tmp_path / place / f"{name}.png", encoded(photograph(name)))
    with pytest.raises(
        ValueError, match=r"train_cond/ has pictures named like train/ and no captions: .*canny"
    ):
        opened(tmp_path / "kohya")
    with pytest.raises(ValueError, match=r"_cond/ has pictures named like its pictures and no captions"):
        opened(tmp_path / "inside")
    examples = opened(tmp_path / "kohya", map_column=("train_cond",))
    assert [np.array_equal(pixels(e.maps[0]), edges(Path(e.name).stem)) for e in examples] == [True] * 4
    assert len(opened(tmp_path / "concepts")) == 8  # both with captions: two concepts


def put_pairs(folder: Path, pictures: str, maps: str, *, captions: bool = False) -> Path:
    """The four photographs and their edges, each under a pattern such as "images/{}.png"."""
    for name in NAMES:
        put(folder / pictures.format(name), encoded(photograph(name)))
        put(folder / maps.format(name), encoded(edges(name)))
        if captions:
            put((folder / pictures.format(name)).with_suffix(".txt"), name)
    return folder


def test_a_column_of_captions_is_refused_where_captions_lie_beside_pictures(tmp_path: Path) -> None:
    folder = put_pairs(tmp_path, "images/{}.png", "conditioning/{}.png", captions=True)
    (folder / "captions").mkdir()
    with pytest.raises(ValueError, match=r"^data.caption_column=captions: .*beside them \(NAME.txt"):
        opened(folder, caption_column="captions")
    assert opened(folder)[0].caption == sorted(NAMES)[0]


def has_pairs(examples: Examples) -> bool:
    """Whether the examples are the photographs with their edges."""
    assert sorted(Path(example.name).stem for example in examples) == sorted(NAMES)
    for example in examples:
        name = Path(example.name).stem
        assert np.array_equal(pixels(example.picture), photograph(name))
        assert [np.array_equal(pixels(piece), edges(name)) for piece in example.maps] == [True], name
    return True


def answer(said: str) -> dict[str, Any]:
    """The settings that a message proposes first."""
    proposed = shlex.split(said.partition("say so with ")[2].partition(";")[0])
    settings: dict[str, Any] = dict(part.removeprefix("data.").split("=", 1) for part in proposed)
    return settings | {"map_column": (settings["map_column"],)}


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize(
    ("pictures", "maps", "said"),
    [
        ("photos/{}.png", "edges/{}.png", "edges/ has pictures named like photos/"),
        ("images/{}.png", "masks/{}.png", "masks/ has pictures named like images/"),
        ("images/deep/{}.png", "seg/deep/{}.png", "seg/ has pictures named like images/"),
        ("rgb/{}.png", "seg/{}.png", "seg/ has pictures named like rgb/"),
        ("my photos/{}.png", "my edges/{}.png", "my edges/ has pictures named like my photos/"),
        ("images/{}.png", "my edges/{}.png", "my edges/ has pictures named like images/"),
        ("one/{}.png", "two/{}.png", "two/ has pictures named like one/"),
        ("{}.png", "edges/{}.png", "edges/ has pictures named like its pictures"),
        ("data/rgb/{}.png", "data/seg/{}.png", "data/seg/ has pictures named like data/rgb/"),
        ("a/images/{}.png", "a/edges/{}.png", "a/edges/ has pictures named like a/images/"),
        ("images/{}.png", "images/edges/{}.png", "edges/ has pictures named like its pictures"),
        ("{}.jpg", "{}.png", ".jpg and astronaut.png have one name"),
        ("images/{}.jpg", "images/{}.png", "/images: astronaut.jpg and astronaut.png have one name"),
        ("{}.png", "{}_edge.png", "astronaut_edge.png lies beside astronaut.png"),
    ],
)
def test_pictures_that_may_be_maps_are_asked_about(
    tmp_path: Path, pictures: str, maps: str, said: str, captions: bool
) -> None:
    """Neither trained on as pictures nor passed over, and what the question proposes is an answer to it."""
    if pictures.startswith(("data/", "a/")):
        put(tmp_path / "README.md", "a repository")
    put_pairs(tmp_path, pictures, maps, captions=captions)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        opened(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "maps of canny" in message
    settings = {"source": str(tmp_path), **answer(message)}
    assert has_pairs(opened(**settings))
    if not captions:
        assert not any(example.maps for example in opened(tmp_path, maps="made"))


@pytest.mark.parametrize(
    ("pictures", "maps"),
    [
        ("train/images/{}.png", "train/conditioning/{}.png"),
        ("train/{}.png", "train/canny/{}.png"),
        ("set/images/{}.png", "set/conditioning/{}.png"),
        ("{}.png", "{}_canny.png"),
        ("images/{}.png", "images/{}-Canny.png"),
        ("images/{}.jpg", "images/{}_conditioning_image.png"),
        ("{}.png", "Canny/{}.png"),
        ("Images/{}.png", "Conditioning/{}.png"),
        ("{}.png", "conditioning/{}_canny.png"),
        ("a/{}.png", "conditioning/a/{}_conditioning.png"),
    ],
)
def test_maps_that_are_known_by_their_names(tmp_path: Path, pictures: str, maps: str) -> None:
    put_pairs(tmp_path, pictures.replace(".jpg", ".png"), maps, captions=True)
    examples = opened(tmp_path)
    assert has_pairs(examples)
    assert sorted(example.caption for example in examples) == sorted(NAMES)
    said: list[str] = []
    data = DataRecipe(source=str(tmp_path), maps="made")
    made = open_examples(data, kind="canny", report=said.append)
    assert (len(made), [example.maps for example in made]) == (4, [()] * 4)
    assert "data.maps=made" in said[0]
    assert said[0].endswith("is not used")


def test_hidden_files_say_nothing_of_a_folder(tmp_path: Path) -> None:
    """macOS leaves them in archives."""
    put_pairs(tmp_path, "train/images/{}.png", "train/conditioning/{}.png")
    put(tmp_path / "._cat.png", b"")
    assert has_pairs(opened(tmp_path))


def test_a_maps_name_may_end_in_the_kind_and_the_folder(tmp_path: Path) -> None:
    """Of several ends that fit, the one counts before which a picture's name stands, whatever their order."""
    for kind in ("edges", "sharp_edges"):
        put_pairs(tmp_path / kind, "images/{}.png", "my_sharp_edges/{}_my_sharp_edges.png")
        assert has_pairs(opened(tmp_path / kind, kind, map_column=("my_sharp_edges",)))


def test_depth_in_numbers_beside_the_pictures(tmp_path: Path) -> None:
    """It is found by the end of its name, or asked about; for maps of another kind it is nothing."""
    for number in range(4):
        for layout in ("same/{}.npy", "end/{}_depth.npy", "root/numbers/{}.npy", "images/numbers/{}.npy"):
            folder = tmp_path / layout.partition("/")[0]
            place = folder / "images" if folder.name == "images" else folder
            put(place / f"{number}.jpg", encoded(photograph("cat"), "JPEG"))
            np.save(put(tmp_path / layout.format(number), b""), np.eye(8, dtype=np.float32))

    def maps(layout: str, **settings: Any) -> list[str]:
        examples = opened(tmp_path / layout, "depth", **settings)
        return [Path(piece.name).name for example in examples for piece in example.maps]

    assert maps("end") == [f"{number}_depth.npy" for number in range(4)]
    for layout, column, said in (
        ("same", ".npy", "0.jpg and 0.npy have one name"),
        ("root", "numbers", "numbers/ has numbers named like its pictures"),
        ("images", "numbers", "numbers/ has numbers named like images/"),
    ):
        with pytest.raises(ValueError, match=rf"{said}.*maps of depth, .*data.map_column={column}"):
            maps(layout)
        assert maps(layout, map_column=(column,)) == [f"{number}.npy" for number in range(4)]
        assert maps(layout, maps="made") == []
        assert [example.maps for example in opened(tmp_path / layout)] == [()] * 4  # of canny


def test_poses_beside_the_pictures(tmp_path: Path) -> None:
    for number in range(2):
        put(tmp_path / f"{number}.jpg", encoded(photograph("cat"), "JPEG"))
        put(tmp_path / f"{number}_keypoints.json", json.dumps({"people": []}))
    examples = opened(tmp_path, "openpose", map_column=("_keypoints",))
    assert [Path(e.maps[0].name).name for e in examples] == ["0_keypoints.json", "1_keypoints.json"]


def test_plain_folders_of_pictures_are_trained_on_as_they_are(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        for place in ("clips/one", "clips/two", "clips/three"):  # frames of the same numbers
            put(tmp_path / place / f"{number}.png", encoded(photograph(name)))
        put(
            tmp_path / "kinds" / ("cats" if number % 2 else "dogs") / f"{name}.png", encoded(photograph(name))
        )
        for place in ("concepts/10_cat", "concepts/10_dog"):
            put(tmp_path / place / f"{number}.png", encoded(photograph(name)))
        put(tmp_path / "ends" / f"{name}.png", encoded(photograph(name)))
        put(tmp_path / "ends" / f"{name}_black.png", encoded(photograph(name)))
        put(tmp_path / "beside" / "images" / f"{number}.png", encoded(photograph(name)))
        put(tmp_path / "beside" / "other" / f"{name}.png", encoded(photograph(name)))
        put(tmp_path / "linked" / "images" / f"{name}.png", encoded(photograph(name)))
        put(tmp_path / "round" / f"{name}.png", encoded(photograph(name)))
    (tmp_path / "linked" / "latest").symlink_to("images")
    (tmp_path / "round" / "again").symlink_to(".")
    put(tmp_path / "ends" / "my_canny.png", encoded(edges("cat")))  # of no picture
    counts = {"clips": 12, "kinds": 4, "concepts": 8, "ends": 9, "beside": 4, "linked": 4, "round": 4}
    assert {place: len(opened(tmp_path / place)) for place in counts} == counts


def test_maps_of_another_kind_beside_pictures_are_no_pictures(tmp_path: Path) -> None:
    put_pairs(tmp_path, "{}.png", "{}_canny.png")
    for name in NAMES:
        put(tmp_path / f"{name}_depth.png", encoded(photograph(name)))
    assert has_pairs(opened(tmp_path))
    assert names(opened(tmp_path, "softedge")) == [f"{name}.png" for name in sorted(NAMES)]
    assert opened(tmp_path, "softedge")[0].maps == ()
    said: list[str] = []
    open_examples(DataRecipe(source=str(tmp_path)), kind="canny", report=said.append)
    assert said[1].endswith("4 are left out as maps of others by their names, such as astronaut_depth.png")
    with pytest.raises(ValueError, match=r"data.map_column=_canny; to leave them out, with data.maps=made"):
        opened(tmp_path, "")
    pieces = opened(tmp_path, "both", map_column=("_canny", "_depth"))[0].maps
    assert [Path(piece.name).name for piece in pieces] == ["astronaut_canny.png", "astronaut_depth.png"]
    (tmp_path / "cat_canny.png").unlink()
    assert len(opened(tmp_path)) == 4
    with pytest.raises(ValueError, match=r"has no map for cat.png"):
        opened(tmp_path)[1].maps[0].read()


def test_a_listing_further_down(tmp_path: Path) -> None:
    """As in a repository of the hub that was cloned."""
    imagefolder(tmp_path / "data" / "train")
    put(tmp_path / "README.md", "a repository")
    put(tmp_path / ".git" / "a" / "metadata.jsonl", "")
    assert is_whole(opened(tmp_path))
    imagefolder(tmp_path / "data" / "test")
    assert is_whole(opened(tmp_path))
    assert is_whole(opened(tmp_path, split="test"))
    with pytest.raises(
        ValueError, match=r"several data sets, of which one .*data.source=\S+/data/test or data"
    ):
        opened(tmp_path, split="validation")


def test_a_listing_of_a_few_pictures_does_not_stand_for_all(tmp_path: Path) -> None:
    """Four captioned pictures, and far below them somebody's old listing of one."""
    for name in NAMES:
        put(tmp_path / f"{name}.png", encoded(photograph(name)))
        put(tmp_path / f"{name}.txt", CAPTIONS[name])
    put(tmp_path / "other" / "old" / "q.png", encoded(photograph("cat")))
    put(tmp_path / "other" / "old" / "metadata.jsonl", jsonl([{"file_name": "q.png", "text": "x"}]))
    with pytest.raises(
        ValueError,
        match=r"metadata.jsonl lists pictures, and 4 of 5 in \S+ lie elsewhere: .*data.source=\S+old",
    ):
        opened(tmp_path)
    assert len(opened(tmp_path, format="paired")) == 5
    assert len(opened(tmp_path / "other" / "old")) == 1


def test_options_that_have_no_use_are_said(tmp_path: Path) -> None:
    """The recipes of the families give canny's thresholds; the data has maps of its own."""
    put_pairs(tmp_path / "set", "images/{}.png", "conditioning/{}.png")
    options = {"low": "50..150", "high": "150..300"}
    for maps in ("auto", "files"):
        said: list[str] = []
        data = DataRecipe(source=str(tmp_path / "set"), options=options, maps=maps)
        assert has_pairs(open_examples(data, kind="canny", report=said.append))
        assert (
            said[-1] == "data.options: low and high are not used, for the maps are read from files, not made"
        )


@pytest.mark.parametrize("name", ["sd15-canny", "sd21-canny", "sdxl-canny"])
def test_the_families_recipes_take_the_maps_that_there_are(tmp_path: Path, name: str) -> None:
    put_pairs(tmp_path / "set", "images/{}.png", "conditioning/{}.png")
    recipe = load_recipe(name, [f"data.source={tmp_path / 'set'}"])
    assert isinstance(recipe, ControlNetRecipe)
    examples = open_examples(recipe.data, kind=recipe.map)
    visits = Visits(examples, [(128, 96)] * 4, data=recipe.data, kind=recipe.map, resolution=64, seed=0)
    assert (visits.made, visits.fixed) == (False, True)
    assert visits.pieces(0)[0].name == str(tmp_path / "set/conditioning/astronaut.png")


def test_maps_that_are_there_and_not_used_are_said(tmp_path: Path) -> None:
    imagefolder(tmp_path / "rows")
    members = {k: v for name in NAMES for k, v in members_of(name).items()}
    put_shard(tmp_path / "shards.tar", members)
    for source, unused in (("rows", "conditioning_image_file_name"), ("shards.tar", "map.png")):
        said: list[str] = []
        data = DataRecipe(source=str(tmp_path / source), maps="made")
        assert open_examples(data, kind="canny", report=said.append)[0].maps == ()
        assert said[0].endswith(f"are made of the pictures (data.maps=made): {unused} is not used")


def test_captions_of_names_that_look_alike(tmp_path: Path) -> None:
    for number, (picture, caption) in enumerate(
        [("für.png", "für.txt"), ("über.png", "über.txt"), ("up.PNG", "up.TXT"), ("b.png", "b.Caption")]
    ):
        put(tmp_path / unicodedata.normalize("NFC", picture), encoded(photograph(NAMES[number])))
        put(tmp_path / unicodedata.normalize("NFD", caption), f"{number}")
    put(tmp_path / "none.png", encoded(photograph("cat")))
    captions = {unicodedata.normalize("NFC", example.name): example.caption for example in opened(tmp_path)}
    assert captions == {"für.png": "0", "über.png": "1", "up.PNG": "2", "b.png": "3", "none.png": ""}


def test_names_that_look_alike_are_alike(tmp_path: Path) -> None:
    """macOS writes an umlaut as a letter and two dots."""
    put(tmp_path / unicodedata.normalize("NFC", "für.png"), encoded(photograph("cat")))
    put(tmp_path / "conditioning" / unicodedata.normalize("NFD", "für.png"), encoded(edges("cat")))
    (example,) = opened(tmp_path)
    assert np.array_equal(pixels(example.maps[0]), edges("cat"))


def test_what_preprocess_writes(tmp_path: Path) -> None:
    for name in NAMES[:2]:
        put(tmp_path / "photos" / f"{name}.png", encoded(photograph(name)))
        put(tmp_path / "photos" / f"{name}.txt", CAPTIONS[name])
    job = folder_job.plan(["canny", "shuffle"], [str(tmp_path / "photos")], {}, output=str(tmp_path / "set"))
    folder_job.run(job, _Silent())
    examples = opened(tmp_path / "set", "canny")
    assert [example.caption for example in examples] == [CAPTIONS[name] for name in NAMES[:2]]
    assert all(np.array_equal(pixels(e.maps[0]), edges(n)) for e, n in zip(examples, NAMES, strict=False))
    assert opened(tmp_path / "set", "shuffle")[0].maps[0].name.endswith("shuffle/astronaut.png")
    assert opened(tmp_path / "set", "openpose")[0].maps == ()


def test_poses(tmp_path: Path) -> None:
    put(tmp_path / "p.json", '{"people": []}')
    row = {
        "file_name": "a.png",
        "openpose_file_name": "p.png",
        "openpose_json": "p.json",
        "pose": {"people": []},
    }
    put(tmp_path / "metadata.jsonl", jsonl([row]))
    for column in ("openpose_json", "pose"):
        (example,) = opened(tmp_path, "openpose", map_column=(column,))
        content = example.maps[0].read()
        assert isinstance(content, bytes)
        assert json.loads(content) == {"people": []}


class _Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


# --- paired folders ---


@pytest.mark.parametrize(
    ("pictures", "maps"),
    [("images", "conditioning"), ("", "canny"), ("img", "maps"), (".", "conditioning_data_dir")],
)
def test_paired_folders(tmp_path: Path, pictures: str, maps: str) -> None:
    put_pictures(tmp_path, pictures=pictures, maps=maps)
    for name in NAMES[:-1]:
        put(tmp_path / pictures / f"{name}{'.caption' if name == 'cat' else '.txt'}", f"{CAPTIONS[name]}\n")
    examples = opened(tmp_path)
    expected = sorted(NAMES)
    assert [Path(name).stem for name in names(examples)] == expected
    for example, name in zip(examples, expected, strict=True):
        assert np.array_equal(pixels(example.picture), photograph(name))
        assert np.array_equal(pixels(example.maps[0]), edges(name))
        assert example.caption == CAPTIONS[name]


def test_paired_folders_below_folders(tmp_path: Path) -> None:
    for place in ("10_cat", "10_dog"):
        put(tmp_path / place / "a.jpg", encoded(photograph("cat"), "JPEG"))
        put(tmp_path / "conditioning" / place / "a.webp", encoded(edges("cat"), "WEBP"))
    put(tmp_path / "10_cat" / "b.jpg", encoded(photograph("cat"), "JPEG"))
    put(tmp_path / "conditioning" / "b.json", json.dumps({"people": []}))
    examples = opened(tmp_path)
    assert names(examples) == ["10_cat/a.jpg", "10_cat/b.jpg", "10_dog/a.jpg"]
    tails = [
        Path(example.maps[0].name).relative_to(tmp_path / "conditioning").as_posix() for example in examples
    ]
    assert tails == ["10_cat/a.webp", "b.json", "10_dog/a.webp"]
    put(tmp_path / "10_dog" / "b.jpg", encoded(photograph("cat"), "JPEG"))
    for number in (1, 3):  # whose map is conditioning/b.json now?
        with pytest.raises(ValueError, match=r"has no map for 10_(cat|dog)/b.jpg"):
            opened(tmp_path)[number].maps[0].read()


def test_folders_with_kohyas_repeats_are_named(tmp_path: Path) -> None:
    for folder in ("2024_holiday", "10_cat", "3_dog"):
        put(tmp_path / folder / "a.png", encoded(photograph("cat")))
    said: list[str] = []
    data = DataRecipe(source=str(tmp_path), maps="made")
    assert len(open_examples(data, kind="canny", report=said.append)) == 3
    assert not [note for note in said if "2024" in note]
    assert [note for note in said if "10_cat/ is named as kohya's folders with repeats are" in note]


@pytest.mark.parametrize("beside", ["", "images"])
def test_what_trainings_wrote_among_pictures_is_left_out_and_told(beside: str, tmp_path: Path) -> None:
    put_pictures(tmp_path, pictures=beside or ".", maps="canny")
    for run in ("deep/first", "second"):
        put(tmp_path / beside / run / "config.toml", "")
        put(tmp_path / beside / run / "metrics.jsonl", "")
        put(tmp_path / beside / run / "samples" / "step-1.png", encoded(photograph("cat")))
    put(tmp_path / beside / "third" / "config.toml", "")  # of another tool: no run
    put(tmp_path / beside / "third" / "cat.png", encoded(photograph("cat")))
    put(tmp_path / "canny" / "third" / "cat.png", encoded(edges("cat")))
    said: list[str] = []
    examples = open_examples(DataRecipe(source=str(tmp_path)), kind="canny", report=said.append)
    assert len([name for name in names(examples) if name.endswith("cat.png")]) == 2
    (told,) = [line for line in said if "left out" in line]
    assert told.endswith("deep/first/ and 1 more left out: trainings wrote them (a config.toml is there)")


def test_paired_folders_with_depth_in_numbers_and_openposes_names(tmp_path: Path) -> None:
    put_pictures(tmp_path, pictures="images", maps="maps")
    maps = tmp_path / "maps"
    contents = {"astronaut.npy": b"", "cat.exr": b"", "coffee_keypoints.json": '{"people": []}'}
    for name, content in contents.items():
        (maps / f"{name.partition('.')[0].removesuffix('_keypoints')}.png").unlink()
        put(maps / name, content)
    put(maps / "rocket.npy", b"")  # beside rocket.png, which goes first
    expected = [*contents, "rocket.png"]
    examples = opened(tmp_path)
    assert [Path(example.maps[0].name).name for example in examples] == expected
    put(tmp_path / "images" / "coffee_keypoints.png", encoded(photograph("coffee")))  # whose map is it now?
    examples = opened(tmp_path)
    assert Path(examples[3].maps[0].name).name == "coffee_keypoints.json"
    with pytest.raises(ValueError, match=r"no map for coffee.png: .* is wanted \(for depth .npy, .* .json"):
        examples[2].maps[0].read()


def test_poses_are_no_maps_of_another_kind(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(photograph("cat")))
    put(tmp_path / "conditioning" / "a.json", '{"people": []}')
    for kind in ("", "openpose", "my_pose", "mine"):
        assert len(opened(tmp_path, kind=kind)) == 1
    for kind in ("depth", "canny", "midas"):
        with pytest.raises(ValueError, match=f"a.json holds a pose, which is drawn, and maps of {kind} are"):
            opened(tmp_path, kind=kind)
    put(tmp_path / "depth" / "a.png", encoded(edges("cat")))
    columns = ("depth", "conditioning")  # of a stack each column says what it is
    assert len(opened(tmp_path, kind="canny", map_column=columns)) == 1
    (tmp_path / "depth" / "a.png").rename(tmp_path / "depth" / "a.json")
    with pytest.raises(ValueError, match="maps of depth are wanted"):
        opened(tmp_path, kind="canny", map_column=columns)


def test_paired_folders_with_faults(tmp_path: Path) -> None:
    put_pictures(tmp_path / "set", pictures="images", maps="maps")
    (tmp_path / "set" / "maps" / "cat.png").unlink()
    put(tmp_path / "set" / "maps" / "coffee.jpg", encoded(edges("coffee"), "JPEG"))
    put(tmp_path / "set" / "images" / "rocket.txt", b"\xff\xfe")
    put(tmp_path / "secret.txt", "secret")
    os.symlink(tmp_path / "secret.txt", tmp_path / "set" / "images" / "astronaut.txt")
    astronaut, cat, coffee, rocket = opened(tmp_path / "set")
    for piece, problem in [
        (astronaut.picture, "astronaut.txt leads out of the data set"),
        (cat.maps[0], "has no map for cat.png"),
        (coffee.maps[0], "has several maps for coffee.png: coffee.jpg, coffee.png"),
        (rocket.picture, "rocket.txt is not UTF-8 text"),
    ]:
        with pytest.raises(ValueError, match=problem):
            piece.read()
    assert astronaut.caption == ""


def test_paired_folders_with_links(tmp_path: Path) -> None:
    put_pictures(tmp_path / "set", pictures="images", maps="maps")
    put(tmp_path / "elsewhere" / "x.png", encoded(photograph("cat")))
    os.symlink(tmp_path / "elsewhere" / "x.png", tmp_path / "set" / "images" / "x.png")
    linked = opened(tmp_path / "set")[-1]
    with pytest.raises(ValueError, match=r"x.png leads out of the data set"):
        linked.picture.read()
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "images" / "more")
    with pytest.raises(ValueError, match=r"more leads out of the data set"):
        opened(tmp_path / "set")


def test_names_within_may_be_absolute(tmp_path: Path) -> None:
    name = str(tmp_path / "set" / "a.png")
    _, absolute, climbing = rows_of(
        tmp_path / "set",
        {"file_name": name, "text": "x", "hint": name},
        {"file_name": f"{tmp_path}/set/../set2/a.png", "text": "x", "hint": "a.png"},
    )
    assert pixels(absolute.picture).shape == pixels(absolute.maps[0]).shape == (96, 128, 3)
    assert opened(tmp_path / "set").leftovers() == []
    with pytest.raises(ValueError, match="leads out"):
        climbing.picture.read()


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    """Its files are links to blobs beside it; links to anything else are followed no more than elsewhere."""
    cached = tmp_path / "hub" / "datasets--me--cats"
    put(cached / "blobs" / "1f", encoded(photograph("cat")))
    put(cached / "blobs" / "2f", jsonl([{"file_name": f"{n}.png", "text": "x"} for n in "ab"]))
    put(tmp_path / "hub" / "secret.png", encoded(photograph("cat")))
    snapshot = cached / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name, target in (("a.png", "../../blobs/1f"), ("metadata.jsonl", "../../blobs/2f")):
        (snapshot / name).symlink_to(target)
    (snapshot / "b.png").symlink_to("../../../secret.png")
    good, bad = opened(snapshot)
    assert pixels(good.picture).shape == (96, 128, 3)
    with pytest.raises(ValueError, match="leads out"):
        bad.picture.read()


def test_which_folder_of_maps(tmp_path: Path) -> None:
    put_pictures(tmp_path, pictures="images", maps="canny")
    put_pictures(tmp_path, pictures="images", maps="depth")
    assert "depth" in opened(tmp_path, "depth")[0].maps[0].name
    assert opened(tmp_path, "softedge")[0].maps == ()
    assert len(opened(tmp_path, "x", map_column=("canny", "depth"))[0].maps) == 2
    with pytest.raises(ValueError, match=r"several folders that may hold the maps.*canny, depth"):
        opened(tmp_path, "")
    with pytest.raises(ValueError, match=r"no folder 'dept' \(did you mean 'depth'\?\)"):
        opened(tmp_path, "depth", map_column=("dept",))
    with pytest.raises(ValueError, match=r"no folder with maps of softedge"):
        opened(tmp_path, "softedge", maps="files")


# --- shards ---


def put_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def members_of(name: str, *, map_name: str = "map.png") -> dict[str, bytes]:
    caption = {"txt": CAPTIONS[name].encode()} if name != "cat" else {"json": b'{"prompt": "a cat", "w": 1}'}
    members = {"png": encoded(photograph(name)), map_name: encoded(edges(name)), **caption}
    return {f"./{name}.{member}": content for member, content in members.items()}


@pytest.mark.parametrize("map_name", ["map.png", "cond.png", "conditioning.png", "hint.png", "canny.png"])
def test_shards(tmp_path: Path, map_name: str) -> None:
    for number, pair in enumerate((NAMES[:3], NAMES[3:])):
        members = {k: v for name in pair for k, v in members_of(name, map_name=map_name).items()}
        put_shard(tmp_path / "shards" / f"{number:04d}.tar", members)
    shutil.copytree(tmp_path / "shards", tmp_path / "shards [2]")
    assert len(opened(tmp_path / "shards [2]/*.tar")) == len(opened(tmp_path / "shards"))
    for source in ("shards", "shards/*.tar", "shards/{0000..0001}.tar", "shards/000{0,1}.tar"):
        examples = opened(tmp_path / source)
        assert is_whole(examples), source
        assert names(examples)[3] == f"{tmp_path}/shards/0001.tar/rocket"
    assert examples[3].picture.name == f"{tmp_path}/shards/0001.tar/rocket.png"
    assert names(opened(tmp_path / "shards/0001.tar")) == names(examples)[3:]


def test_members_by_name(tmp_path: Path) -> None:
    members = {
        "a/1.photo.JPG": b"p",
        "a/1.d1.png": b"m",
        "a/1.d2.json": b"{}",
        "a/1.meta.json": b'{"t": "x"}',
    }
    put_shard(tmp_path / "x.tar", members | {"a/__skip": b"", ".hidden.jpg": b""})
    settings = {"picture_column": "photo", "map_column": ("d1", "d2.json"), "caption_column": "meta.json"}
    (example,) = opened(tmp_path / "x.tar", **settings)
    assert [piece.read() for piece in (example.picture, *example.maps)] == [b"p", b"m", b"{}"]
    with pytest.raises(ValueError, match=r"data.map_column: .* has no member 'd3'.*photo.jpg, d1.png"):
        opened(tmp_path / "x.tar", **{**settings, "map_column": ("d3",)})
    with pytest.raises(ValueError, match=r"no member of the shards is a picture.*photo.jpg"):
        opened(tmp_path / "x.tar")
    put_shard(tmp_path / "y.tar", {"1.jpg": b"p", "1.json": b'{"t": ["x", "y"]}', "2.png": b"q"})
    examples = opened(tmp_path / "y.tar", caption_column="t")
    assert [(example.picture.read(), example.caption) for example in examples] == [(b"p", "x"), (b"q", "")]
    with pytest.raises(
        ValueError, match=r"caption_column: .* no member 'txt'; .* json, png, and .* key \(t\)"
    ):
        opened(tmp_path / "y.tar", caption_column="txt")
    put_shard(tmp_path / "z.tar", {"1.jpg": b"p", "1.caption": b"x"})
    with pytest.raises(ValueError, match=r"no member 'captoin' \(did you mean 'caption'\?\); members: jpg"):
        opened(tmp_path / "z.tar", caption_column="captoin")
    put_shard(tmp_path / "broken.tar", {"1.jpg": b"p", "1.json": b"{"})
    assert (
        len(opened(tmp_path / "broken.tar", caption_column="t")) == 1
    )  # the example is named when it is read


def test_shards_with_pictures_that_may_be_maps(tmp_path: Path) -> None:
    put_shard(tmp_path / "x.tar", {"1.image.jpg": b"p", "1.edge.png": b"m", "1.txt": b"x"})
    with pytest.raises(ValueError, match=r"pictures in edge.png, too: .*data.map_column=edge.png"):
        opened(tmp_path / "x.tar")
    assert opened(tmp_path / "x.tar", map_column=("edge",))[0].maps[0].read() == b"m"
    assert opened(tmp_path / "x.tar", maps="made")[0].maps == ()
    put_shard(tmp_path / "y.tar", {"1.jpg": b"p", "1.depth.png": b"m"})
    assert opened(tmp_path / "y.tar", kind="canny")[0].maps == ()  # of another kind, as its name says
    assert opened(tmp_path / "y.tar", kind="")[0].maps[0].read() == b"m"  # the one, where none is asked for
    put_shard(tmp_path / "z.tar", {"1.jpg": b"p", "1.depth.png": b"m", "1.canny.png": b"n"})
    with pytest.raises(
        ValueError, match=r"z\.tar has maps of several kinds: .*data.map_column: depth, canny"
    ):
        opened(tmp_path / "z.tar", kind="")


def test_shards_with_two_pictures_of_one_name(tmp_path: Path) -> None:
    put_shard(tmp_path / "x.tar", {"1.jpg": b"p", "1.png": b"m", "1.txt": b"x", "2.jpg": b"q", "3.png": b"n"})
    with pytest.raises(ValueError, match=r"x.tar: 1 has jpg and png: if the png are .*data.map_column=png;"):
        opened(tmp_path / "x.tar")
    examples = opened(tmp_path / "x.tar", map_column=("png",))
    assert [piece.read() for piece in (examples[0].picture, *examples[0].maps)] == [b"p", b"m"]
    with pytest.raises(ValueError, match="is not there"):
        examples[2].picture.read()
    assert opened(tmp_path / "x.tar", maps="made")[0].maps == ()
    put_shard(tmp_path / "y.tar", {"1.jpg": b"p", "2.png": b"q"})
    assert [example.picture.read() for example in opened(tmp_path / "y.tar")] == [b"p", b"q"]


@pytest.mark.parametrize(
    ("picture", "other", "said"),
    [
        ("1.jpg", "1_canny.jpg", "1_canny seems to be a map of another example"),
        ("images/1.jpg", "conditioning/1.jpg", "conditioning/ seems to hold maps of other examples"),
    ],
)
def test_shards_whose_maps_have_names_of_their_own(
    tmp_path: Path, picture: str, other: str, said: str
) -> None:
    put_shard(tmp_path / "x.tar", {picture: b"p", other: b"m"})
    with pytest.raises(ValueError, match=f"{said}: .*data.maps=made"):
        opened(tmp_path / "x.tar")
    assert len(opened(tmp_path / "x.tar", maps="made")) == 2
    put_shard(tmp_path / "y.tar", {"a/1.jpg": b"p", "b/1.jpg": b"q", "1_b.jpg": b"r"})
    assert len(opened(tmp_path / "y.tar")) == 3


def test_links_beside_the_pictures_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "set" / "images" / "a.png", encoded(photograph("cat")))
    put(tmp_path / "elsewhere" / "a.png", encoded(edges("cat")))
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "edges")
    assert len(opened(tmp_path / "set", format="paired")) == 1


def test_captions_of_shards_may_have_a_name_and_a_suffix(tmp_path: Path) -> None:
    put_shard(tmp_path / "x.tar", {"1.image.jpg": b"p", "1.canny.png": b"m", "1.caption.txt": b"x"})
    (example,) = opened(tmp_path / "x.tar")
    assert example.caption == "x"


def test_a_shard_that_ends_too_soon_is_told(tmp_path: Path) -> None:
    members = members_of("cat") | members_of("coffee")
    whole = put_shard(tmp_path / "a.tar", members).read_bytes()
    cut = put(tmp_path / "b.tar", whole[: whole.index(b"./coffee.png\0")])  # where a file ends
    for path, told in ((tmp_path / "a.tar", False), (cut, True)):
        said: list[str] = []
        open_examples(DataRecipe(source=str(path)), kind="canny", report=said.append)
        line = f"{path} ends without the mark of a tar file's end: if it was cut off, files are missing"
        assert (line in said) == told


def test_shards_with_faults(tmp_path: Path) -> None:
    whole = put_shard(tmp_path / "a.tar", members_of("cat") | members_of("coffee")).read_bytes()
    cases = {
        "cut.tar": (whole[: len(whole) // 2], "cut.tar (is cut off|cannot be read as a tar file)"),
        "text.tar": (b"<html>" * 1000, "text.tar cannot be read as a tar file"),
        "empty.tar": (b"", "empty.tar cannot be read as a tar file"),
    }
    header = whole.index(b"./coffee.png\0")
    cases["header.tar"] = (whole[:header] + b"X" * 100 + whole[header + 100 :], "header.tar is damaged")
    for name, (content, problem) in cases.items():
        put(tmp_path / name, content)
        with pytest.raises(ValueError, match=problem):
            opened(tmp_path / name)
    put_shard(tmp_path / "b.tar.gz", members_of("cat"), "w:gz")
    with pytest.raises(ValueError, match=r"b.tar.gz is compressed"):
        opened(tmp_path / "b.tar.gz")
    os.rename(tmp_path / "b.tar.gz", tmp_path / "c.tar")
    with pytest.raises(ValueError, match=r"c.tar cannot be read as a tar file"):
        opened(tmp_path / "c.tar")
    with pytest.raises(ValueError, match=r"no.tar cannot be read"):
        opened(tmp_path / "no.tar")
    with pytest.raises(ValueError, match=r"no tar file is there"):
        opened(tmp_path / "no*.tar")
    with pytest.raises(ValueError, match=r"fetch them first"):
        opened("https://example.org/{00..10}.tar")


def test_a_shard_with_a_member_twice_and_links(tmp_path: Path) -> None:
    put(tmp_path / "secret", "secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("1.png", "1.png"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"a.tar holds 1.png twice"):
        opened(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name, target in (("1.png", ""), ("2.png", str(tmp_path / "secret"))):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (tarfile.SYMTYPE, target) if target else (tarfile.REGTYPE, "")
            archive.addfile(info)
    assert names(opened(tmp_path / "b.tar")) == [f"{tmp_path}/b.tar/1"]


def test_a_shard_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = put_shard(tmp_path / "a.tar", members_of("cat"))
    (example,) = opened(path)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"cat.png is cut off"):
        example.picture.read()


def test_broken_captions_in_shards(tmp_path: Path) -> None:
    members = {
        "1.png": b"p",
        "1.json": b"{",
        "2.png": b"p",
        "2.json": b"[]",
        "3.png": b"p",
        "3.json": b'{"text": 1}',
    }
    examples = opened(put_shard(tmp_path / "a.tar", members))
    for example, problem in zip(
        examples, ("1.json is not JSON", "2.json is not a JSON object", "not 1"), strict=True
    ):
        with pytest.raises(ValueError, match=problem):
            example.picture.read()


# --- what is there ---


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    put(tmp_path / "notes.txt", "x")
    cases = {
        "no/such/folder": "no/such/folder does not exist",
        "nowhere": "nowhere does not exist",
        "photos/trian": "photos/trian does not exist; if the hub's .* data.format=huggingface",
        "photos": "photos holds no data set; wanted: a metadata.jsonl",
        "notes.txt": "notes.txt is no data set: name a folder",
    }
    for source, problem in cases.items():
        with pytest.raises(ValueError, match=problem):
            opened(source)
    for format, problem in {
        "imagefolder": "photos has no metadata.jsonl or metadata.csv, which imagefolder wants",
        "fill50k": "photos has no prompt.json",
        "paired": "no picture is there; wanted: a metadata.jsonl",
        "webdataset": "photos: no tar file is there",
    }.items():
        with pytest.raises(ValueError, match=problem):
            opened("photos", format=format)
    put(tmp_path / "photos" / "metadata.jsonl", "\n\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl lists no pictures: it is empty"):
        opened("photos")


def test_archives_in_place_of_a_data_set_are_named(tmp_path: Path) -> None:
    put(tmp_path / "set" / "train.zip", b"PK")
    with pytest.raises(ValueError, match=r"set holds no data set; unpack train.zip; wanted: "):
        opened(tmp_path / "set")


def test_a_file_that_is_missing_shows_when_it_is_read(tmp_path: Path) -> None:
    folder = imagefolder(tmp_path)
    (folder / "images" / "cat.png").unlink()
    examples = opened(folder)
    assert len(examples) == 4
    with pytest.raises(ValueError, match=r"cat.png cannot be read: No such file"):
        examples[2].picture.read()


def test_the_first_so_many(tmp_path: Path) -> None:
    folder = imagefolder(tmp_path)
    assert names(opened(folder, limit=2)) == ["images/astronaut.png", "images/coffee.png"]
    assert len(opened(folder, limit=99)) == 4
    examples = opened(folder, limit=3)
    assert [e.name for e in examples[1:]] == names(examples)[1:]
    assert examples[-1].name == names(examples)[2]
    with pytest.raises(IndexError):
        examples[3]


def test_opening_says_what_was_found_and_reads_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = imagefolder(tmp_path)

    def refuse(self: FilePiece) -> bytes:
        raise AssertionError("read")

    monkeypatch.setattr(FilePiece, "read", refuse)
    said: list[str] = []
    examples = open_examples(DataRecipe(source=str(folder)), kind="canny", report=said.append)
    assert isinstance(examples[0], Example)
    assert said == [f"{folder}/metadata.jsonl: 4 rows, maps from conditioning_image_file_name"]


def test_the_library_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"owner/name is no folder here; .* not installed: uv sync --extra data"
    ):
        opened("owner/name")
    put(tmp_path / "state.json", "{}")
    with pytest.raises(ValueError, match=r"is read by the library datasets, which is not installed"):
        opened(tmp_path)
