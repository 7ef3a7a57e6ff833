"""The table of named adapters: what is in it, what it picks and refuses, and what the hub is asked."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from outcomes import Run
from test_hub import COMMIT, Hub, serving

from controlkit import preprocessors
from controlkit.adapters import default_adapter, load_adapter
from controlkit.base import Base
from controlkit.families import ALIASES
from controlkit.formats.finding import find_adapter_folder
from controlkit.images import read_png_text
from controlkit.known_adapters import KNOWN, check, defaults, family_of_base, find, revision_of, same_kind

CANNY = "lllyasviel/control_v11p_sd15_canny"
PINNED = "thibaud/controlnet-sd21-depth-diffusers"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, name: str, folder: Path, *, commit: str = COMMIT) -> None:
    """Put a folder into the cache as the newest copy of a repository."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)


def test_every_row_is_whole() -> None:
    assert len({known.name for known in KNOWN}) == len(KNOWN)
    for known in KNOWN:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+\.safetensors)?", known.name)
        assert (known.format == "single") == known.name.endswith(".safetensors")
        assert re.fullmatch(r"|[0-9a-f]{40}", known.revision)
        assert known.licence
        assert known.family in ("sd1", "sd2", "sdxl")
        low, high = known.map.range
        assert (low, high) == ((-1, 1) if known.map.kind == "inpaint" else (0, 1))


def test_every_family_has_the_three_kinds_and_sd1_what_the_preprocessors_draw() -> None:
    for family in ("sd1", "sd2", "sdxl"):
        assert {"canny", "openpose", "depth"} <= set(defaults(family))
    # "normal" is drawn as v1.0's, which is not in the table.
    drawn = {same_kind(name) for name in preprocessors.names()} - {"normal"}
    assert drawn <= set(defaults("sd1"))
    assert {known.name for known in defaults("sd1").values()} & {
        "lllyasviel/sd-controlnet-canny",
        "lllyasviel/control_v11p_sd15_inpaint",
    } == set()


def test_the_default_is_the_tables(load: Callable[[str], Base]) -> None:
    assert default_adapter("canny", load("sd1")) == CANNY
    assert default_adapter("midas", load("sd1")) == "lllyasviel/control_v11f1p_sd15_depth"
    assert default_adapter("hed", load("sd1")) == "lllyasviel/control_v11p_sd15_softedge"
    assert default_adapter("openpose", load("sd2")) == "thibaud/controlnet-sd21-openpose-diffusers"
    assert default_adapter("depth", load("sdxl")) == "diffusers/controlnet-depth-sdxl-1.0"


def test_the_family_of_a_base_is_told_without_a_download(models: Path, empty_cache: Path) -> None:
    assert [family_of_base(name) for name in ("sd15", "sd21", "sdxl")] == ["sd1", "sd2", "sdxl"]
    assert family_of_base("tiny") == "sd2"
    assert family_of_base(str(models / "sdxl")) == "sdxl"
    assert family_of_base("someone/something") == ""
    cached(empty_cache, "someone/something", models / "sdxl")
    assert family_of_base("someone/something") == "sdxl"
    assert family_of_base("no such thing, at all") == ""


def test_the_command_lists_marks_and_filters(run: Run, models: Path, empty_cache: Path) -> None:
    cached(empty_cache, CANNY, models / "canny-sd1")
    lines = run("models", "--base", "sd15", "--kind", "canny").done().splitlines()
    assert lines[0].split() == ["base", "kind", "adapter", "network", "licence", "revision", "cached"]
    assert lines[1].split() == ["*", "SD1", "canny", CANNY, "controlnet", "openrail", "115a470", "yes"]
    assert lines[2].split() == [
        "SD1",
        "canny",
        "lllyasviel/sd-controlnet-canny",
        "controlnet",
        "openrail",
        "7f2f691",
    ]
    assert "  canny: white-on-black, high 200, low 100" in lines
    assert any(line.startswith(f"  {CANNY}: v1.1 comes first") for line in lines)
    everything = run("models").done()
    assert all(known.name in everything for known in KNOWN)
    of_kind = run("models", "--kind", "midas").done()
    assert "depth-sdxl" in of_kind
    assert "canny" not in of_kind
    known = find(PINNED)
    assert known is not None
    of_sd2 = next(line for line in run("models", "--base", "sd21").done().splitlines() if PINNED in line)
    assert of_sd2.split()[-2:] == ["other", known.revision[:7]]
    of_folder = run("models", "--base", models / "sdxl").done()
    assert "xinsir/" in of_folder
    assert "lllyasviel/" not in of_folder


