"""The demonstration, with the bundled models: it runs, and its pictures follow their maps."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from controlkit.cli import app
from controlkit.demo import COLOUR_STRIDE, MEASURES, ROWS, DemoResult, Score, _things, recoloured
from controlkit.figures import COLOURS, render
from controlkit.images import load_picture


@pytest.mark.parametrize("seed", range(5))
def test_prompts_differ_in_their_colours_only(seed: int) -> None:
    caption = render(seed).caption
    assert recoloured(caption, 0) == caption
    other = recoloured(caption, COLOUR_STRIDE)
    changed = [(a, b) for a, b in zip(caption.split(), other.split(), strict=True) if a != b]
    assert {a for a, _ in changed} - {"a", "an"} == set(caption.split()) & set(COLOURS)
    assert {b for _, b in changed} - {"a", "an"} <= set(COLOURS)
    assert len(set(other.split()) & set(COLOURS)) == len(set(caption.split()) & set(COLOURS))


def test_articles_follow_the_new_colour() -> None:
    names = list(COLOURS)
    to_orange = (names.index("orange") - names.index("red")) % len(names)
    assert recoloured("a red cube", to_orange) == "an orange cube"
    assert recoloured("an orange cube", -to_orange) == "a red cube"


def test_labels_name_the_things() -> None:
    prompt = "a red figure standing next to an orange cube and a blue ball on a white floor under a gray sky"
    assert _things(prompt) == "red figure, orange cube"


def test_the_table_is_in_columns() -> None:
    result = DemoResult(
        render(0).picture,
        render(0).picture,
        "a figure",
        (Score("canny", MEASURES["canny"], 0.914, 0.2),),
        12.0,
    )
    head, row = result.table()
    assert head.endswith("with map   without")
    assert row.startswith("canny ")
    assert row.endswith("0.91      0.20")
    assert len(head) == len(row)


def test_the_demo_shows_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--seed", "1", "-o", "sheet.png"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    height, width, _ = load_picture("sheet.png").shape
    assert width > 5 * 256
    assert height > len(ROWS) * 256
    scores = {
        line.split("  ")[0]: [float(x) for x in line.split()[-2:]] for line in result.stdout.splitlines()[1:4]
    }
    assert list(scores) == ["canny", "openpose", "depth"]
    assert scores["canny"][0] > scores["canny"][1] + 0.2, "the pictures do not follow their edges"
    assert scores["openpose"][0] > scores["openpose"][1] + 0.2, "the pictures do not follow their pose"
    assert scores["depth"][0] < scores["depth"][1] - 5, "the pictures do not follow their depth"
