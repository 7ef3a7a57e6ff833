"""A training on a stream: what a checkpoint keeps of it, and that a resumed run reads on where it was."""

import io
import json
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from killed_runs import recipe, write_base
from safetensors.torch import load_file

from controlkit import images
from controlkit.base import Base
from controlkit.figures import render
from controlkit.training import train_recipe
from controlkit.training.config import load_recipe
from controlkit.training.config_adapter import ControlNetRecipe, DataRecipe
from controlkit.training.data import source_streams
from controlkit.training.data.source_streams import Stream, open_stream
from controlkit.training.data.streamed import StreamFeed

datasets = pytest.importorskip("datasets")
ROWS = 23


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library prepares goes into a folder of the test's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))


def content(number: int) -> bytes:
    return images.encode_png(np.full((16, 16, 3), number, np.uint8))


def parquet(folder: Path, picture: Any = content) -> None:
    """Three files, of 8, 8 and 7 rows, in groups of 3."""
    for shard, start in enumerate(range(0, ROWS, 8)):
        numbers = range(start, min(start + 8, ROWS))
        columns = {
            "image": [{"bytes": picture(n), "path": None} for n in numbers],
            "text": [f"caption {n}" for n in numbers],
        }
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / f"train-{shard}.parquet"), batch_size=3)


def saved(folder: Path) -> None:
    columns = {"image": [content(n) for n in range(ROWS)], "text": [f"caption {n}" for n in range(ROWS)]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))


