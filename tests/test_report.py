"""report.html: one file that holds everything, whatever the run folder holds."""

import itertools
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from controlkit import images
from controlkit.training.reporting.charts import Mark, Series, line_chart, number, smoothed, thinned, ticks
from controlkit.training.reporting.report import verdict, write_report
from controlkit.training.reporting.run_record import read_run, versions
from controlkit.training.watch import Watch, read_rows

CONFIG = """task = "controlnet"
map = "canny"
base = "tiny"
steps = 400
batch_size = 16
learning_rate = 4e-4
zero_convolution_rate = 10.0
warmup = 30

[data]
source = "photos & <b>more</b>"
"""
VERDICT = '<p class="verdict{bad}">Control has not taken hold so far.</p>'
VOID = {"meta", "img", "path", "line", "br"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps what the page shows and refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.text, self.tags = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID or tag == "path":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def look(step, gap):
    return {
        "step": step,
        "loss_map": 0.2 - gap / 10,
        "loss_no_map": 0.2,
        "loss_other_map": 0.2 + gap / 10,
        "gap": gap,
        "gap_error": 0.005,
    }


def row(step):
    entry = {
        "step": step,
        "loss": 0.3 - step / 4000,
        "grad_norm": 1 + 200 * (step == 200),
        "seconds": (step if step <= 200 else step - 200) / 2,  # it was resumed there
    }
    entry |= {f"loss_q{k}": 0.1 * (k + 1) for k in range(4)}
    entry |= {"learning_rates": {"trunk": 4e-4, "zero convolutions": 4e-3}}
    return entry | {"samples_per_s": 20.0, "peak_mb": 1500.0}


@pytest.fixture
def run(tmp_path):
    """A run of 400 steps, taken up again at step 200, in which control took hold at step 150."""
    folder = tmp_path / "run <1>"
    (folder / "samples").mkdir(parents=True)
    (folder / "controlnet").mkdir()
    (folder / "controlnet" / "weights.bin").write_bytes(b"weights")
    (folder / "config.toml").write_text(CONFIG)
    rows = [row(step) for step in range(10, 401, 10)]
    rows += [look(step, 0.0 if step < 150 else 0.3) for step in range(0, 401, 50)]
    rows += [
        {"step": step, "edge F1": step / 800, "edge F1 floor": 0.36, "edge F1 ceiling": 0.78}
        for step in (200, 300, 400)
    ]
    rows += [{"step": 200, "event": "resumed at step 200 <script>alert(1)</script>"}]
    rows[5]["loss"] = float("nan")
    lines = [json.dumps(entry) for entry in sorted(rows, key=lambda entry: entry["step"])]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, "not json", "[1]", '{"step": 410, "los']))
    scores = {
        "pairs": 8,
        "floor": {"edge F1": 0.36},
        "control": {"edge F1": 0.52},
        "ceiling": {"edge F1": 0.78},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "facts.json").write_text(json.dumps({"base": "sha256 00ff", "data pairs": 1000}))
    for step in (100, 200, 400):
        picture = np.full((64, 900, 3), step % 256, np.uint8)
        images.write_png(folder / "samples" / f"step-{step:06d}.png", picture)
    (folder / "samples" / "step-000300.png").write_bytes(b"not a picture")
    return folder


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_run_is_told_in_one_file(run):
    page = page_of(run)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert len(page.references) == 3  # the grids that are pictures
    assert "script" not in page.tags
    assert "link" not in page.tags
    for words in (
        "A canny ControlNet for tiny",
        "run <1>",
        "step 400 of 400 (finished)",
        "Control took hold at step 150.",
        "resumed at step 200 <script>alert(1)</script>",
        "photos & <b>more</b>",
        "0.520 of 0.780",
        "30.0%",
        "1,500",
        "sha256 00ff",
        "controlnet/weights.bin",
        f"torch{versions()['torch']}",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 9
    assert "zero_convolution_rate = 10.0" in page.text
    assert "3 min 20 s" in page.text


def test_no_address_is_fetched(run):
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", write_report(run).read_text(encoding="utf-8"))
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.toml", "scores.json", "facts.json", "samples"])
def test_any_part_may_be_missing_or_broken(run, missing):
    path = run / missing
    if path.is_dir():
        path.rename(run / "elsewhere")
        page_of(run)
        path.write_text("a file where a folder should be")
    else:
        path.write_bytes(b"\xff\xfe{[broken")
        page_of(run)
        path.unlink()
    page_of(run)


def test_an_empty_folder_gets_a_report_and_no_folder_does_not(tmp_path):
    (tmp_path / "run").mkdir()
    page = page_of(tmp_path / "run")
    assert "not watched" in page.text
    assert "step 0 (not finished)" in page.text
    with pytest.raises(ValueError, match=r"none is not a folder; give the folder of a run"):
        write_report(tmp_path / "none")


def test_a_run_without_control_is_told_what_to_do(run):
    lines = [json.dumps(look(step, 0.0) | {"loss_map": 0.18}) for step in range(0, 401, 50)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    text = page_of(run).text
    assert "Control has not taken hold so far." in text
    assert "maps do not belong to their pictures" in text


def test_control_that_is_not_due_yet_is_no_fault(run):
    (run / "scores.json").unlink()
    looks = [look(step, 0.0) | {"loss_map": 0.18} for step in (0, 10)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, looks)))
    assert verdict(read_run(run)).startswith(VERDICT.format(bad=" bad")), "it is finished"
    (run / "controlnet").rename(run / "elsewhere")
    assert verdict(read_run(run)) == VERDICT.format(bad="")


