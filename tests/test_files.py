"""Files: written whole or not at all, with the mode the umask gives, and plain errors."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controlkit import files


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the kernel refuse to write more than `size` bytes to any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int, expected: int) -> None:
    with umask(mask):
        files.write_text(tmp_path / "a.txt", "hello")
        with files.replace_folder(tmp_path / "model") as folder:
            (folder / "weights").write_bytes(b"1")
            (folder / "weights").chmod(0o600)  # as safetensors does
    assert mode(tmp_path / "a.txt") == expected
    assert mode(tmp_path / "model" / "weights") == expected
    assert mode(tmp_path / "model") == 0o777 & ~mask


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")
    with (
        largest_file(1000),
        pytest.raises(ValueError, match=r"cannot write .*a\.bin: it would be larger than this disk's format"),
    ):
        files.write_bytes(path, b"x" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_said_in_plain_words() -> None:
    with pytest.raises(ValueError, match=r"^cannot write /dev/full: the disk is full$"):
        files.write_bytes("/dev/full", b"x")


def test_a_device_is_written_and_not_replaced() -> None:
    files.write_bytes("/dev/null", b"x")
    files.check_writable("/dev/null")
    assert Path("/dev/null").is_char_device()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    files.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cases = {
        tmp_path / "missing" / "a.png": "the folder .*missing does not exist",
        tmp_path: "it is a folder",
        tmp_path / "file" / "a.png": "Not a directory",
        tmp_path / ("n" * 300): "File name too long",
    }
    for path, reason in cases.items():
        with pytest.raises(ValueError, match=f"^cannot write .*: {reason}") as caught:
            files.write_bytes(path, b"x")
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=f"^cannot write .*: {reason}"):
            files.check_writable(path)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_check_writable_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    files.check_writable(tmp_path / "new.txt")
    files.check_writable(tmp_path / "old.txt")
    files.check_writable(tmp_path / "run", folder=True)
    files.check_writable(tmp_path, folder=True)
    assert os.listdir(tmp_path) == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"
    with pytest.raises(ValueError, match="there is a file of that name"):
        files.check_writable(tmp_path / "old.txt", folder=True)


def test_an_interrupt_while_trying_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files._write_new

    def interrupted(*values: Any, **named: Any) -> None:
        write(*values, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_write_new", interrupted)
    for work in (files.check_writable, lambda path: files.replace_file(path).__enter__()):
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moved", [1, 2])
def test_an_interrupt_while_folders_change_places_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    replace, done = os.replace, []

    def interrupted(*values: Any) -> None:
        replace(*values)
        done.append(values)
        if len(done) == moved:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), files.replace_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == ("old" if moved == 1 else "new")
    assert os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    with files.replace_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("newer")
    assert (tmp_path / "out" / "a").read_text() == "newer"


def test_somebody_elses_file_in_a_folder_like_tmp_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.png").write_bytes(b"")
    me = os.geteuid()
    for mode, who, refused in ((0o1777, me + 1, True), (0o777, me + 1, False), (0o1777, me, False)):
        tmp_path.chmod(mode)
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda who=who: who)
            files.check_writable(tmp_path / "mine.png")
            if not refused:
                files.check_writable(tmp_path / "theirs.png")
                continue
            with pytest.raises(ValueError, match=r"^cannot write \S+theirs.png: it is somebody else's"):
                files.check_writable(tmp_path / "theirs.png")


def test_one_at_a_time_waits_for_the_one_before(tmp_path: Path) -> None:
    told: list[str] = []

    def second() -> None:
        with files.one_at_a_time(tmp_path):
            told.append("second")

    with files.one_at_a_time(tmp_path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        told.append("first")
    waiting.join()
    assert told == ["first", "second"]
    assert not os.listdir(tmp_path)


def _writes(place: Path, how: str) -> None:
    """Write something into a folder."""
    if how == "file":
        files.write_bytes(place / "new", b"")
    elif how == "by its path":
        with files.replace_file(place / "new") as file:
            file.write_bytes(b"new")
    elif how == "folder":
        with files.replace_folder(place / "new"):
            pass
    elif how == "alone":
        with files.one_at_a_time(place):
            files.write_text(place / "new", "")
    else:
        files.check_writable(place / "new")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was left goes however new it is."""
    monkeypatch.setattr(files, "_LEFT_FOR", 0.0)


