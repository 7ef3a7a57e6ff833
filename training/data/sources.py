"""Where examples come from: recognises a data set by what is there, and opens it.

=============  ==============================================================================================
format         what it is recognised by
=============  ==============================================================================================
imagefolder    metadata.jsonl or metadata.csv, here, in a folder named as the split, or the only one two
               folders down or deeper (data/train/)
fill50k        prompt.json, or another .json file that is named
huggingface    state.json or dataset_dict.json (save_to_disk), .parquet or .arrow files, or "owner/name"
webdataset     .tar files
paired         pictures, with captions beside them and maps of the same names in another folder
=============  ==============================================================================================
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from controlkit import preprocessors
from controlkit.naming import first_of
from controlkit.picture_files import DEPTH_SUFFIXES, SUFFIXES, unread_below, unread_lines
from controlkit.preprocessors.linting import KINDS
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.map_files import sense_of
from controlkit.training.data.map_use import about_idle
from controlkit.training.data.source_files import LazyExamples, leads_out, walk
from controlkit.training.data.source_pairs import POSES, open_pairs
from controlkit.training.data.source_rows import METADATA, PROMPTS, open_rows
from controlkit.training.data.source_shards import open_shards
from controlkit.training.data.source_streams import Stream as Stream
from controlkit.training.data.source_streams import open_stream as open_stream
from controlkit.training.data.source_tables import TABLES, is_hub_id, is_saved, open_table
from controlkit.training.data.source_tar import find_shards, is_shards

LAYOUTS = (
    "a metadata.jsonl or .csv (file_name, text, conditioning_image_file_name), a prompt.json (source, "
    "target, prompt), pictures (maps of their names may lie in conditioning/), .tar shards, or "
    "what the library datasets wrote"
)
"""What a folder may hold, for messages."""
_NAMED = 5  # data sets in a message
_PACKED = (".zip", ".7z", ".rar")


def open_examples(
    data: DataRecipe, *, kind: str = "", report: Callable[[str], None] = lambda _: None
) -> LazyExamples:
    """Open a data set; no picture is read.

    kind: the kind of map that is trained; where a data set has maps of several kinds, its own are taken.
    "" takes the maps that there are.
    report: called with a line that says what was found.

    The order is that of the file that lists the pictures, of the shards, or of the names. What is wrong with
    one pair (a key that is missing, a name that leads out of the folder) shows when it is read.

    Raises ValueError, one line: there is no such data set, it is empty, the file that lists it is broken, or
    its maps are poses and another kind is wanted.
    """
    layout, source = recognise(data)
    match layout:
        case "huggingface":
            examples = _open_table(source, data, kind, report)
        case "webdataset":
            examples = open_shards(source, data=data, kind=kind, report=report)
        case "paired":
            for line in _unread(source):
                report(line)
            examples = open_pairs(Path(source), data=data, kind=kind, report=report)
        case _:
            examples = open_rows(Path(source), data=data, kind=kind, report=report)
    if not len(examples):
        raise ValueError(f"{data.source}: no picture is there; wanted: {LAYOUTS}")
    _refuse_poses(examples, data, kind)
    maps = examples[0].maps
    if maps and (idle := about_idle(data, kind=kind, count=len(maps))):
        report(idle)
    if 0 < data.limit < len(examples):
        return LazyExamples(data.limit, examples.__getitem__, examples.leftovers)
    return examples


def _open_table(source: str, data: DataRecipe, kind: str, report: Callable[[str], None]) -> LazyExamples:
    """Open what the library reads; of a folder where that has no pictures, say how those in files are taken,
    beside which img2dataset and others leave tables of their own.
    """
    try:
        return open_table(source, data=data, kind=kind, report=report)
    except ValueError as error:
        if data.format != "auto" or not os.path.isdir(source):
            raise
        files = walk(Path(source), Path(source))
        if not any(os.path.splitext(name)[1].lower() in SUFFIXES for name in files):
            raise
        raise ValueError(f"{error}; the pictures in files there are read with data.format=paired") from error


def _refuse_poses(examples: LazyExamples, data: DataRecipe, kind: str) -> None:
    """Refuse a first example with a pose where a map of another known kind is wanted: joints are drawn."""
    maps = examples[0].maps
    kinds = data.map_column if len(maps) > 1 else (kind,) * len(maps)
    known = {*preprocessors.names(), *KINDS}
    for piece, wanted in zip(maps, kinds, strict=False):
        if piece.name.lower().endswith(POSES) and wanted in known and sense_of(wanted) != "pose":
            raise ValueError(
                f"{piece.name} holds a pose, which is drawn, and maps of {wanted} are wanted: say that the"
                " map is openpose, or where the others are with data.map_column"
            )


def recognise(data: DataRecipe) -> tuple[str, str]:
    """Return the format of a data set, and the file, folder, pattern or hub id to open.

    Raises ValueError, one line: it does not exist, or is not of the format that the recipe says.
    """
    assert data.format != "world", "the bundled world is no data set of files"
    source = os.path.expanduser(data.source)
    if data.format == "webdataset" or (
        data.format == "auto" and is_shards(source) and not os.path.isdir(source)
    ):
        find_shards(source)
        return "webdataset", source
    path = Path(source)
    if path.is_dir():
        return _recognise_folder(path, data)
    if path.is_file():
        return _recognise_file(path, data.format)
    if data.format == "huggingface" or (data.format == "auto" and _may_be_on_the_hub(source)):
        return "huggingface", source
    raise ValueError(f"the data set {data.source} does not exist{_about_the_hub(data)}")


def _may_be_on_the_hub(source: str) -> bool:
    """Whether a name that is no path here may be one there: not if its first part is a folder here."""
    return is_hub_id(source) and not os.path.isdir(source.partition("/")[0])


def _about_the_hub(data: DataRecipe) -> str:
    if data.format == "auto" and is_hub_id(data.source):
        return "; if the hub's data set of that name is meant, say data.format=huggingface"
    return ""


def _recognise_file(path: Path, wanted: str) -> tuple[str, str]:
    rows = ("imagefolder", "fill50k")
    suffix = path.suffix.lower()
    fitting = {".jsonl": rows, ".csv": rows[:1], ".json": rows[::-1]}.get(suffix, ())
    if suffix in TABLES:
        fitting = ("huggingface",)
    if not fitting or wanted not in ("auto", *fitting):
        raise ValueError(
            f"{path} is no {'data set' if wanted == 'auto' else wanted}: name a folder, a metadata.jsonl or "
            ".csv, a prompt.json, .tar shards, or .parquet or .arrow files"
        )
    return (fitting[0] if wanted == "auto" else wanted), str(path)


def _recognise_folder(folder: Path, data: DataRecipe) -> tuple[str, str]:
    wanted = data.format
    if wanted == "huggingface" or (wanted == "auto" and is_saved(folder)):
        return "huggingface", str(folder)
    if wanted in ("auto", "imagefolder") and (listed := _listing(folder, data.split, METADATA)):
        return "imagefolder", str(listed)
    if wanted in ("auto", "fill50k") and (listed := _listing(folder, data.split, (PROMPTS,))):
        return "fill50k", str(listed)
    if wanted in ("imagefolder", "fill50k"):
        names = " or ".join(METADATA if wanted == "imagefolder" else (PROMPTS,))
        raise ValueError(f"{folder} has no {names}, which {wanted} wants{_other_splits(folder, data)}")
    if wanted == "paired":
        return "paired", str(folder)
    files = list(walk(folder, folder))
    suffixes = {os.path.splitext(name)[1].lower() for name in files}
    if any(is_shards(name) for name in files if "/" not in name):
        return "webdataset", str(folder)
    if suffixes & set(TABLES):
        return "huggingface", str(folder)
    if wanted == "auto" and (listed := _listing_below(folder, data.split, files)):
        return ("fill50k" if listed.name == PROMPTS else "imagefolder"), str(listed)
    if suffixes & SUFFIXES and not _other_splits(folder, data):
        return "paired", str(folder)
    packed = sorted(name for name in files if name.lower().endswith(_PACKED))
    but = "".join(f"; {line}" for line in _unread(str(folder)))
    but += f"; unpack {first_of(packed)}" if packed else ""
    raise ValueError(f"{folder} holds no data set{_other_splits(folder, data)}{but}; wanted: {LAYOUTS}")


def _unread(folder: str) -> list[str]:
    """Pictures of formats that are not read, a line for each."""
    return unread_lines(unread_below([folder], DEPTH_SUFFIXES))


def _listing(folder: Path, split: str, names: tuple[str, ...]) -> Path | None:
    """The file that lists a folder's pictures, if there is one, here or in the folder of the split."""
    for place in (folder, folder / split):
        for name in names:
            file = place / name
            if file.is_file():
                if problem := leads_out(file, folder):
                    raise ValueError(problem)
                return file
    return None


