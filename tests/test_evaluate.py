"""`controlkit evaluate`: what it measures, what it keeps, how it goes on, and what it refuses."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import original_controlnet, saved
from outcomes import Outcome, Run
from typer.testing import CliRunner

from controlkit import images
from controlkit.adapters import MAPS, AdapterInfo, load_adapter
from controlkit.base import load_base
from controlkit.cli import app
from controlkit.control import Control
from controlkit.figures import render
from controlkit.formats.description import MapSpec
from controlkit.metrics import edge_f1
from controlkit.preprocessors import get
from controlkit.sampling import generate
from controlkit.training.config import load_recipe
from controlkit.training.evaluation.arms import noise_of
from controlkit.training.evaluation.estimating import stated_options
from controlkit.training.evaluation.held_out import Held, WorldScenes
from controlkit.training.evaluation.map_scores import score_map
from controlkit.training.evaluation.request import Compared, Request, _labelled, earlier, identity
from controlkit.training.evaluation.rows import Row, Rows
from controlkit.training.evaluation.trained_on import trained_there
from controlkit.training.lock import locked
from controlkit.training.reporting.measures import black_and_white
from controlkit.training.saving import write_recipe

QUICK = ("--steps", 3, "--clip", "none", "--features", "none")
QUICKEST = ("--steps", 1, *QUICK[2:])  # where nobody looks at the pictures


def command(*arguments: object) -> Outcome:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[Path, Outcome]:
    """The bundled canny adapter at full and at little strength, three scenes, two seeds."""
    folder = tmp_path_factory.mktemp("evaluated") / "report"
    asked = ["--adapter", "canny", "--adapter", "canny:0.2", "-n", 3, "--seeds", 2, "-o", folder]
    return folder, command("evaluate", *asked, *QUICK)


def refusal(outcome: Outcome) -> str:
    """The error's line, after whatever was said of the data before."""
    assert outcome.code == 2, (outcome.code, outcome.err)
    assert outcome.out == ""
    return outcome.err.splitlines()[-1].removeprefix("error: ")