def test_what_is_new_stays_also_where_nobody_has_a_lock(tmp_path: Path) -> None:
    """Another machine may be writing it, on a disk whose locks hold on each of them alone."""
    (tmp_path / f".controlkit-{'0f' * 16}.tmp").write_text("half")
    files.write_text(tmp_path / "new", "")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("how", ["file", "by its path", "folder", "alone", "check"])
def test_what_a_killed_process_left_goes_with_the_next_thing_written(tmp_path: Path, how: str) -> None:
    left = f".controlkit-{'0f' * 16}.tmp"
    others = [f".{'0f' * 16}.tmp", f"{left}.mine", ".controlkit-0f.tmp", ".tmp0yZJqZ", left[1:]]
    for name in others:
        (tmp_path / name).write_text("not ours, or of a version that locks nothing")
    (tmp_path / left).mkdir()
    (tmp_path / left / "weights").write_text("half")
    (tmp_path / left.replace("0f0f", "abcd")).write_text("half")
    _writes(tmp_path, how)
    assert set(os.listdir(tmp_path)) - {"new"} == set(others)


_KILLED = """
import os, signal, sys
from pathlib import Path
from controlkit import files
replace = os.replace
if sys.argv[2] == "between":
    moves = []
    os.replace = lambda *names: moves.append(replace(*names)) or os.kill(os.getpid(), signal.SIGKILL)
with files.replace_folder(sys.argv[1]) as folder:
    (folder / "a").write_text("new")
    if sys.argv[2] == "within":
        print("writing", flush=True)
        sys.stdin.read()
"""


@pytest.mark.usefixtures("at_once")
def test_what_somebody_is_writing_stays(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path / "out"), "within"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        files.write_text(tmp_path / "a.txt", "mine")
        files.write_text(tmp_path / "b.txt", "mine")
        (living,) = tmp_path.glob(".*")
        child.kill()
        child.wait()
        files.write_text(tmp_path / "c.txt", "mine")
    assert not living.exists()
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.usefixtures("at_once")
def test_a_kill_while_folders_change_places_loses_neither(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "out"), "between"], check=False)
    assert not (tmp_path / "out").exists()
    files.write_text(tmp_path / "b", "")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["b", "out"]


def test_a_folder_of_the_longest_name_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with files.replace_folder(tmp_path / ("n" * 255)) as folder:
            (folder / "a").write_text(text)
    assert [(path.name, (path / "a").read_text()) for path in tmp_path.iterdir()] == [("n" * 255, "new")]


def test_json_is_readable_and_refuses_not_a_number(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ü": [1, 2.5, None]}
    assert "ü" in text
    assert text.endswith("}\n")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("one", "two"):
        with files.replace_folder(target) as folder:
            assert folder.parent == tmp_path
            (folder / content).mkdir()
            (folder / content / "weights").write_text(content)
    assert [p.name for p in target.iterdir()] == ["two"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with files.replace_folder(target) as folder:
        (folder / "weights").write_text("old")

    def fail() -> None:
        with files.replace_folder(target) as folder:
            (folder / "weights").write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_inside_a_folder_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"cannot write .*model: the disk is full"),
        files.replace_folder(tmp_path / "model"),
    ):
        Path("/dev/full").write_text("x")
    assert os.listdir(tmp_path) == []


def test_a_file_in_a_folder_is_named_as_it_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_write_new", full)
    with (
        pytest.raises(ValueError, match=r"cannot write .*/model/config\.json: the disk is full"),
        files.replace_folder(tmp_path / "model") as folder,
    ):
        files.write_json(folder / "config.json", {})
    assert os.listdir(tmp_path) == []


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with (
        pytest.raises(ValueError, match="there is a file of that name"),
        files.replace_folder(tmp_path / "model"),
    ):
        raise AssertionError("not reached")
    with (
        pytest.raises(ValueError, match=r"the folder .* does not exist"),
        files.replace_folder(tmp_path / "no" / "model"),
    ):
        raise AssertionError("not reached")
    assert (tmp_path / "model").read_text() == "precious"


def test_a_user_without_a_home_is_told_where_a_cache_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CONTROLKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(ValueError, match="name one in CONTROLKIT_CACHE"):
        files.cache_folder()
    monkeypatch.setenv("CONTROLKIT_CACHE", "here")
    assert files.cache_folder() == Path("here")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_file(tmp_path / "a") == expected