def test_a_base_is_known_by_its_hub_id_too(run: Run, empty_cache: Path) -> None:
    for short, repository in ALIASES.items():
        assert family_of_base(repository) == family_of_base(short) != ""
        assert run("models", "--base", repository).done() == run("models", "--base", short).done()


def test_the_command_refuses_what_there_is_not(run: Run) -> None:
    assert run("models", "--base", "sd16").refused().startswith("unknown base 'sd16' (did you mean 'sd")
    told = run("models", "--base", "sd21", "--kind", "mlsd").refused()
    assert told == "unknown kind for SD2 'mlsd'; choose from: canny, depth, openpose"


@pytest.mark.parametrize(("base", "kind"), [("sd15", "seg"), ("sd15", "ip2p"), ("sdxl", "tile")])
def test_what_is_used_when_none_is_named_need_not_be(
    base: str, kind: str, run: Run, photo: Path, empty_cache: Path
) -> None:
    rows = [line.split() for line in run("models", "--base", base).done().splitlines()]
    assert [row[:3] for row in rows if row and row[0] == "*" and row[2] == kind], "it is starred"
    outcome = run("generate", "a cube", "--base", base, "--map", f"{kind}={photo}")
    assert outcome.code == 2
    assert "unknown map" not in outcome.err
    assert "is not in the cache" in outcome.err or "hub" in outcome.err, outcome.err  # of the base
    assert "unknown map 'mine'" in run("generate", "a cube", "--map", f"mine={photo}").refused()


def test_wrong_combinations_are_refused_before_any_download(run: Run, photo: Path, models: Path) -> None:
    """The network is off: whoever asked the hub first would say so."""
    order = ("generate", "a cube", "--control")
    told = run(*order, f"mlsd={photo}", "--base", "sd21").refused()
    assert told == (
        "no mlsd adapter for SD2 is known (the base is sd21): there are canny, openpose, depth;"
        " or name one of your own: --adapter mlsd=NAME"
    )
    other = "lllyasviel/sd-controlnet-depth"
    told = run(*order, f"depth={photo}", "--base", "sdxl", "--adapter", f"depth={other}").refused()
    assert told == (
        f"the adapter {other} is for SD1 and the base sdxl is SDXL; use diffusers/controlnet-depth-sdxl-1.0"
    )
    sdxl = "xinsir/controlnet-canny-sdxl-1.0"
    told = run(*order, f"canny={photo}", "--base", models / "sd1", "--adapter", f"canny={sdxl}").refused()
    assert told == f"the adapter {sdxl} is for SDXL and the base {models / 'sd1'} is SD1; use {CANNY}"


