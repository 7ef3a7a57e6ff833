"""Splits that are folders of pictures: what is tested on is not trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controlkit.images import write_png
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.sources import open_examples


def put(path: Path, *, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.random.default_rng(seed).integers(0, 256, (80, 96, 3), dtype=np.uint8))


def opened(root: Path, **settings: Any) -> tuple[list[str], list[str], int]:
    """Names of the pictures, what was said, and how many maps belong to no picture."""
    said: list[str] = []
    examples = open_examples(DataRecipe(source=str(root), **settings), kind="canny", report=said.append)
    return [example.name for example in examples], said, len(list(examples.leftovers()))


@pytest.mark.parametrize("other", ["test", "val", "Validation", "valid", "val2017"])
def test_pictures_of_other_splits_are_left_out(tmp_path: Path, other: str) -> None:
    for name in ("train/a", "train/deep/b", f"{other}/c"):
        put(tmp_path / f"{name}.png")
    names, said, _ = opened(tmp_path, maps="made")
    assert names == ["train/a.png", "train/deep/b.png"]
    assert said[-1] == f"{tmp_path}: of the split train; 1 pictures in {other}/ are left out"
    wanted = "test" if other == "test" else "validation"
    assert opened(tmp_path, maps="made", split=wanted)[0] == [f"{other}/c.png"]
    assert opened(tmp_path, maps="made", split=other)[0] == [f"{other}/c.png"]


def test_splits_below_the_folders_of_pictures_and_maps(tmp_path: Path) -> None:
    for name in ("train/a", "val/b"):
        put(tmp_path / "images" / f"{name}.png")
        put(tmp_path / "maps" / f"{name}.png")
    names, _, left = opened(tmp_path)
    assert (names, left) == (["images/train/a.png"], 0)
    assert opened(tmp_path, split="val")[0] == ["images/val/b.png"]
    put(tmp_path / "maps" / "val" / "c.png")
    assert opened(tmp_path)[2] == 1


def test_a_split_with_folders_of_its_own(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / split / "images" / f"{split}.png")
        put(tmp_path / split / "maps" / f"{split}.png")
    assert opened(tmp_path)[0] == ["images/train.png"]
    assert opened(tmp_path, split="validation")[0] == ["images/val.png"]
    with pytest.raises(ValueError, match=r"data.split: \S+ has no folder 'test' .*; folders: train, val$"):
        opened(tmp_path, split="test")


def test_folders_that_are_no_splits_are_trained_on(tmp_path: Path) -> None:
    for name in ("train/a", "bus/b", "c"):
        put(tmp_path / f"{name}.png")
    assert opened(tmp_path, maps="made")[0] == ["bus/b.png", "c.png", "train/a.png"]
    put(tmp_path / "test" / "d.png")
    assert opened(tmp_path, maps="made")[0] == ["bus/b.png", "c.png", "train/a.png"]
    assert opened(tmp_path, maps="made", split="bus")[0] == ["bus/b.png"]
    (tmp_path / "test" / "d.png").rename(tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"data.split: \S+ has no folder 'tets' with pictures; folders: bus"):
        opened(tmp_path, maps="made", split="tets")


def test_a_split_that_is_named_is_not_taken_of_another(tmp_path: Path) -> None:
    put(tmp_path / "train" / "images" / "a.png")
    put(tmp_path / "train" / "maps" / "a.png")
    assert opened(tmp_path)[0] == ["images/a.png"]
    with pytest.raises(ValueError, match=r"data.split: \S+ has no folder 'test'"):
        opened(tmp_path, split="test")


def test_a_listing_of_several_splits(tmp_path: Path) -> None:
    names = [str(tmp_path / "train" / "a.png"), "train\\b.png", "test/c.png", None]
    (tmp_path / "train").mkdir()
    rows = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found, said, _ = opened(tmp_path, maps="made")
    assert found == [*names[:2], f"{tmp_path}/metadata.jsonl, line 4"]  # which is told when read
    assert said[-1] == f"{tmp_path}: of the split train; 1 pictures in test/ are left out"
    assert opened(tmp_path, maps="made", split="test")[0] == ["test/c.png"]
    with pytest.raises(ValueError, match=r"^data.split: \S+ has no folder 'validation' with pictures; "):
        opened(tmp_path, maps="made", split="validation")
    (tmp_path / "metadata.jsonl").rename(tmp_path / "train" / "metadata.jsonl")
    assert opened(tmp_path, maps="made")[0] == [*names[:3], f"{tmp_path}/train/metadata.jsonl, line 4"]


def test_pictures_beside_their_folder_are_named(tmp_path: Path) -> None:
    for name in ("photos/a", "x", "y"):
        put(tmp_path / f"{name}.png")
    names, said, _ = opened(tmp_path, maps="made")
    assert names == ["photos/a.png"]
    assert said[-1] == f"{tmp_path}: 2 pictures beside the folder photos/ are not used, such as x.png"


def test_a_split_that_is_left_out_is_not_taken_for_the_maps_of_another(tmp_path: Path) -> None:
    for name in ("train/1", "train/2", "test/1"):
        put(tmp_path / f"{name}.png")
    assert opened(tmp_path)[0] == ["train/1.png", "train/2.png"]
    (tmp_path / "train" / "1.txt").write_text("a house")
    assert opened(tmp_path)[0] == opened(tmp_path, maps="made")[0] == ["train/1.png", "train/2.png"]
    put(tmp_path / "train_canny" / "1.png")
    with pytest.raises(ValueError, match=r"train_canny/ has pictures named like train/ and no captions"):
        opened(tmp_path)


def test_splits_in_the_one_folder_that_holds_all(tmp_path: Path) -> None:
    for name in ("train/a", "train/deep/b", "test/c"):
        put(tmp_path / "all" / "data" / f"{name}.png")
    names, said, _ = opened(tmp_path, maps="made")
    assert names == ["all/data/train/a.png", "all/data/train/deep/b.png"]
    assert said[-1] == f"{tmp_path}/all/data: of the split train; 1 pictures in test/ are left out"
    assert opened(tmp_path, maps="made", split="test")[0] == ["all/data/test/c.png"]
    with pytest.raises(
        ValueError, match=r"all/data has no folder 'val' with pictures; folders: test, train$"
    ):
        opened(tmp_path, maps="made", split="val")


def test_the_one_split_there_is_has_folders_of_its_own(tmp_path: Path) -> None:
    put(tmp_path / "val" / "images" / "a.png")
    put(tmp_path / "val" / "maps" / "a.png")
    assert opened(tmp_path)[0] == ["images/a.png"]


def test_the_folder_of_a_split_may_be_that_of_the_pictures(tmp_path: Path) -> None:
    for name in ("train/a", "train_maps/a", "test/b", "test_maps/b"):
        put(tmp_path / f"{name}.png")
    named = {"picture_column": "test", "map_column": ["test_maps"], "split": "test"}
    assert opened(tmp_path, **named)[0] == ["test/b.png"]
