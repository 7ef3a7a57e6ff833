"""The README's commands, links and code are true."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import Run

from controlkit.figures import render
from controlkit.images import load_picture, write_png
from controlkit.preprocessors import get

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = TEXT[: TEXT.index("\n## ")]


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def controlkit_commands() -> list[list[str]]:
    """Every `controlkit ...` that the README tells people to type, as arguments."""
    script = "".join(blocks(TEXT, "bash")).replace("\\\n", " ")
    lines = [part for line in script.splitlines() for part in line.split("&&")]
    commands = [shlex.split(line, comments=True) for line in lines]
    return [words[words.index("controlkit") + 1 :] for words in commands if "controlkit" in words]


def anchor(heading: str) -> str:
    """The anchor that a heading gets on the web."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_first_screen_has_the_two_commands_and_no_other() -> None:
    assert blocks(FIRST_SCREEN, "bash") == [
        "pip install uv && uv run controlkit demo\n",
        "uv run pytest\n",
    ]


def test_the_first_screen_shows_a_picture() -> None:
    assert "![" in FIRST_SCREEN


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_links_and_pictures_exist(target: str) -> None:
    if target.startswith("#"):
        assert target[1:] in {
            anchor(heading) for heading in re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
        }
    elif not target.startswith("https://"):
        assert (ROOT / target).exists()


@pytest.mark.parametrize("path", re.findall(r"^\| `([\w./]+)` \|", TEXT, flags=re.MULTILINE))
def test_the_modules_of_the_table_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_table_of_modules_has_every_one_of_the_core() -> None:
    told = {
        name
        for row in re.findall(r"^\| (`.+) \|", TEXT, flags=re.MULTILINE)
        for name in re.findall(r"\w+\.py", row)
    }
    assert {path.name for path in (ROOT / "controlkit").glob("[!_]*.py")} <= told


def test_what_is_said_to_stand_above_or_below_does() -> None:
    for link in re.finditer(r"\[(above|below)\]\(#([^)]+)\)", TEXT):
        headings = re.finditer(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
        (place,) = [heading.start() for heading in headings if anchor(heading[1]) == link[2]]
        assert (place > link.start()) == (link[1] == "below"), link[0]


def test_the_schedulers_and_options_that_replace_others_exist() -> None:
    from typer.main import get_command

    from controlkit.cli import app
    from controlkit.schedulers import SCHEDULERS

    section = TEXT[TEXT.index("\n## Which command replaces mine?") : TEXT.index("\n## I want more control")]
    theirs = {
        option
        for row in section.splitlines()
        for option in re.findall(r"--[a-z][\w-]*", row.partition(" | ")[2])
    }
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    assert theirs <= {name for command in commands for option in command.params for name in option.opts}
    (row,) = [row for row in section.splitlines() if "Euler a" in row]
    assert {name.removeprefix("--scheduler ") for name in re.findall(r"`([^`]+)`", row)} <= {*SCHEDULERS}


@pytest.mark.parametrize("arguments", controlkit_commands(), ids=" ".join)
def test_the_commands_are_understood(arguments: list[str]) -> None:
    import typer.core
    import typer.main

    from controlkit.cli import app

    # Raises on a command or an option that does not exist, or an argument too many or too few; runs nothing.
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    with group.make_context("controlkit", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        assert command is not None
        if isinstance(command, typer.core.TyperGroup):  # a command of commands, such as `data check`
            name, command, rest = command.resolve_command(context, rest)
            assert command is not None
        if rest == ["--list"]:  # answers while it is parsed
            with pytest.raises(typer.Exit):
                command.make_context(name, rest, parent=context)
            return
        with command.make_context(name, rest, parent=context) as parsed:
            assert parsed.params


def test_the_table_of_flags_is_the_programs() -> None:
    from controlkit.training.flags_table import flag_table

    assert flag_table().strip() in TEXT


def test_the_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few_lines, maps, in_diffusers = blocks(TEXT, "python")
    exec(compile(maps, "README.md", "exec"), {})
    assert "(1, 18, 3) (512, 512, 3) []" in capsys.readouterr().out
    told_in_few: dict[str, Any] = {}
    exec(compile(few_lines, "README.md", "exec"), told_in_few)
    assert all(picture.std() > 10 for picture in told_in_few["pictures"])  # not one flat colour
    _as_after_training(tmp_path)
    told: dict[str, Any] = {}
    exec(compile(in_diffusers, "README.md", "exec"), told)
    assert np.asarray(told["picture"]).std() > 10


def _as_after_training(folder: Path) -> None:
    """The files that the example of diffusers takes: a trained adapter, the bundled base, a map."""
    (folder / "runs" / "canny").mkdir(parents=True)
    (folder / "runs" / "canny" / "controlnet").symlink_to(ROOT / "controlkit" / "tiny" / "controlnet-canny")
    (folder / "controlkit").symlink_to(ROOT / "controlkit")
    scene = render(7)
    write_png(folder / "edges.png", get("canny")(scene.picture).image)


def commands_of(heading: str) -> list[list[str]]:
    """The first block of commands under a heading."""
    section = TEXT[TEXT.index(f"\n## {heading}\n") :]
    lines = blocks(section, "bash")[0].replace("\\\n", " ").splitlines()
    return [words[words.index("controlkit") + 1 :] for words in map(shlex.split, lines)]


def test_who_has_a_photo_gets_along(run: Run, tmp_path: Path) -> None:
    write_png(tmp_path / "demo-scene.png", render(0, split="demo", size=128).picture)
    commands = commands_of("I have a photo")
    assert len(commands) == 5
    for arguments in commands:
        run(*arguments).done()
    pictures = [load_picture(tmp_path / f"{name}.png") for name in ("figure-1", "figure-2", "both", "other")]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.slow
def test_who_has_a_folder_gets_along(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    write_png(tmp_path / "demo-scene.png", render(0, split="demo", size=128).picture)
    (tmp_path / "photos").mkdir()
    for number in range(300):
        scene = render(number, size=128)
        write_png(tmp_path / "photos" / f"{number:04d}.png", scene.picture)
        (tmp_path / "photos" / f"{number:04d}.txt").write_text(scene.caption)
    commands = commands_of("I have a folder")
    assert len(commands) == 5
    for arguments in commands:
        run(*arguments).done()
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    (canny,) = [group for group in report["results"] if group["kind"] == "canny"]
    arms = canny["measures"]["edge F1"]["arms"]
    assert arms["photos"]["value"] > arms["no control"]["value"] + 0.2
    assert (tmp_path / "mine.png").is_file()
