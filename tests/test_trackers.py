"""Trackers: names are checked first, configurations are flattened, and no failure stops a run."""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerate import tracking

from controlkit.training.reporting import trackers
from controlkit.training.reporting.trackers import Trackers, check_trackers, flattened, open_trackers

CONFIG = {
    "steps": 3,
    "rate": 1e-4,
    "data": {"source": Path("/a b"), "map_column": ["x", "y"], "flip": True},
    "init": None,
}


class Journal(tracking.GeneralTracker):
    """A tracker of accelerate's kind that writes what it is told into a file."""

    name = "journal"
    requires_logging_directory = True
    main_process_only = False

    def __init__(self, run_name, logging_dir, **settings):
        super().__init__()
        self.path = Path(logging_dir) / f"{run_name}.jsonl"

    def _write(self, **entry):
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @property
    def tracker(self):
        return self.path

    def store_init_configuration(self, values):
        assert all(isinstance(value, str | int | float | bool) for value in values.values())
        self._write(config=values)

    def log(self, values, step=None, **_):
        self._write(step=step, **values)

    def log_images(self, values, step=None, **_):
        self._write(step=step, shapes={name: [p.shape for p in shown] for name, shown in values.items()})

    def finish(self):
        self._write(finished=True)


class Broken(Journal):
    """One whose network has gone."""

    name = "broken"
    error: BaseException = ConnectionError("the service\ndoes not answer")

    def log(self, values, step=None, **_):
        raise self.error


class Locked(Journal):
    """One that nobody has logged in to."""

    name = "locked"

    def store_init_configuration(self, values):
        raise RuntimeError("no key.\nUse login")


@pytest.fixture
def known(monkeypatch):
    """Make the three trackers above known, by accelerate's own table."""
    for kind in (Journal, Broken, Locked):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    ours = {kind.name: ("json",) for kind in (Journal, Broken, Locked)}
    monkeypatch.setattr(trackers, "PACKAGES", {**trackers.PACKAGES, **ours})


def entries(folder, project="p"):
    return [json.loads(line) for line in (folder / "trackers" / f"{project}.jsonl").read_text().splitlines()]


def test_a_misspelt_tracker_is_named():
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match=r"^unknown tracker 'all'; choose from: aim, [^\n]+$"):
        check_trackers(["all"])


def test_our_names_are_accelerates():
    assert set(trackers.PACKAGES) <= set(tracking.LOGGER_TYPE_TO_CLASS)


def test_a_missing_package_is_named_with_its_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": ("no_such_package",)})
    with pytest.raises(ValueError, match=r"^tracker 'wandb' needs .*: pip install no_such_package, [^\n]+$"):
        open_trackers(["wandb"], run_folder=tmp_path / "run", config={})
    assert not (tmp_path / "run").exists()
    (tmp_path / "no_such_package").mkdir()  # wandb leaves such a folder behind
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match="not installed"):
        check_trackers(["wandb"])


def test_everything_arrives_in_plain_types(known, tmp_path):
    said = []
    opened = open_trackers(
        ["journal", "journal"], run_folder=tmp_path, config=CONFIG, project="p", report=said.append
    )
    row = {"step": 5, "loss": 0.5, "learning_rates": {"trunk": 1e-4}, "event": "resumed", "flag": True}
    opened.log({**row, "grad_norm": float("nan")}, 5)
    opened.log({"step": 6, "event": "nothing else"}, 6)
    opened.log_picture("samples", np.zeros((4, 6, 3), np.uint8), 5)
    opened.finish()
    opened.log({"loss": 1.0}, 7)
    assert entries(tmp_path) == [
        {
            "config": {
                "steps": 3,
                "rate": 1e-4,
                "data/source": "/a b",
                "data/map_column": "x, y",
                "data/flip": True,
                "init": "",
            }
        },
        {"step": 5, "loss": 0.5, "learning_rates/trunk": 1e-4},
        {"step": 5, "shapes": {"samples": [[4, 6, 3]]}},
        {"finished": True},
    ]
    assert said == []


def test_a_tracker_that_fails_is_told_once_and_given_up_in_the_end(known, tmp_path):
    said = []
    opened = open_trackers(
        ["journal", "broken"], run_folder=tmp_path, config={}, project="p", report=said.append
    )
    for step in range(8):
        opened.log({"loss": 0.1}, step)
    assert said == [
        "tracker broken fails (ConnectionError: the service); the training goes on",
        "tracker broken failed 5 times in a row and is given up",
    ]
    assert sum("loss" in entry for entry in entries(tmp_path)) == 8


def test_ctrl_c_in_a_tracker_is_ctrl_c(tmp_path):
    journal = Broken("p", tmp_path)
    journal.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        Trackers([journal]).log({"loss": 0.1}, 1)


def test_a_tracker_that_cannot_be_opened_stops_the_run_in_a_line(known, tmp_path):
    message = r"^tracker 'locked' cannot be opened: RuntimeError: no key\. \(or leave it out of trackers\)$"
    with pytest.raises(ValueError, match=message):
        open_trackers(["journal", "locked"], run_folder=tmp_path, config={}, project="p")
    assert entries(tmp_path)[-1] == {"finished": True}  # what was open is closed


def test_without_trackers_nothing_is_made(tmp_path):
    opened = open_trackers([], run_folder=tmp_path / "run", config=CONFIG)
    opened.log({"loss": 1.0}, 1)
    opened.finish()
    assert not (tmp_path / "run").exists()


def test_a_run_has_one_name_for_services_that_take_it_up_again(tmp_path):
    first = trackers._run_id(tmp_path)
    assert trackers._run_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert trackers._run_id(tmp_path / "other") != first


def test_flattening_keeps_numbers():
    assert flattened({"a": {"b": {"c": 1}}, "d": [1, 2], "e": 2.5, "f": False}) == {
        "a/b/c": 1,
        "d": "1, 2",
        "e": 2.5,
        "f": False,
    }


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    opened = open_trackers(["tensorboard"], run_folder=tmp_path, config=CONFIG, project="p")
    opened.log({"step": 1, "loss": 0.5}, 1)
    opened.log_picture("samples", np.zeros((8, 8, 3), np.uint8), 1)
    opened.finish()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out*"))
    assert b"loss" in written
    assert b"samples" in written


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_the_steps_of_a_run_that_was_taken_up_again_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        time.sleep(1.1 * (begun > 0))  # files are read in the order of the seconds in their names
        opened = open_trackers(["tensorboard"], run_folder=tmp_path, config=CONFIG, project="p", step=begun)
        for step in steps:
            opened.log({"loss": begun + step / 10}, step)
        opened.finish()
    shown = EventAccumulator(str(tmp_path / "trackers" / "p")).Reload().Scalars("loss")
    assert [event.step for event in shown] == [1, 2, 3, 4, 5]
    assert shown[2].value == pytest.approx(2.3)