def imagefolder(folder: Path) -> None:
    folder.mkdir()
    rows = []
    for n in range(ROWS):
        (folder / f"{n:02d}.png").write_bytes(content(n))
        rows.append(json.dumps({"file_name": f"{n:02d}.png", "text": f"caption {n}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def shards(folder: Path) -> None:
    folder.mkdir()
    for shard, start in enumerate(range(0, ROWS, 8)):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for n in range(start, min(start + 8, ROWS)):
                for suffix, part in (("png", content(n)), ("txt", f"caption {n}".encode())):
                    info = tarfile.TarInfo(f"{n:02d}.{suffix}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))


SORTS = {"parquet": parquet, "saved": saved, "imagefolder": imagefolder, "shards": shards}


def opened(folder: Path, **settings: Any) -> Stream:
    columns = {"picture_column": "png", "caption_column": "txt"} if (folder / "0.tar").exists() else {}
    return open_stream(DataRecipe(source=str(folder), streaming=True, **columns, **settings), kind="canny")


def numbers(stream: Stream, window: int, size: int) -> list[int]:
    examples = stream.window(window, size)
    return [int(images.load_picture(example.picture.read())[0, 0, 0]) for example in examples]


@pytest.mark.parametrize(
    ("limit", "knows_length"),  # with a length that is known it begins within a lap
    [
        (13, True),
        *(pytest.param(*way, marks=pytest.mark.slow) for way in ((0, True), (0, False), (13, False))),
    ],
)
@pytest.mark.parametrize("sort", SORTS)
def test_a_stream_goes_on_from_its_state_as_if_it_had_not_stopped(
    tmp_path: Path, sort: str, limit: int, knows_length: bool
) -> None:
    SORTS[sort](tmp_path / "set")
    size, count = 5, limit or ROWS
    first = opened(tmp_path / "set", limit=limit)
    first.restore({**first.state(0), "length": count if knows_length else None})
    for window in [*range(12), 20] if not knows_length else [4, 5, 20, 21, 22]:
        expected = [n % count for n in range(window * size, (window + 1) * size)]
        assert numbers(first, window, size) == expected
        for position in (window * size, (window + 1) * size):
            state = json.loads(json.dumps(first.state(position)))
            assert (state["position"], state["in_lap"] % count) == (position, position % count)
            other = opened(tmp_path / "set", limit=limit)
            assert numbers(other, 0, size) == [n % count for n in range(size)]  # as a training does at first
            other.restore(state)
            assert other.length == first.length
            for later in (position // size + 1, position // size, position // size + 4, 1):
                wanted = [n % count for n in range(later * size, (later + 1) * size)]
                assert numbers(other, later, size) == wanted


def test_what_comes_before_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "set")
    first = opened(tmp_path / "set")
    for window in range(9):
        first.window(window, 4)  # 36 rows: into the second lap, 13 rows
    state, early = first.state(36), first.state(20)
    assert (state["length"], state["in_lap"], early["in_lap"]) == (ROWS, 13, 20)
    read: list[int] = []
    real = source_streams.Stream._row

    def noted(self: Stream) -> tuple[int, Any]:
        index, row = real(self)
        read.append(index)
        return index, row

    monkeypatch.setattr(Stream, "_row", noted)
    other = opened(tmp_path / "set")
    other.restore(state)
    other.window(9, 4)
    assert read == [13, 14, 15, 16]
    assert other._reading.state_dict()["examples_iterable"]["examples_iterable"]["examples_iterable"][
        "shard_idx"
    ] in (1, 2)
    read.clear()
    jumping = opened(tmp_path / "set")
    jumping.restore({**first.state(0), "length": ROWS})
    assert numbers(jumping, 5, 4) == [20, 21, 22, 0]
    assert read == [20, 21, 22, 0]  # the library skips what is in between
    monkeypatch.setattr(source_streams, "_version", lambda: "another")
    older = opened(tmp_path / "set")
    older.restore(state)
    assert numbers(older, 9, 4) == [13, 14, 15, 16]


@pytest.mark.parametrize(
    ("limit", "holdout", "held", "said"),
    [
        (0, 3, 3, ""),
        (0, 9, 5, "5 of 23 pairs are held out, not 9: a quarter at most"),
        (0, 40, 5, "5 of 23 pairs are held out, not 40: a quarter at most"),
        (6, 16, 0, "6 pairs are too few to hold some out: what is shown is trained on"),
        (3, 0, 0, ""),
    ],
)
def test_of_a_short_stream_a_quarter_is_held_out_and_never_trained_on(
    tmp_path: Path, limit: int, holdout: int, held: int, said: str
) -> None:
    parquet(tmp_path / "set")
    folder, lines = str(tmp_path / "set"), list[str]()
    given = [f"data.source={folder}", "data.streaming=true", f"data.limit={limit}", "data.buckets=false"]
    settings = load_recipe(
        "sd15-canny", [*given, f"data.holdout={holdout}", "data.resolution=64", "data.shuffle_window=25"]
    )
    assert isinstance(settings, ControlNetRecipe)
    stream = open_stream(settings.data, kind="canny")
    feed = StreamFeed(stream, cast("Base", SimpleNamespace(resolution=64)), settings, report=lines.append)
    pairs = limit or ROWS
    trained = {sample.example.caption for k in range(60) for sample in feed.samples(k)}
    shown = [feed.encoded.examples[index].caption for index in feed.shown]
    assert trained == {f"caption {n}" for n in range(held, pairs)}
    assert shown == [f"caption {n}" for n in range(held or min(4, pairs))]
    assert (feed.held_out, feed.pairs) == (bool(held), pairs - held)
    assert lines == [said] * bool(said)
    assert len(feed.first_maps(99)) == pairs - held


@pytest.mark.slow
def test_a_training_on_a_stream_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [render(number, size=64) for number in range(ROWS)]
    parquet(tmp_path / "set", lambda n: images.encode_png(scenes[n].picture))
    write_base(tmp_path / "base")
    settings = {"data_buckets": False, "data_crop": "centre", "data_streaming": True, "data_workers": 2}
    settings |= {"data_shuffle_window": 6, "data_holdout": 3, "accumulation": 1, "sample_every": 0}
    path = recipe(tmp_path / "run", tmp_path / "set", **settings, steps=14, warmup=2)

    def stop_at(steps: set[int]) -> Any:
        def stop(step: Any) -> None:
            if step.step in steps and not step.message:
                raise KeyboardInterrupt

        return stop

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_recipe(str(path), [f"out={whole}"])
    stops = random.Random(1).sample([2, 4, 6, 8, 10, 12], 3)
    for step in sorted(stops):
        with pytest.raises(KeyboardInterrupt):
            train_recipe(str(path), [f"out={parts}"], progress=stop_at({step}))
    lengths = []
    real = Stream.restore
    monkeypatch.setattr(
        Stream, "restore", lambda self, state: lengths.append(state["length"]) or real(self, state)
    )
    train_recipe(str(path), [f"out={parts}"])
    last = "checkpoints/step-000014"
    for name in ("weights", "optimizer"):
        mine, theirs = (load_file(run / last / f"{name}.safetensors") for run in (parts, whole))
        assert mine.keys() == theirs.keys()
        assert all(bool((mine[key] == theirs[key]).all()) for key in mine)
    states = [json.loads((run / last / "state.json").read_text())["task_state"] for run in (parts, whole)]
    assert states[0] == states[1]
    assert states[0]["length"] == ROWS  # 28 pairs were seen
    facts = [json.loads((run / "facts.json").read_text())["data_pairs"] for run in (parts, whole)]
    assert facts == [ROWS - 3, ROWS - 3]
    assert len(lengths) == 1
