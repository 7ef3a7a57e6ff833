"""Data sets of the library `datasets`, written by it and read back; skipped where it is not installed."""

import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from controlkit import images
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.check import check_examples
from controlkit.training.data.examples import Examples
from controlkit.training.data.sources import open_examples, open_stream

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 7


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library prepares goes into a folder of the test's."""
    cache = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))


@functools.cache
def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photographs.astronaut()[number : number + 64, :80]).save(file, "JPEG")
    return file.getvalue()


def png(number: int) -> bytes:
    return images.encode_png(np.full((64, 80, 3), number, np.uint8))


def table(count: int = COUNT, **more: Any) -> Any:
    """A table with a picture, its map and a caption in each row."""
    columns = {
        "image": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(count)],
        "conditioning_image": [{"bytes": png(n), "path": None} for n in range(count)],
        "text": [f"caption {n}" if n else None for n in range(count)],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "conditioning_image": datasets.Image(),
            "text": datasets.Value("string"),
            **{name: feature for name, (_, feature) in more.items()},
        }
    )
    return datasets.Dataset.from_dict(columns | {k: v for k, (v, _) in more.items()}, features=features)


def opened(source: Path | str, **settings: Any) -> Examples:
    return open_examples(DataRecipe(source=str(source), **settings), kind="canny")


def is_whole(examples: Any, numbers: Any = range(COUNT)) -> bool:
    """Whether the examples are the table's rows: the bytes as they went in, in their order."""
    assert len(examples) == len(numbers)
    for n, example in zip(numbers, examples, strict=True):
        assert example.picture.read() == jpeg(n)
        assert [piece.read() for piece in example.maps] == [png(n)]
        assert example.caption == (f"caption {n}" if n else "")
    return True


def test_a_saved_data_set_with_and_without_splits(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "one"))
    examples = opened(tmp_path / "one")
    assert is_whole(examples)
    assert examples[2].name == f"{tmp_path / 'one'} row 2"
    assert examples[2].picture.name == f"{tmp_path / 'one'} row 2, column image"
    assert len(opened(tmp_path / "one", limit=3)) == 3
    datasets.DatasetDict({"train": table(), "test": table(2)}).save_to_disk(str(tmp_path / "two"))
    assert is_whole(opened(tmp_path / "two"))
    assert is_whole(opened(tmp_path / "two", split="test"), range(2))
    with pytest.raises(ValueError, match=r"has no 'tset' \(did you mean 'test'\?\); splits: train, test"):
        opened(tmp_path / "two", split="tset")
    check = check_examples(examples, data=DataRecipe(source=str(tmp_path / "one")), kind="canny")
    assert check.sizes == [(80, 64)] * COUNT
    assert [finding.code for finding in check.findings] == ["no caption"]