def told(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_numbers_are_those_of_the_pictures(evaluated):
    """Recomputed from the pictures in the folder, with no code of the evaluation."""
    folder, outcome = evaluated
    report = told(folder)
    (adapter, _) = report["adapters"]
    scores = []
    for number in range(3):
        asked = get("canny")(render(number, split="validation", size=128).picture).image
        for seed in range(2):
            picture = images.load_picture(folder / adapter["pictures"] / f"{number:06d}-{seed}.png")
            scores.append(edge_f1(get("canny")(picture).image, asked, tolerance=2).f1)
    (canny,) = [group for group in report["results"] if group["kind"] == "canny"]
    found = canny["measures"]["edge F1"]["arms"]
    assert found["canny"]["value"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert found["canny"]["low"] is None  # of three pairs there is no interval
    assert found["no control"]["value"] < found["canny (scale 0.2)"]["value"] < found["canny"]["value"]
    assert found["canny"]["value"] < found["autoencoder"]["value"] < found["pictures"]["value"] == 1
    per_pair = [example["scores"]["canny"]["edge F1"]["canny"] for example in report["examples"]]
    assert per_pair == pytest.approx(np.array(scores).reshape(3, 2).mean(axis=1), abs=1e-5)
    assert re.search(rf"canny +{found['canny']['value']:.3f}", outcome.done())


def test_pictures_are_those_of_generate(evaluated):
    folder, _ = evaluated
    base = load_base("tiny")
    adapter = load_adapter("canny", base=base)
    pair = WorldScenes(3, {"canny": {}}, size=128)[1]
    control = Control(adapter, pair.maps["canny"], scale=0.2)
    (again,) = generate(base, pair.caption, controls=[control], steps=3, seeds=[noise_of(pair, 1)])
    pictures = folder / told(folder)["adapters"][1]["pictures"]
    assert np.array_equal(images.load_picture(pictures / "000001-1.png"), again)


def test_adapters_are_compared_on_the_same_noise(evaluated):
    (first, *_) = told(evaluated[0])["differences"]
    assert (first["measure"], first["first"], first["second"]) == ("edge F1", "canny", "canny (scale 0.2)")
    assert first["value"] > 0
    assert first["verdict"] == "3 pairs are too few to tell"
    assert first["pairs"] == 3
    assert (first["comparisons"], first["level"], first["resamples"]) == (1, 0.95, 0)
    assert "resamples" not in told(evaluated[0])["interval"]  # each has its own


@pytest.mark.slow
def test_a_name_does_not_decide_against_the_kind_that_is_measured(tmp_path):
    state = original_controlnet(load_adapter("canny", base=load_base("tiny")).controlnet)
    files = [saved(state, tmp_path / f"{name}.safetensors") for name in ("a", "a_shuffle")]
    asked = [word for file in files for word in ("--adapter", f"canny={file}")]
    quick = ("-n", 1, "--seeds", 1, *QUICK, "--steps", 1, "-o", tmp_path / "report")
    command("evaluate", *asked, *quick).done()
    folders = [tmp_path / "report" / adapter["pictures"] for adapter in told(tmp_path / "report")["adapters"]]
    plain, named = (images.load_picture(folder / "000000-0.png") for folder in folders)
    assert np.array_equal(plain, named)


def test_the_report_needs_nothing_else(evaluated):
    folder, _ = evaluated
    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert page.count('src="data:image/jpeg;base64,') == 2  # of few pairs one sheet for each adapter
    for word in ("edge F1", "no control", "autoencoder", "3 held-out scenes", "2 pictures of each"):
        assert word in page
    assert str(Path.home()) not in page
    assert (
        "Dots are means over pairs, without intervals: fewer than 8 pairs say too little of others." in page
    )


def test_what_is_there_is_not_made_again(evaluated):
    folder, _ = evaluated
    before = {path: path.stat().st_mtime_ns for path in (folder / "pictures").rglob("*.png")}
    rows = sorted(folder.glob("rows-*.jsonl"))
    assert len(before) == 3 * 2 * 3 + 2 * 3  # three arms with seeds, two without
    shorter = rows[0].read_text()
    last = next(iter(sorted(path for path in before if "no-control" in str(path))))
    last.unlink()
    cut = {path: path.read_bytes() for path in sorted(p for p in before if "no-control" not in str(p))[:2]}
    for (path, whole), kept in zip(cut.items(), (0.5, 0.9999), strict=True):
        path.write_bytes(whole[: int(kept * len(whole))])  # as a disk that was full while it was copied does
    rows[0].write_text(shorter[:-40])  # as a kill in the middle of a line leaves it
    earlier = told(folder)
    outcome = command(
        *("evaluate", "--adapter", "canny", "--adapter", "canny:0.2", "-n", 3, "--seeds", 2, "-o", folder),
        *QUICK,
    )
    outcome.done()
    after = {path: path.stat().st_mtime_ns for path in (folder / "pictures").rglob("*.png")}
    assert {path for path in after if after[path] != before[path]} == {last, *cut}
    assert {path: path.read_bytes() for path in cut} == cut
    assert told(folder) == earlier | {"adapters": told(folder)["adapters"]}  # but for the seconds


@pytest.mark.slow
def test_another_adapter_joins_the_comparison(evaluated, tmp_path):
    folder = shutil.copytree(evaluated[0], tmp_path / "joined")
    asked = ("-n", 3, "--seeds", 2, "-o", folder, *QUICK)
    command("evaluate", "--adapter", "canny", "--adapter", "canny:mode=prompt", *asked).done()
    report = told(folder)
    assert [one["label"] for one in report["adapters"]] == ["canny", "canny (mode prompt)"]
    assert len(list((folder / "pictures").iterdir())) == 6


@pytest.mark.slow
def test_more_kinds_pairs_and_seeds_join(evaluated, tmp_path):
    """An adapter of another kind before the first, one more pair, one more seed: nothing is made twice."""
    folder = shutil.copytree(evaluated[0], tmp_path / "joined")
    seconds = told(folder)["adapters"][0]["seconds_per_picture"]
    before = {path: path.stat().st_mtime_ns for path in (folder / "pictures").rglob("*.png")}
    asked = ("--adapter", "depth", "--adapter", "canny", "-o", folder, *QUICK)
    command("evaluate", *asked, "-n", 3, "--seeds", 2).done()
    assert told(folder)["adapters"][1]["seconds_per_picture"] == pytest.approx(seconds)  # not made anew
    command("evaluate", *asked, "-n", 4, "--seeds", 3).done()
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert len(list((folder / "pictures" / "no-control").iterdir())) == 12
    four = told(folder)
    command("evaluate", *asked, "-n", 2, "--seeds", 1).done()
    two = told(folder)
    assert [len(report["examples"]) for report in (four, two)] == [4, 2]
    score = [report["examples"][0]["scores"]["canny"]["edge F1"]["canny"] for report in (four, two)]
    assert score[0] != score[1]  # the mean of three seeds, and of one


@pytest.mark.slow
def test_an_evaluation_on_another_device_is_another_one(evaluated, tmp_path):
    folder = shutil.copytree(evaluated[0], tmp_path / "moved")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"device": "cuda, float16"}))
    asked = ("--adapter", "canny", "-n", 3, "--seeds", 2, "-o", folder, *QUICK)
    message = command("evaluate", *asked).refused()
    assert "made on cuda, float16, not cpu, float32" in message
    (folder / "settings.json").write_text(json.dumps(settings))
    message = command("evaluate", *asked, "--dtype", "bf16").refused()
    assert "made on cpu, float32, not cpu, bfloat16" in message
    (folder / "settings.json").write_text(json.dumps(settings | {"pairs": "everything"}))
    assert "settings.json cannot be read" in command("evaluate", *asked).refused()


