"""`controlkit draw`: poses from JSON files, changed and drawn at any size."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from controlkit import draw_job, figures, preprocessors
from controlkit.cli import app
from controlkit.images import load_picture

Draw = Callable[..., str]


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Run the command beside pose.json, a figure's true joints; return what it printed or refused."""
    monkeypatch.chdir(tmp_path)
    joints = figures.render(4).joints.astype(float)
    preprocessors.write_poses("pose.json", preprocessors.Poses(joints[None], 128, 128))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["draw", *arguments])
        if result.exit_code:
            assert result.exit_code == 2, result.stderr
            (line,) = result.stderr.splitlines()
            return line
        return result.stdout

    return run


def drawn(name: str) -> tuple[np.ndarray, preprocessors.Poses]:
    return load_picture(name), preprocessors.read_poses(Path(name).with_suffix(".json"))


def test_a_pose_is_drawn_and_written_again(draw: Draw) -> None:
    assert "wrote out.png\nwrote out.json" in draw("pose.json", "-o", "out.png")
    image, poses = drawn("out.png")
    before = preprocessors.read_poses("pose.json")
    np.testing.assert_array_equal(poses.people, before.people)
    np.testing.assert_array_equal(image, preprocessors.draw_poses(before.people, 128, 128))
    assert image.any()


def test_a_drawing_may_stand_beside_its_joints(draw: Draw) -> None:
    before = Path("pose.json").read_bytes()
    assert draw("pose.json", "-o", "pose.png").startswith("wrote pose.png\nfollow")
    assert Path("pose.json").read_bytes() == before
    assert load_picture("pose.png").any()


def test_one_picture_of_a_batch_is_drawn(draw: Draw) -> None:
    one = json.loads(Path("pose.json").read_text())
    Path("batch.json").write_text(json.dumps([{**one, "people": []}, one]))
    assert "batch.json holds 2 pictures" in draw("batch.json")
    assert "wrote out.png" in draw("batch.json", "--picture", "2", "-o", "out.png")
    assert len(drawn("out.png")[1].people) == 1


def test_sizes_and_styles(draw: Draw) -> None:
    draw("pose.json", "-o", "big.png", "--size", "640x960", "--style", "xinsir")
    image, poses = drawn("big.png")
    assert image.shape == (960, 640, 3)
    before = preprocessors.read_poses("pose.json")
    seen = before.people[..., 2] > 0
    np.testing.assert_allclose(poses.people[seen][:, :2], before.people[seen][:, :2] * [5, 7.5])
    np.testing.assert_array_equal(image, preprocessors.draw_poses(poses.people, 640, 960, style="xinsir"))


def test_a_mirrored_pose_is_the_other_way_round(draw: Draw) -> None:
    draw("pose.json", "-o", "m.png", "--mirror")
    draw("m.json", "-o", "back.png", "--mirror")
    _, mirrored = drawn("m.png")
    _, back = drawn("back.png")
    before = preprocessors.read_poses("pose.json").people[0]
    right_wrist, left_wrist = 4, 7
    assert mirrored.people[0, left_wrist, 0] == pytest.approx(128 - before[right_wrist, 0])
    np.testing.assert_allclose(back.people[0], before, atol=1e-9)


def test_limbs_are_dropped_and_jitter_repeats(draw: Draw) -> None:
    draw("pose.json", "-o", "a.png", "--drop", "left-arm", "--drop", "head")
    _, poses = drawn("a.png")
    assert not poses.people[0, [6, 7, 0, 14, 15, 16, 17], 2].any()
    assert poses.people[0, [2, 3, 4, 5], 2].all()
    options = ("--jitter", "3", "--drop-random", "0.5", "--seed", "5")
    draw("pose.json", "-o", "b.png", *options)
    draw("pose.json", "-o", "c.png", *options)
    assert Path("b.json").read_bytes() == Path("c.json").read_bytes()
    draw("pose.json", "-o", "d.png", *options[:-1], "6")
    assert Path("b.json").read_bytes() != Path("d.json").read_bytes()


def test_openposes_own_files_need_a_canvas(draw: Draw) -> None:
    points = np.arange(75, dtype=float).reshape(25, 3)
    file = {"version": 1.3, "people": [{"person_id": [-1], "pose_keypoints_2d": points.ravel().tolist()}]}
    Path("own.json").write_text(json.dumps(file))
    assert "canvas" in draw("own.json", "-o", "own.png")
    assert "wrote own2.png" in draw("own.json", "-o", "own2.png", "--canvas", "200x100")
    image, poses = drawn("own2.png")
    assert image.shape == (100, 200, 3)
    assert poses.people.shape == (1, 18, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pose.json", "-o", "pose.png", "--mirror"), "would overwrite pose.json"),
        (("pose.json", "-o", "pose.png", "--size", "9x9"), "would overwrite pose.json"),
        (("pose.json", "-o", "x.jpg"), "must end in .png"),
        (("no.json",), "no.json cannot be read"),
        (("pose.json", "--size", "5"), "must be WIDTHxHEIGHT"),
        (("pose.json", "--size", "0x5"), "must be WIDTHxHEIGHT"),
        (("pose.json", "--size", "9000x5"), "from 1 to 8192"),
        (("pose.json", "--style", "v2"), "unknown draw style 'v2'"),
        (("pose.json", "--drop", "left-am"), "unknown limb 'left-am' (did you mean 'left-arm'?)"),
        (("pose.json", "--drop-random", "1.5"), "from 0 to 1"),
        (("pose.json", "--jitter", "-1"), "0 or more"),
        (("pose.json", "--jitter", "nan"), "0 or more"),
        (("pose.json", "--seed", "-1"), "must not be negative"),
    ],
)
def test_mistakes_are_one_line(draw: Draw, arguments: tuple[str, ...], message: str) -> None:
    before = Path("pose.json").read_bytes()
    assert message in draw(*arguments)
    assert Path("pose.json").read_bytes() == before
    assert not list(Path().glob("*.png"))


def test_a_canvas_too_large_for_a_map_needs_a_size(draw: Draw) -> None:
    preprocessors.write_poses("huge.json", preprocessors.Poses(np.ones((1, 18, 3)), 200_000, 100_000))
    refusal = (
        "huge.json has a canvas of 200000 x 100000 pixels, and a map at most 8192 on a side: give --size"
    )
    assert refusal in draw("huge.json", "-o", "huge.png")
    assert "wrote huge.png" not in draw("huge.json", "-o", "huge.png", "--size", "8193x9")
    assert "wrote small.png" in draw("huge.json", "-o", "small.png", "--size", "200x100")


def test_a_map_without_anybody_is_noted(draw: Draw) -> None:
    preprocessors.write_poses("nobody.json", preprocessors.Poses(np.zeros((0, 18, 3)), 64, 64))
    with pytest.warns(UserWarning, match="the openpose map is black"):
        draw_job.draw("nobody.json", output="none.png")


def test_links_in_a_circle_are_one_plain_line(draw: Draw) -> None:
    Path("round.json").symlink_to("round.json")
    assert draw("round.json").startswith("error: round.json cannot be read: ")