def test_parquet_files(tmp_path: Path) -> None:
    table().to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    assert is_whole(opened(tmp_path / "set"))
    assert is_whole(opened(tmp_path / "set" / "train-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"splits: train"):
        opened(tmp_path / "set", split="test")
    (tmp_path / "set" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"the data set .*set: Parquet magic bytes not found") as caught:
        opened(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_a_table_of_tar_shards_pictures(tmp_path: Path) -> None:
    """As the library, and img2dataset, name the members of shards."""
    columns = {"jpg": "image", "txt": "text", "conditioning_image": "conditioning_image"}
    named = table().rename_columns({old: new for new, old in columns.items() if new != old})
    named.to_parquet(str(tmp_path / "00000.parquet"))
    assert is_whole(opened(tmp_path))


def test_pictures_beside_tables_that_hold_none(tmp_path: Path) -> None:
    """img2dataset's files, with a table of where they came from."""
    datasets.Dataset.from_dict({"url": ["x"], "caption": ["y"]}).to_parquet(str(tmp_path / "00000.parquet"))
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "1.jpg").write_bytes(jpeg(1))
    with pytest.raises(ValueError, match=r"the pictures in files there are read with data.format=paired$"):
        opened(tmp_path)
    assert len(opened(tmp_path, format="paired")) == 1


def test_a_readme_that_is_no_card_is_one_line(tmp_path: Path) -> None:
    table().to_parquet(str(tmp_path / "0.parquet"))
    for text in ("---\ndataset_info: [x]\n---\n", "---\na: [\n---\n"):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match=r"^the data set \S+ cannot be read: [^\n]+$"):
            opened(tmp_path)


def test_columns_of_other_sorts(tmp_path: Path) -> None:
    pose = {"people": [{"pose_keypoints_2d": [1.0, 2.0, 3.0] * 18}]}
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    sound = table(
        1,
        raw=([png(3)], datasets.Value("binary")),
        pose=([json.dumps(pose)], datasets.Value("string")),
        array=([array], datasets.Array3D((2, 2, 3), "uint8")),
        people=([pose], {"people": [{"pose_keypoints_2d": [datasets.Value("float32")]}]}),
        nothing=([None], datasets.Value("binary")),
        number=([5], datasets.Value("int64")),
        texts=([["first", "second"]], [datasets.Value("string")]),
    )
    sound.save_to_disk(str(tmp_path / "set"))
    columns = ("raw", "pose", "array", "people", "nothing", "number")
    (example,) = opened(tmp_path / "set", map_column=columns, caption_column="texts")
    raw, text, picture, people, *bad = example.maps
    assert raw.read() == png(3)
    for piece in (text, people):
        content = piece.read()
        assert isinstance(content, bytes)
        assert json.loads(content) == pose
    assert np.array_equal(picture.read(), array)
    for piece, what in zip(bad, ("nothing", "int"), strict=True):
        with pytest.raises(ValueError, match=rf"row 0, column n\w+ holds {what}, no picture"):
            piece.read()
    assert example.caption == "first"
    with pytest.raises(
        ValueError, match=r"has no column 'imgae' \(did you mean 'image'\?\); columns: image, cond"
    ):
        opened(tmp_path / "set", picture_column="imgae")
    with pytest.raises(ValueError, match=r"a caption is a text, not 5"):
        opened(tmp_path / "set", caption_column="number")[0].picture.read()


def test_files_that_rows_name_are_read_inside_the_data_set_only(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (tmp_path / "secret.png").write_bytes(png(1))
    names = [str(tmp_path / "secret.png"), str(folder / "own.png"), "../secret.png", "own.png", "/etc/passwd"]
    names += ["hf://datasets/other/set@main/x.png", f"hf://datasets/{folder}/../x.png"]
    rows = {"image": [{"bytes": None, "path": name} for name in names]}
    given = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    folder.mkdir()
    # Not to_parquet: it would put the files into the table.
    parquet.write_table(given.data.table, str(folder / "train.parquet"))
    (folder / "own.png").write_bytes(png(2))
    examples = opened(folder, maps="made")
    for number in (1, 3):
        assert examples[number].picture.read() == png(2)
    for number in (0, 2, 4, 5, 6):
        with pytest.raises(ValueError, match=r"(lies outside of|leads out of) the data set and is not read"):
            examples[number].picture.read()


def test_the_hub_that_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"the data set nobody/nothing|no data set nobody/nothing") as caught:
        opened("nobody/nothing")
    assert "\n" not in str(caught.value)


# --- streams ---


def windows(source: Path, size: int, count: int, **settings: Any) -> list[list[str]]:
    stream = open_stream(DataRecipe(source=str(source), streaming=True, **settings), kind="canny")
    return [[example.name.rpartition(" ")[2] for example in stream.window(k, size)] for k in range(count)]


def test_a_stream_repeats_without_end(tmp_path: Path) -> None:
    table().to_parquet(str(tmp_path / "set" / "train.parquet"))
    stream = open_stream(DataRecipe(source=str(tmp_path / "set"), streaming=True), kind="canny")
    assert stream.length is None
    assert is_whole(stream.window(0, 3), range(3))
    assert stream.length is None
    for k in range(1, 8):
        assert is_whole(stream.window(k, 3), [n % COUNT for n in range(3 * k, 3 * k + 3)])
    assert stream.length == COUNT
    assert windows(tmp_path / "set", 10, 1)[0] == [str(n % COUNT) for n in range(10)]
    assert windows(tmp_path / "set", 4, 2, limit=3) == [["0", "1", "2", "0"], ["1", "2", "0", "1"]]


@pytest.mark.parametrize("length", [None, COUNT])
@pytest.mark.parametrize("start", [1, 2, 3, 7, 20])
def test_a_resumed_stream_gives_the_same(tmp_path: Path, start: int, length: int | None) -> None:
    table().to_parquet(str(tmp_path / "set" / "train.parquet"))
    stream = open_stream(DataRecipe(source=str(tmp_path / "set"), streaming=True), kind="canny")
    stream.length = length
    for k in (start, start + 1, start, 0):  # further, again, and back
        assert is_whole(stream.window(k, 3), [n % COUNT for n in range(3 * k, 3 * k + 3)])


def test_a_stream_that_has_changed(tmp_path: Path) -> None:
    table().to_parquet(str(tmp_path / "set" / "train.parquet"))
    for length in (COUNT - 1, COUNT + 1):
        stream = open_stream(DataRecipe(source=str(tmp_path / "set"), streaming=True), kind="canny")
        stream.length = length
        assert len(stream.window(0, 6)) == 6
        with pytest.raises(ValueError, match="the data has changed"):
            stream.window(1, 6)


def test_streams_of_other_sorts(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    stream = open_stream(DataRecipe(source=str(tmp_path / "saved"), streaming=True), kind="canny")
    assert is_whole(stream.window(0, COUNT))
    folder = tmp_path / "folder"
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(COUNT):
        (folder / f"images/{n}.jpg").write_bytes(jpeg(n))
        (folder / f"images/{n}.png").write_bytes(png(n))
        row = {"file_name": f"images/{n}.jpg", "conditioning_image_file_name": f"images/{n}.png"}
        rows.append(json.dumps(row | {"text": f"caption {n}" if n else None}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    stream = open_stream(DataRecipe(source=str(folder), streaming=True), kind="canny")
    assert is_whole(stream.window(0, COUNT))
    assert is_whole(opened(folder, format="huggingface"))
    with pytest.raises(ValueError, match=r"data.map_column: .* has no column 'nope'"):
        open_stream(DataRecipe(source=str(folder), streaming=True, map_column="nope"), kind="canny")


def test_columns_of_a_stream_that_may_be_maps_are_asked_about(tmp_path: Path) -> None:
    """As those of the same table are that is read in any order."""
    edges = [{"bytes": png(n), "path": None} for n in range(COUNT)]
    plain = table(edges=(edges, datasets.Image()), width=([3] * COUNT, datasets.Value("int64")))
    plain.remove_columns("conditioning_image").to_parquet(str(tmp_path / "set" / "train.parquet"))
    said: list[str] = []

    def stream(**settings: Any) -> Any:
        data = DataRecipe(source=str(tmp_path / "set"), streaming=True, **settings)
        return open_stream(data, kind="canny", report=said.append)

    for opening in (stream, lambda: opened(tmp_path / "set")):
        with pytest.raises(ValueError, match=r"pictures in edges, too: .*data.map_column=edges; "):
            opening()
    assert is_whole(stream(map_column=("edges",)).window(0, 3), range(3))
    assert not any(example.maps for example in stream(maps="made").window(0, 3))
    table().to_parquet(str(tmp_path / "set" / "train.parquet"))
    stream(maps="made")
    assert said[-1].endswith("are made of the pictures (data.maps=made): conditioning_image is not used")
    stream(options={"low": "50..150"})
    assert said[-1] == "data.options: low is not used, for the maps are read from files, not made"


def test_a_column_of_several_pictures_is_asked_about(tmp_path: Path) -> None:
    pairs = [[{"bytes": png(n), "path": None}] * 2 for n in range(COUNT)]
    several = table(edges=(pairs, datasets.List(datasets.Image())))
    several.remove_columns("conditioning_image").save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"pictures in edges, too: .*data.map_column=edges; to have"):
        opened(tmp_path)
    assert opened(tmp_path, maps="made")[0].picture.read() == jpeg(0)


def test_a_saved_data_set_of_no_rows(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^the data set \S+ cannot be read: it is empty, or not whole \("):
        opened(tmp_path / "none")


def test_an_empty_stream(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "set")
    table(0).to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(ValueError, match=r"no rows|no picture is there|cannot be read"):
        open_stream(DataRecipe(source=str(tmp_path / "set"), streaming=True), kind="canny").window(0, 2)