@pytest.mark.slow
def test_in_another_precision(run: Run):
    asked = ("--adapter", "canny", "-n", 1, *QUICK)
    run("evaluate", *asked, "--dtype", "bf16", "-o", "low").done()
    base = load_base("tiny", dtype=torch.bfloat16)
    pair = WorldScenes(1, {"canny": {}}, size=128)[0]
    control = Control(load_adapter("canny", base=base), pair.maps["canny"])
    (expected,) = generate(base, pair.caption, controls=[control], steps=3, seeds=[noise_of(pair, 0)])
    report = told(Path("low"))
    assert report["dtype"] == "bfloat16"
    made = Path("low", report["adapters"][0]["pictures"], "000000-0.png")
    assert np.array_equal(images.load_picture(made), expected)


def test_maps_are_asked_for_as_they_are_found(run: Run):
    """Thresholds hold for both maps: a picture follows its own edges perfectly."""
    run("evaluate", "canny.low=20", "canny.high=60", "--adapter", "canny", "-n", 1, *QUICK).done()
    (canny,) = [group for group in told(Path("report"))["results"] if group["kind"] == "canny"]
    assert canny["measures"]["edge F1"]["arms"]["pictures"]["value"] == 1
    picture = render(0, split="validation", size=128).picture
    asked = images.load_picture("report/maps/asked-canny/000000.png")
    assert np.array_equal(asked, get("canny", low=20, high=60)(picture).image)
    assert not np.array_equal(asked, get("canny")(picture).image)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["fa/a", "fb/a", "b.safetensors"], ["fa/a", "fb/a", "b"]),
        (["runs/m/controlnet", "old/runs/m/controlnet", "./canny"], ["runs/m", "old/runs/m", "canny"]),
        (["a.safetensors", "a"], ["a", "a 2"]),  # nothing tells them apart but the suffix
        (["fa/a", "fa/a:0.5", "fb/a:0.5"], ["fa/a", "fa/a (scale 0.5)", "fb/a (scale 0.5)"]),
    ],
)
def test_adapters_of_one_name_are_told_apart_by_their_folders(names, labels):
    how = {name: {"scale": 0.5} if name.endswith(":0.5") else {} for name in names}
    asked = [Compared(name.removesuffix(":0.5"), "canny", how[name]) for name in names]
    assert [one.label for one in _labelled(asked)] == labels