def test_an_adapter_at_hand_is_looked_at_before_any_download(run: Run, photo: Path, models: Path) -> None:
    """The network is off: whoever asked the hub first would say so."""
    wrong = models / "canny-sdxl"
    Path("page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    generate = ("generate", "x", "--base", "sd15", "--control", f"canny={photo}", "--adapter")
    train = ("train", "sd15-canny", f"data.source={photo.parent}", "out=run")
    line = f"{wrong} does not fit the base sd15: it is for SDXL (block_out_channels "
    assert run(*generate, f"canny={wrong}").refused().startswith(line)
    assert run(*train, f"init={wrong}").refused().startswith(line)
    to_folder = ("convert", wrong, "out", "--to", "diffusers", "--base", "sd15")
    assert run(*to_folder).refused().startswith(line)
    assert "is a web page" in run(*generate, "canny=page.safetensors").refused()
    assert "is a web page" in run(*train, "init=page.safetensors").refused()
    named = "diffusers/controlnet-canny-sdxl-1.0"
    told = f"the adapter {named} is for SDXL and the base sd15 is SD1; use {CANNY}"
    assert run(*train, f"init={named}").refused() == told


@pytest.mark.parametrize(
    ("kind", "base", "name"),
    [
        ("lineart", "sdxl", "TencentARC/t2i-adapter-lineart-sdxl-1.0"),
        (
            "hed",
            "sdxl",
            "SargeZT/controlnet-sd-xl-1.0-softedge-dexined/controlnet-sd-xl-1.0-softedge-dexined.safetensors",
        ),
        ("inpaint", "sd15", "lllyasviel/control_v11p_sd15_inpaint"),
    ],
)
def test_an_adapter_that_has_to_be_named_is_told(kind: str, base: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"there is --adapter {kind}={re.escape(name)}$"):
        check(kind, "", base)


def test_what_cannot_be_told_is_left_to_loading() -> None:
    check("mlsd", "", "someone/something")
    check("mlsd", "my/own", "sd21")
    check("canny", "canny", "tiny")


def test_generate_finds_the_right_one(run: Run, photo: Path, models: Path, empty_cache: Path) -> None:
    """No adapter is named; the base is a folder, and the adapter lies in the cache."""
    cached(empty_cache, CANNY, models / "canny-sd1")
    base = models / "sd1"
    order = ("generate", "a cube", "--base", base, "--control", f"canny={photo}", "--steps", 1, "-o", "a.png")
    run(*order).done()
    assert f'"adapter":"{CANNY}"' in "".join(read_png_text("a.png").values())


def test_the_map_of_a_named_adapter_is_the_tables(
    load: Callable[[str], Base], models: Path, empty_cache: Path
) -> None:
    name = "lllyasviel/control_v11p_sd15_scribble"
    folder = empty_cache.parent / "bare"
    shutil.copytree(models / "canny-sd1", folder)
    load_adapter(str(folder), base=load("sd1")).controlnet.save_pretrained(folder)
    cached(empty_cache, name, folder)
    spec = load_adapter(name, base=load("sd1")).info.map
    assert (spec.kind, spec.polarity) == ("scribble", "white-on-black")


@contextmanager
def recording_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that has one repository under every name; gives the paths that were asked for."""
    asked: list[str] = []

    class Recording(Hub):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    with serving(type("Of", (Recording,), {"folder": folder, "sent": []}), monkeypatch):
        yield asked


def test_a_pinned_adapter_is_asked_for_by_its_commit(
    models: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = revision_of(PINNED)
    assert commit is not None
    unpinned = "lllyasviel/sd-controlnet-mlsd"
    assert revision_of(unpinned) is None
    assert revision_of("someone/something") is None
    with recording_hub(models / "canny-sd1", monkeypatch) as asked:
        find_adapter_folder(PINNED)
        assert any(path.endswith(f"/models/{PINNED}/revision/{commit}") for path in map(bare, asked))
        asked.clear()
        find_adapter_folder(unpinned)
        assert not [path for path in asked if commit in path]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (find_adapter_folder(PINNED) / "config.json").is_file()


def bare(path: str) -> str:
    return path.partition("?")[0]


def test_a_copy_of_the_newest_serves_where_the_commit_is_not_cached(models: Path, empty_cache: Path) -> None:
    cached(empty_cache, PINNED, models / "canny-sd1")
    assert find_adapter_folder(PINNED).name == COMMIT


def test_the_bundled_base_has_its_own(run: Run) -> None:
    told = run("models", "--base", "tiny").done()
    assert "own adapters, canny, openpose, depth" in told
    assert "lllyasviel" not in told
    assert "choose from: sd15, sd21, sdxl, tiny" in run("models", "--base", "foo").refused()
