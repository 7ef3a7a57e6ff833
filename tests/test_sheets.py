"""Contact sheets: nothing overlaps, small pictures stay crisp, labels are there."""

import time

import numpy as np
import pytest

from controlkit.sheets import contact_sheet

PAPER = 255


def solid(height: int, width: int, level: int = 0) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 200, (20, 20, 3), dtype=np.uint8)
    sheet = contact_sheet([[(picture, "")]], cell=64)
    enlarged = picture.repeat(3, axis=0).repeat(3, axis=1)
    found = [
        (y, x)
        for y in range(sheet.shape[0] - 59)
        for x in range(sheet.shape[1] - 59)
        if np.array_equal(sheet[y : y + 60, x : x + 60], enlarged)
    ]
    assert len(found) == 1
    assert abs((sheet.shape[1] - 60) / 2 - found[0][1]) <= 1  # in the middle of its cell


def test_large_and_wide_pictures_fit_with_their_aspect() -> None:
    sheet = contact_sheet([[(solid(300, 600), ""), (solid(600, 200), "")]], cell=60)
    dark = (sheet == 0).all(axis=2)
    rows, columns = dark.any(axis=1), dark.any(axis=0)
    assert rows.sum() == 60
    assert columns.sum() == 60 + 20
    assert dark.sum() == 60 * 30 + 20 * 60


def test_labels_and_titles_take_their_own_space() -> None:
    plain = contact_sheet([[(solid(64, 64), "")], [(solid(64, 64), "")]], cell=64)
    labelled = contact_sheet([[(solid(64, 64), "canny")], [(solid(64, 64), "")]], cell=64)
    titled = contact_sheet([[(solid(64, 64), "")], [(solid(64, 64), "")]], cell=64, title="A demo")
    assert plain.shape[0] < labelled.shape[0]
    assert plain.shape[0] < titled.shape[0]
    pixels = [(sheet == 0).all(axis=2).sum() for sheet in (plain, labelled, titled)]
    assert pixels[0] == 2 * 64 * 64
    assert (labelled != PAPER).any(axis=2).sum() > (plain != PAPER).any(axis=2).sum() + 20  # there is ink


def test_long_labels_stay_in_their_cell() -> None:
    label = "a very long label\nthat goes on and on " * 5
    sheet = contact_sheet([[(solid(64, 64), label), (solid(64, 64), "")]], cell=64)
    gap = sheet[-30:, 16 + 64 + 1 : 16 + 64 + 15]
    assert (gap == PAPER).all()


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("Bär, Größe, été", "Bar, Grosse, ete"),
        ("Ba\u0308r \u2013 Łódź, œuvre", "Bar - Lodz, oeuvre"),
        ("人 ☕\ufe0f", "? ?"),
    ],
)
def test_letters_that_the_font_lacks_are_no_boxes(label: str, written: str) -> None:
    sheets = [contact_sheet([[(solid(64, 256), text)]], title=text) for text in (label, written)]
    assert np.array_equal(*sheets)
    drawn, mark = (contact_sheet([[(solid(64, 256), text)]]) for text in ("«", "?"))
    assert not np.array_equal(drawn, mark)


def test_a_long_label_takes_no_time() -> None:
    """A prompt may be long, and the sheet of a grid is drawn after every picture."""
    began = time.process_time()
    sheet = contact_sheet([[(solid(64, 64), "words " * 500)] * 4], cell=64)
    assert time.process_time() - began < 1
    assert np.array_equal(sheet, contact_sheet([[(solid(64, 64), "words " * 20)] * 4], cell=64))


def test_rows_may_differ_in_length() -> None:
    sheet = contact_sheet([[(solid(8, 8), "a")], [(solid(8, 8), "b")] * 3], cell=32)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 16 + 3 * (32 + 16)


def test_nothing_to_show_is_an_error() -> None:
    for rows in ([], [[]]):
        with pytest.raises(ValueError, match="at least one picture"):
            contact_sheet(rows)
    with pytest.raises(ValueError, match="at least 16"):
        contact_sheet([[(solid(8, 8), "")]], cell=4)