def test_another_of_the_same_name_moves_no_pictures(tmp_path):
    for folder in ("fa", "fb"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.safetensors").write_bytes(folder.encode())
    first, other = (Compared(str(tmp_path / folder / "a.safetensors"), "canny") for folder in ("fa", "fb"))
    (alone,), (joined, _) = _labelled([first]), _labelled([first, other])
    assert (alone.label, joined.label) == ("a", "fa/a")
    assert identity(alone) == identity(joined)


def test_adapters_say_how_their_maps_are_made():
    low, high = (MapSpec("canny", thresholds={"low": low, "high": 90, "unknown": 1}) for low in (50, 60))
    assert stated_options("canny", "tiny", [low, low]) == {"low": 50, "high": 90}
    assert stated_options("canny", "tiny", [low, high]) == {}  # they do not agree
    pose = MapSpec("openpose", draw_style="v1.0")
    assert stated_options("openpose", "tiny", [pose]) == {"model": "tiny", "style": "v1.0"}
    assert stated_options("scars", "sd15", [MapSpec("scars")]) == {}


def test_grey_edges_are_edges_or_none(pairs):
    """A map that went through JPEG is the map that it was."""
    import cv2

    picture = images.load_picture(pairs / "images" / "0.png")
    found = get("canny")(picture)
    grey = cv2.imdecode(cv2.imencode(".jpg", found.image, [1, 60])[1], 1)
    assert len(np.unique(grey)) > 50
    scored = [
        score_map("canny", found, Held(0, "", picture, "", {"canny": asked})).values
        for asked in (found.image, grey, grey.astype(np.uint16) * 257)
    ]
    assert scored[0] == scored[1] == scored[2]
    assert scored[0]["strict edge F1"] == 1
    empty = np.random.default_rng(0).integers(0, 6, (64, 64, 3)).astype(np.uint8)
    assert not black_and_white(empty).any()


def test_one_evaluation_at_a_time(evaluated):
    folder, _ = evaluated
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with locked(folder, what="evaluation"):
        asked = ("--adapter", "canny", "-n", 3, "--seeds", 2, "-o", folder)
        message = refusal(command("evaluate", *asked, *QUICK))
    assert message == (
        f"another evaluation (process {os.getpid()}) is running in {folder}: wait for it,"
        " or choose another -o"
    )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_what_a_kill_left_behind_is_no_other_thing(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / f".{'0a' * 16}.tmp").write_text('{"dec')
    assert earlier(Request("world", "tiny", (), tmp_path)) is None


def test_other_settings_are_refused(evaluated):
    folder, _ = evaluated
    other = ["--adapter", "canny", "-o", folder, "--seeds", 2, "-n", 3, "--clip", "none", "--steps", 4]
    message = command("evaluate", *other).refused()
    assert message == (
        f"{folder} holds an evaluation with steps 3, and asked is 4: choose another -o, or ask for the same"
        " to go on with it"
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--adapter", "cany"], "'cany'"),
        ([], "which adapter?"),
        (["--adapter", "canny", "--steps", "0"], "steps"),
        (["--adapter", "canny:scale"], "cany"),
        (["--adapter", "canny:3000"], "scale"),
        (["--adapter", "canny:mask=a.png"], "mask is of one picture"),
        (["--adapter", "canny", "--scheduler", "ddmi"], "unknown scheduler 'ddmi'"),
        (["--adapter", "canny", "-n", "-1"], "-n is -1"),
        (["--adapter", "canny", "-n", "0"], "has no end"),
        (["--adapter", "canny", "limit=3"], "no settings"),
        (["nowhere", "--adapter", "canny"], "the data set nowhere does not exist"),
        (["--adapter", "canny", "canyn.low=3"], "did you mean 'canny'?"),
        (["--adapter", "canny", "canny.low=300", "canny.high=10"], "low"),
        (["--adapter", "canny=nope"], "nope"),
        (["--adapter", "canny", "canny.lwo=3"], "did you mean 'low'?"),
        (["--adapter", "canny", "--device", "cuda:9"], "cuda"),
        (["--adapter", "canny", "--dtype", "f16"], "unknown precision 'f16' (did you mean 'fp16'?)"),
        (["--adapter", "canny", "-o", "no/such/report"], "does not exist"),
        (["--adapter", "canny", "--base", "sd51"], "sd51"),
        (["--adapter", "canny", "--features", "incepton"], "did you mean 'inception'?"),
        (["--adapter", "canny", "canny.low=50..90"], "an evaluation takes one value, no range"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run: Run, tmp_path, arguments, part):
    if part == "cany":
        part = "canny:scale"
    message = run("evaluate", *QUICK[2:], *arguments).refused()
    assert part in message
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_left_alone(run: Run, tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "beach.txt").write_text("sand")
    message = run("evaluate", "--adapter", "canny", "-o", "holiday").refused()
    assert "holds no evaluation" in message
    assert [path.name for path in (tmp_path / "holiday").iterdir()] == ["beach.txt"]


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Six pictures of a data set with captions, and their edges as files."""
    folder = tmp_path / "pairs"
    for part in ("images", "canny"):
        (folder / part).mkdir(parents=True)
    rows = []
    for number in range(6):
        scene = render(100 + number, split="train", size=160)
        images.write_png(folder / "images" / f"{number}.png", scene.picture)
        images.write_png(folder / "canny" / f"{number}.png", get("canny")(scene.picture).image)
        rows.append(
            {
                "file_name": f"images/{number}.png",
                "text": scene.caption,
                "canny_file_name": f"canny/{number}.png",
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_data_set_with_maps(run: Run, pairs):
    run("evaluate", pairs, "--adapter", "canny", "-n", 4, *QUICK).done()
    report = told(Path("report"))
    assert report["pairs"]["title"] == "4 of 6 pairs of pairs"
    (canny,) = [group for group in report["results"] if group["kind"] == "canny"]
    arms = canny["measures"]["edge F1"]["arms"]
    assert arms["canny"]["value"] > arms["no control"]["value"] + 0.1
    assert 0.8 < arms["pictures"]["value"] < 1  # its own edges, at another size than the map was made for
    assert {group["kind"] for group in report["results"]} == {"canny"}  # no scene is known
    picture = images.load_picture(next(Path("report/pictures/true").glob("*.png")))
    assert picture.shape == (128, 128, 3)


@pytest.mark.slow
def test_sizes_and_what_lies_outside_are_told(run: Run, pairs):
    """Wide pictures are measured as squares, unless buckets keep their shape."""
    for number in (0, 1):
        wide = render(number, split="train", size=160).picture[30:130]
        for folder, shown in (("images", wide), ("canny", get("canny")(wide).image)):
            images.write_png(pairs / folder / f"{number}.png", shown)
    asked = ("--adapter", "canny", "-n", 0, *QUICKEST)
    outcome = run("evaluate", pairs, *asked)
    outcome.done()
    assert "6 of 6 pairs of pairs, 128x128, 1 seed" in outcome.err
    line = (
        "2 of 6 pictures are cut to the sizes that are drawn (38% of images/0.png lies outside): buckets=true"
        " keeps more of their shape"
    )
    assert line in outcome.err
    report = told(Path("report"))
    assert report["warnings"] == [line]
    assert report["pairs"]["sizes"] == [{"width": 128, "height": 128, "pairs": 6}]
    assert "128x128" in Path("report/report.html").read_text()
    outcome = run("evaluate", pairs, "buckets=true", "bucket_ratio=1", *asked, "-o", "cut")
    outcome.done()
    assert "lies outside): a smaller bucket_step or a larger bucket_ratio keeps more" in outcome.err
    outcome = run("evaluate", pairs, "buckets=true", "bucket_step=32", *asked, "-o", "kept")
    outcome.done()
    assert "pictures are cut" not in outcome.err
    assert "128x128, 160x96, 1 seed" in outcome.err


@pytest.mark.slow
def test_poses_and_depth_of_a_data_set_are_made_of_its_pictures(run: Run, pairs):
    kinds = ["--adapter", "openpose", "--adapter", "depth"]
    run("evaluate", pairs, "maps=made", *kinds, "-n", 3, *QUICK).done()
    groups = {group["kind"]: group["measures"] for group in told(Path("report"))["results"]}
    assert set(groups["openpose"]) == {"joints", "OKS", "OKS-AP"}
    assert set(groups["depth"]) == {"depth RMSE", "depth error"}
    for measure in ("joints", "OKS", "OKS-AP"):
        assert groups["openpose"][measure]["arms"]["pictures"]["value"] == pytest.approx(1)
    assert groups["depth"]["depth RMSE"]["arms"]["pictures"]["value"] == 0
    assert groups["depth"]["depth error"]["arms"]["depth"]["value"] > 0


@pytest.mark.slow
def test_kinds_of_one_measure_are_told_apart(run: Run, pairs):
    kinds = ["--adapter", "canny", "--adapter", "scribble=canny"]
    run("evaluate", pairs, "maps=made", *kinds, "-n", 1, *QUICK).done()
    scores = told(Path("report"))["examples"][0]["scores"]
    page = Path("report/report.html").read_text()
    (row,) = re.findall(r'<tr><th scope="row">\d+</th>(.*?)</tr>', page.partition("Pair by pair")[2])
    shown = re.findall(r"<td>([\d.]+)</td>", row)
    labels = ["no control", "canny", "canny (scribble)", "pictures"]
    wanted = [scores[kind]["edge F1"][label] for kind in ("canny", "scribble") for label in labels]
    assert [float(value) for value in shown] == pytest.approx(wanted, abs=6e-4)
    assert len(set(shown)) > 4
    assert "<th>scribble: edge F1<br>canny</th>" in page


def test_an_evaluation_that_goes_on_sees_the_autoencoder_as_one_in_a_stretch_does():
    """Of which it may be the first work: a generation before lays the weights out anew."""
    from controlkit.training.quality import through_vae

    picture = render(1, size=128).picture
    first, after = load_base("tiny"), load_base("tiny")
    generate(after, "a cube", steps=1)
    assert np.array_equal(through_vae(first, picture), through_vae(after, picture))
    kernels = [
        [one.weight.stride() for one in base.vae.modules() if isinstance(one, torch.nn.Conv2d)]
        for base in (first, after)
    ]
    assert kernels[0] == kernels[1], "sums in another order may round differently"


@pytest.mark.slow
def test_pairs_without_captions_are_counted(run: Run, pairs):
    rows = (pairs / "metadata.jsonl").read_text().splitlines()
    mute = [json.dumps({**json.loads(row), "text": ""}) for row in rows[:2]]
    (pairs / "metadata.jsonl").write_text("\n".join([*mute, *rows[2:]]))
    outcome = run("evaluate", pairs, "--adapter", "canny", "-n", 0, *QUICKEST)
    outcome.done()
    assert "2 of 6 pairs have no caption" in outcome.err
    assert re.search(r"1 adapter on .*, \d seeds?, on cpu", outcome.err)


def test_black_maps_are_counted(run: Run, pairs):
    """Nothing in them can be followed, and their pairs count all the same."""
    for file in sorted((pairs / "canny").iterdir()):
        images.write_png(file, np.zeros((160, 160, 3), np.uint8))
    outcome = run("evaluate", pairs, "--adapter", "canny", "-n", 2, *QUICKEST)
    outcome.done()
    line = "2 of 2 canny maps are black: a picture with any line scores 0 there, whatever drew it"
    assert line in outcome.err
    report = told(Path("report"))
    assert report["warnings"] == [line]
    (canny,) = [group for group in report["results"] if group["kind"] == "canny"]
    assert canny["measures"]["edge F1"]["arms"]["pictures"]["value"] == 0


def test_maps_that_say_something_else_than_is_meant_are_told_of(run: Run, pairs):
    """Of edges black on white nothing is measured that anybody would ask for: that is said at the start."""
    for file in sorted((pairs / "canny").iterdir()):
        images.write_png(file, 255 - images.load_map(file))
    outcome = run("evaluate", pairs, "--adapter", "canny", "-n", 2, *QUICKEST)
    outcome.done()
    (line,) = told(Path("report"))["warnings"]
    assert line.startswith("2 of the first 2 canny maps: the edges are black on white")
    assert line in outcome.err


@pytest.mark.slow
def test_a_pair_that_changes_is_named(run: Run, pairs):
    asked = ("evaluate", pairs, "--adapter", "canny", "-n", 0, *QUICKEST)
    run(*asked).done()
    rows = (pairs / "metadata.jsonl").read_text()
    (pairs / "metadata.jsonl").write_text(rows.replace('"text": "', '"text": "indeed ', 1))
    assert "the pair 0 has changed since" in refusal(run(*asked))
    (pairs / "metadata.jsonl").write_text(rows)
    shutil.copy(pairs / "canny" / "1.png", pairs / "canny" / "2.png")
    assert "the canny map of pair 2 has changed since" in refusal(run(*asked))


@pytest.mark.slow
def test_another_tools_config_makes_no_run(run: Run, pairs):
    (pairs / "config.toml").write_text("[general]\nshuffle_caption = true\n")
    run("evaluate", pairs, "--adapter", "canny", "-n", 1, *QUICK).done()
    assert told(Path("report"))["pairs"]["title"] == "1 of 6 pairs of pairs"


def test_broken_pairs_stop_before_the_first_picture(run: Run, pairs, tmp_path):
    (pairs / "canny" / "2.png").write_bytes(b"<html>")
    message = refusal(run("evaluate", pairs, "--adapter", "canny", "-n", 0, *QUICK))
    assert "canny/2.png" in message
    assert not (tmp_path / "report").exists()
    run("evaluate", pairs, "bad=skip", "--adapter", "canny", "-n", 0, *QUICKEST).done()
    assert told(Path("report"))["pairs"]["title"] == "5 of 6 pairs of pairs"


def test_maps_of_one_kind_are_not_taken_for_another(run: Run, pairs):
    shutil.rmtree(pairs / "canny")
    (pairs / "metadata.jsonl").unlink()
    shutil.copytree(pairs / "images", pairs / "conditioning")
    for picture in (pairs / "images").iterdir():
        shutil.copy(picture, pairs)
    shutil.rmtree(pairs / "images")
    message = refusal(run("evaluate", pairs, "--adapter", "canny", "--adapter", "depth", *QUICK))
    assert "maps of one kind, and adapters of two are named (canny, depth)" in message


def test_what_a_run_held_out(run: Run, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    settings = ["steps=1", "warmup=0", "batch_size=2", "score_scenes=0", "monitor_every=0", "sample_every=0"]
    settings += [f"data.source={pairs}", "data.holdout=1", "out=run", "checkpoint_every=1"]
    settings += ["data.flip=1", "data.map_blur=1"]
    run("train", "tiny-canny", *settings).done()
    run("evaluate", "run", *QUICKEST).done()
    (shown,) = Path("report/pictures/true").iterdir()
    number = int(shown.name[:6])
    whole = images.load_picture(pairs / "images" / f"{number}.png")
    assert np.array_equal(images.load_picture(shown), images.resize(whole, 128, 128))  # and not mirrored
    asked = images.load_picture(f"report/maps/asked-canny/{number:06d}.png")
    assert set(np.unique(asked)) == {0, 255}  # and not blurred
    message = refusal(run("evaluate", "run", "data.limit=3", "-o", "other", *QUICK))
    assert message.startswith("limit decides which pairs a run holds out")
    report = told(Path("report"))
    assert report["pairs"]["title"] == "1 pairs that the run run held out"
    assert report["pairs"]["held_out"]
    assert report["warnings"] == []
    assert report["adapters"][0]["label"] == "run"
    assert report["adapters"][0]["kind"] == "canny"
    assert report["settings"]["base"] == "tiny"
    assert report["settings"]["guidance"] == 2
    assert report["examples"][0]["name"] == f"images/{number}.png"
    told_of = run(
        "evaluate", pairs, "--adapter", "canny=run/controlnet", "-n", 1, "-o", "on-its-own", *QUICKEST
    )
    assert "run was trained on pairs of" in told_of.err
    (warning,) = told(Path("on-its-own"))["warnings"]
    assert "evaluate the run's folder to have those that it held out" in warning
    page = Path("on-its-own/report.html").read_text()
    assert warning in html.unescape(page)
    assert "held-out pairs" not in page
    assert "<h1>run on 1 of 6 pairs of pairs</h1>" in page


def test_what_was_held_out_of_other_data_is_not_measured(run: Run, pairs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    settings = [f"data.source={pairs}", "data.holdout=1", f"out={folder}"]
    write_recipe(load_recipe("tiny-canny", settings), folder)
    facts = {"data_pairs": 5, "data_held_out": 1}
    asked = ("evaluate", folder, "--adapter", "canny", *QUICKEST)
    (folder / "facts.json").write_text(json.dumps(facts | {"data_held_out_sha256": "0" * 64}))
    assert f"the data set {pairs} has changed since {folder} was trained on it" in refusal(run(*asked))
    (folder / "facts.json").write_text(json.dumps(facts))  # of a run without a cache
    run(*asked).done()
    with (pairs / "metadata.jsonl").open("a") as rows:
        rows.write("\n" + json.dumps({"file_name": "images/0.png", "canny_file_name": "canny/0.png"}))
    assert "which pairs were held out is not known any more" in refusal(run(*asked))


def test_adapters_that_may_know_the_pairs_are_told_wherever_these_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    infos = {}
    for name, source, seed, digest in [
        ("first", "below/photos", 1, "a"),
        ("again", "below/photos", 1, "a"),
        ("second", "below/photos", 2, "b"),
        ("uncached", "below/photos", 1, ""),
        ("other", "photos", 1, "c"),
    ]:
        result = tmp_path / name / "controlnet"
        (tmp_path / name / "checkpoints/step-000001").mkdir(parents=True)
        result.mkdir()
        recipe = load_recipe("tiny-canny", [f"data.source={source}", f"seed={seed}", f"out={name}"])
        write_recipe(recipe, tmp_path / name)
        (tmp_path / name / "facts.json").write_text(json.dumps({"data_sha256": digest}))
        header = {"recipe": {"seed": seed, "data": {"source": "photos"}}, "data_sha256": digest}
        infos[name] = AdapterInfo(map=MAPS["canny"], training=header)
    (tmp_path / "copied").mkdir()
    infos |= {"copied": infos["first"], "canny": AdapterInfo(map=MAPS["canny"])}

    def said(data: str, *adapters: str) -> list[str]:
        compared = [Compared(name, "canny", {}, label=name) for name in adapters]
        request = Request(data, "tiny", tuple(compared), tmp_path / "report")
        return trained_there(request, [infos[name.partition("/")[0]] for name in adapters])

    photos = str(tmp_path / "below" / "photos")
    (known, guessed) = said(photos, "first/controlnet", "copied", "other/controlnet", "canny")
    assert f"first/controlnet was trained on pairs of {photos}, which are among those" in known
    assert "copied was trained on pairs of a data set that is called photos, too, which may be" in guessed
    (other, checkpoint) = said("first", "second/controlnet", "second/checkpoints/step-000001")
    assert "was trained on pairs of below/photos, and not on the same ones as the run" in other
    assert checkpoint.startswith("second/checkpoints/step-000001 was trained on pairs of below/photos")
    same = (
        "first/controlnet",
        "again/controlnet",
        "uncached/controlnet",
        "other/controlnet",
        "copied",
        "canny",
    )
    assert said("first", *same) == []
    assert said("world", "first/controlnet", "canny") == []


@pytest.mark.slow
def test_an_adapter_of_another_kind_is_told(run: Run):
    asked = ("--adapter", "depth=canny", "--adapter", "depth=canny:0.5", "--adapter", "depth")
    outcome = run("evaluate", *asked, "-n", 1, *QUICKEST)
    outcome.done()
    line = "adapter canny learned to follow canny maps, not depth"
    assert outcome.err.count(line) == 1
    assert told(Path("report"))["warnings"] == [line]


@pytest.mark.slow
def test_a_network_for_several_kinds(run: Run, pairs, tmp_path, monkeypatch):
    """Each kind is measured with the maps of its own column."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (pairs / "metadata.jsonl").read_text().splitlines()]
    (pairs / "depth").mkdir()
    for number, row in enumerate(rows):
        images.write_png(pairs / "depth" / f"{number}.png", np.full((160, 160, 3), 40 * number, np.uint8))
        row["depth_file_name"] = f"depth/{number}.png"
    (pairs / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ["steps=1", "warmup=0", "batch_size=2", "score_scenes=0", "monitor_every=0", "sample_every=0"]
    settings += ['data.map_column=["canny","depth"]', f"data.source={pairs}", "data.holdout=1", "out=run"]
    run("train", "tiny-several", *settings).done()
    run("evaluate", "run", *QUICK).done()
    report = told(Path("report"))
    labels = [(one["label"], one["kind"]) for one in report["adapters"]]
    assert labels == [("run (canny)", "canny"), ("run (depth)", "depth")]
    (shown,) = (Path("report/maps") / "asked-depth").iterdir()
    assert np.array_equal(np.unique(images.load_picture(shown)), [40 * int(shown.stem)])
    (shown,) = (Path("report/maps") / "asked-canny").iterdir()
    assert set(np.unique(images.load_picture(shown))) == {0, 255}


@pytest.mark.slow
def test_a_map_that_no_preprocessor_makes(run: Run, pairs, tmp_path):
    run(
        "evaluate", pairs, "map_column=canny_file_name", "--adapter", "scars=canny", "-n", 2, *QUICKEST
    ).done()
    report = told(Path("report"))
    assert report["skipped"]["scars"] == "no preprocessor is known that makes scars maps of pictures"
    assert len(list((tmp_path / "report" / "pictures").iterdir())) == 4


def test_a_row_that_was_cut_short_is_no_row(tmp_path):
    rows = Rows(tmp_path)
    rows.add(Row("a", 1, 0, {"canny": {"edge F1": 0.5}}))
    with (tmp_path / "rows-0.jsonl").open("a") as file:
        file.write('{"arm": "a", "number": 2, "se')
    again = Rows(tmp_path)
    assert list(again.found) == [("a", 1, 0)]
    again.add(Row("a", 3, 0, {}))
    assert list(Rows(tmp_path).found) == [("a", 1, 0), ("a", 3, 0)]
    assert list(Rows(tmp_path, process=1).found) == [("a", 1, 0), ("a", 3, 0)]


def test_a_row_that_was_scored_for_more_kinds_wins(tmp_path):
    Rows(tmp_path, process=1).add(Row("a", 1, 0, {"canny": {"edge F1": 0.5}}))
    Rows(tmp_path, process=0).add(Row("a", 1, 0, {"canny": {"edge F1": 0.5}, "depth": {"depth error": 0.1}}))
    assert set(Rows(tmp_path).found[("a", 1, 0)].scores) == {"canny", "depth"}  # though rows-1 is read last


@pytest.mark.slow
def test_two_processes_share_the_pairs(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "controlkit"]
    asked = ["evaluate", "--adapter", "canny", "-n", "5", *map(str, QUICK)]
    done = subprocess.run(
        [*launch, *asked, "-o", "two"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote ") == 2
    assert sorted(path.name for path in (tmp_path / "two").glob("rows-*")) == ["rows-0.jsonl", "rows-1.jsonl"]
    command(*asked, "-o", tmp_path / "one").done()
    for pair in zip(told(tmp_path / "two")["examples"], told(tmp_path / "one")["examples"], strict=True):
        two, one = (found["scores"]["canny"]["edge F1"] for found in pair)
        assert two == pytest.approx(one, abs=0.02)  # the threads of a process change its rounding


@pytest.mark.slow
def test_a_kill_loses_only_the_picture_at_hand(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    asked = ["evaluate", "--adapter", "canny", "-n", "6", *map(str, QUICK)]
    command(*asked, "-o", tmp_path / "whole").done()
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "controlkit", *asked, "-o", str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(list(folder.glob("pictures/*/*.png"))) < 8:
        pass
    process.kill()
    process.wait()
    assert process.returncode == -9
    made = {path: path.stat().st_mtime_ns for path in folder.glob("pictures/*/*.png")}
    assert not list(folder.rglob("*.png.part"))
    command(*asked, "-o", folder).done()
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    assert told(folder)["results"] == told(tmp_path / "whole")["results"]
