"""Suggestions for names that do not exist."""

from controlkit.naming import did_you_mean, unknown


def test_the_closest_choice_is_suggested() -> None:
    choices = ["canny", "depth", "openpose"]
    assert did_you_mean("cany", choices) == " (did you mean 'canny'?)"
    assert did_you_mean("OpenPos", choices) == " (did you mean 'openpose'?)"
    assert did_you_mean("seg", choices) == ""
    assert did_you_mean("seg", []) == ""


def test_the_error_is_one_line_with_all_choices() -> None:
    assert str(unknown("map", "dept", ["openpose", "depth"])) == (
        "unknown map 'dept' (did you mean 'depth'?); choose from: depth, openpose"
    )