def _listing_below(folder: Path, split: str, files: Sequence[str]) -> Path | None:
    """The file that lists pictures in a folder further down, as repositories of the hub have it.

    Raises ValueError, one line: there are several, and the split does not tell which is meant; or most
    pictures lie elsewhere.
    """
    found: dict[str, Path] = {}
    for name in sorted(files, reverse=True):  # metadata.jsonl goes before metadata.csv
        place, _, base = name.rpartition("/")
        if "/" in place and base in (*METADATA, PROMPTS):
            found[place] = folder / name
    of_split = [place for place in found if place.rpartition("/")[2] == split]
    chosen = of_split if len(of_split) == 1 else list(found)
    if len(chosen) > 1:
        sources = [f"data.source={folder / place}" for place in sorted(found)[:_NAMED]]
        listed = " or ".join(map(shlex.quote, sources))
        raise ValueError(f"{folder} holds several data sets, of which one is to be named: {listed}")
    if not chosen:
        return None
    pictures = [name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES]
    elsewhere = [name for name in pictures if not name.startswith(tuple(f"{place}/" for place in found))]
    if 2 * len(elsewhere) > len(pictures):
        raise ValueError(
            f"{found[chosen[0]]} lists pictures, and {len(elsewhere):,} of {len(pictures):,} in {folder} lie"
            f" elsewhere: take those it lists with {shlex.quote(f'data.source={folder / chosen[0]}')}, or all"
            " with data.format=paired"
        )
    if problem := leads_out(found[chosen[0]], folder):
        raise ValueError(problem)
    return found[chosen[0]]


def _other_splits(folder: Path, data: DataRecipe) -> str:
    """Name the folders below that are data sets of their own."""
    found = sorted(file.parent.name for name in (*METADATA, PROMPTS) for file in folder.glob(f"*/{name}"))
    return f"; data.split={data.split}, and it has {', '.join(found)}" if found else ""