def test_a_record_forgives_and_adds_up(run):
    record = read_run(run)
    assert record.step == 400
    assert record.resumed == [200]
    assert len(record.curve("loss")) == 39  # one was not a number
    assert record.table("learning_rates").keys() == {"trunk", "zero convolutions"}
    assert record.seconds == 200
    entries = [{"step": s, "seconds": t} for s, t in ((10, 5), (20, 10), (30, 4), (40, 8))]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert read_run(run).seconds == 18  # the second stretch began anew
    entries = [{"step": 10, "seconds": 200}, {"step": 8, "event": "resumed at step 8"}]
    entries = [*entries, {"step": 10, "event": "resumed at step 10"}, {"step": 20, "seconds": 10_000}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert read_run(run).seconds == 10_200  # though its first row shows more than the first stretch took


# --- curves ----


def drawn(*series, **options):
    svg = line_chart(series, label="a <curve>", **options)
    return ElementTree.fromstring(svg)


def test_a_curve_goes_where_its_values_are():
    paths = drawn(Series("a", [(0, 0), (100, 10)], 2), across=(0, 200)).findall("path")
    (x0, y0), (x1, y1) = [tuple(map(float, p.split())) for p in paths[0].get("d")[1:].split("L")]
    assert x1 > x0
    assert y1 < y0  # up is less in SVG
    full = drawn(Series("a", [(0, 0), (100, 10)], 2)).findall("path")[0].get("d")
    assert float(full.split("L")[1].split()[0]) - x0 == pytest.approx(2 * (x1 - x0), abs=0.2)


@pytest.mark.parametrize(
    "points",
    [
        [(0, 5.0), (1, 5.0)],
        [(0, 0.0), (1, 0.0)],
        [(0, -3e-9), (1, 0.5)],
        [(0, 1e-7), (1, 1e7)],
        [(0, -1.0), (1, 1.0), (2, float("nan")), (3, float("inf"))],
    ],
)
def test_curves_stay_within_their_frame(points):
    for options in ({}, {"from_zero": True}, {"may_log": True}, {"percent": True}):
        root = drawn(Series("a", points), marks=[Mark(0.5, "here & there")], **options)
        width, height = map(float, root.get("viewBox").split()[2:])
        for path in root.findall("path"):
            for x, y in (map(float, p.split()) for p in path.get("d")[1:].split("L")):
                assert 0 <= x <= width
                assert 0 <= y <= height


def test_a_tiny_curve_looks_tiny():
    path = drawn(Series("a", [(0, 0.0), (1, 1e-5)]), from_zero=True, reach=0.04).find("path").get("d")
    start, end = (float(point.split()[1]) for point in path[1:].split("L"))
    assert start - end < 1


def test_there_is_no_curve_of_one_point():
    assert line_chart([Series("a", [(1, 2)]), Series("b", [])], label="x") == ""


def test_names_and_marks_do_not_overlap():
    series = [Series(f"curve {k}", [(0, 1), (1, 1 + k / 1000)], k) for k in range(4)]
    root = drawn(*series, marks=[Mark(0.5, "took hold"), Mark(0.51, "resumed"), Mark(0.52, "again")])
    heights = sorted(float(text.get("y")) for text in root.findall("text[@class='name']"))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 15
    words = root.findall("text[@class='mark-text']")
    assert [word.text for word in words] == ["took hold", "resumed"]
    assert words[0].get("y") != words[1].get("y")


def test_no_spike_is_lost_by_thinning():
    points = [(k, 0.0) for k in range(10_000)]
    points[7777] = (7777, 9.0)
    few = thinned(points)
    assert len(few) <= 400
    assert (7777, 9.0) in few
    assert few == sorted(few)
    assert thinned(points[:400]) == points[:400]


def test_smoothing_keeps_a_line_and_calms_a_zigzag():
    assert smoothed([(k, 2.0) for k in range(9)]) == [(k, 2.0) for k in range(9)]
    calm = smoothed([(k, (-1.0) ** k) for k in range(100)], share=0.2)
    assert max(abs(y) for _, y in calm[10:-10]) < 0.1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-6, 2.5e-6), (0, 123456), (0.13, 0.14)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    step = found[1] - found[0]
    assert re.fullmatch(r"[125]\.0+e[+-]\d+", f"{step:.5e}")


def test_numbers_are_short():
    values = (0, 0.125, 640, 12_345, 1_234_567, 0.00012, -0.5, 1e-5)
    assert [number(v) for v in values] == ["0", "0.125", "640", "12.3k", "1.23M", "1.2e-4", "-0.5", "1e-5"]


def test_a_name_may_hold_what_is_a_line_end_elsewhere(tmp_path):
    watch = Watch(tmp_path, steps=4, batch=1, progress=lambda _: None)
    watch.open_log(0)
    watch.say(2, "step 2 skipped: a\u2028cat\x85.png", keep=True)
    watch.after_step(3, {"loss": 0.5})
    watch.open_log(2)
    assert [row["event"] for row in read_rows(tmp_path)] == [
        "step 2 skipped: a\u2028cat\x85.png",
        "resumed at step 2",
    ]
    assert [step for step, _ in read_run(tmp_path).events] == [2, 2]
