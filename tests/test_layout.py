"""The shape of the project: what is packed, what may import what, what an import costs."""

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

from controlkit.images import load_picture

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "controlkit": ROOT / "controlkit",
    "controlkit.preprocessors": ROOT / "preprocessors",
    "controlkit.training": ROOT / "training",
}
# The application modules may use everything; the rest of the core knows neither of the other two packages.
APPLICATION = {
    f"controlkit.{name}"
    for name in (
        "__main__",
        "cli",
        "cli_files",
        "cli_generate",
        "cli_training",
        "convert_job",
        "models_job",
        "transfer_job",
        "data_job",
        "demo",
        "draw_job",
        "folder_job",
        "map_folder",
        "map_pipeline",
        "generate_controls",
        "generate_job",
        "generate_notes",
        "generate_folder",
        "generate_plan",
        "generate_preview",
        "grid_job",
        "info_job",
        "lint_job",
        "preprocess_job",
    )
}
STUDIO = "controlkit.studio"  # the page is part of the application, module by module
PREPROCESSORS_MAY_USE = {
    "controlkit.devices",
    "controlkit.files",
    "controlkit.folders",
    "controlkit.hub",
    "controlkit.images",
    "controlkit.limits",
    "controlkit.naming",
}


def run_python(code: str, *, cwd: Path, python: str = sys.executable) -> str:
    """Run `code` in a fresh interpreter started in `cwd`; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the project under the name it is imported by, once (the links are not followed)."""
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


def imports(name: str, path: Path) -> set[str]:
    """The absolute names that a module imports, also inside functions, as `a.b.c` for `from a.b import c`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_every_package_on_disk_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {name for name, path in modules() if path.name == "__init__.py"}
    assert sorted(listed) == sorted(on_disk)
    without = {path.parent for _, path in modules() if not (path.parent / "__init__.py").exists()}
    assert not without, "folders with modules and no __init__.py"


@pytest.mark.parametrize("folder", ["preprocessors", "training"])
def test_the_link_names_the_folder(folder: str) -> None:
    link = ROOT / "controlkit" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"


def test_dependencies_point_one_way() -> None:
    outer = {"controlkit.preprocessors", "controlkit.training"} | APPLICATION
    wrong = []
    for name, path in modules():
        for used in sorted(imports(name, path)):
            if within(name, {"controlkit.preprocessors"}):
                allowed = not within(used, {"controlkit"}) or within(
                    used, PREPROCESSORS_MAY_USE | {"controlkit.preprocessors"}
                )
            elif within(name, {"controlkit.training"}):
                allowed = not within(used, APPLICATION | {STUDIO}) or name == "controlkit.training.__main__"
            else:
                application = name in APPLICATION or within(name, {STUDIO})
                allowed = application or not within(used, outer | {STUDIO})
            if not allowed:
                wrong.append(f"{name} imports {used}")
    assert not wrong


def test_the_short_names_are_used_nowhere() -> None:
    short = {"preprocessors", "training"}
    wrong = [
        f"{name}: {used}" for name, path in modules() for used in imports(name, path) if within(used, short)
    ]
    assert not wrong


def test_no_module_shadows_the_library_datasets() -> None:
    assert not list((ROOT / "training").rglob("datasets.py"))


def test_both_folders_refuse_their_short_name() -> None:
    code = """
import importlib
for name in ("preprocessors", "training"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""
    lines = run_python(code, cwd=ROOT).splitlines()
    assert len(lines) == 2
    assert "controlkit.preprocessors" in lines[0]
    assert "controlkit.training" in lines[1]


def test_importing_controlkit_loads_nothing_heavy(tmp_path: Path) -> None:
    code = """
import json, sys
import controlkit, controlkit.cli, controlkit.images, controlkit.preprocessors
assert "load_base" in dir(controlkit)
print(json.dumps(sorted({"torch", "diffusers", "transformers", "accelerate", "scipy"} & set(sys.modules))))
"""
    assert json.loads(run_python(code, cwd=tmp_path)) == []


def test_one_distribution_provides_cv2() -> None:
    assert set(packages_distributions()["cv2"]) == {"opencv-python-headless"}


def build(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel from `source` with the setuptools that is installed, without a network."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir()
    run_python(code, cwd=source)
    (file,) = out.iterdir()
    return file


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names}


class Built(NamedTuple):
    """What was built from a clean copy of the checkout."""

    sdist: Path
    wheel: Path
    wheel_from_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    temp = tmp_path_factory.mktemp("build")
    copy = temp / "checkout"
    clutter = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("controlkit", "preprocessors", "training", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=clutter)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    sdist = build("sdist", copy, temp / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(temp / "unpacked", filter="data")
    (unpacked,) = (temp / "unpacked").iterdir()
    return Built(
        sdist, build("wheel", copy, temp / "wheel"), build("wheel", unpacked, temp / "wheel-from-sdist")
    )


@pytest.mark.slow
def test_the_sdist_holds_the_linked_folders_once(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "preprocessors/__init__.py",
        "training/__init__.py",
        "tests/conftest.py",
        "CHANGELOG.md",
    } <= inside
    assert not [
        name for name in inside if name.startswith(("controlkit/preprocessors", "controlkit/training"))
    ]


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(built: Built) -> None:
    packed = {name for name in contents(built.wheel) if ".dist-info/" not in name}
    data = {
        *(path for path in (ROOT / "controlkit" / "tiny").rglob("*") if path.is_file()),
        *(path for path in (ROOT / "training" / "recipes").iterdir() if path.is_file()),
        *(path for path in (ROOT / "controlkit" / "studio").iterdir() if path.suffix in (".css", ".js")),
        ROOT / "controlkit" / "py.typed",
    }
    expected = {path for _, path in modules()} | data
    names = set()
    for path in expected:
        relative = path.relative_to(ROOT).as_posix()
        names.add(relative if relative.startswith("controlkit/") else f"controlkit/{relative}")
    assert packed == names


def test_the_wheel_from_the_sdist_is_the_same(built: Built) -> None:
    assert contents(built.wheel) == contents(built.wheel_from_sdist)


@pytest.mark.slow
def test_the_demonstration_runs_from_the_wheel_in_another_folder(built: Built, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    with zipfile.ZipFile(built.wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    # The libraries come from the present environment; its own editable controlkit does not: a folder that a
    # .pth file adds is searched, but the .pth files in it are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    code = """
import sys
from importlib.metadata import entry_points
import controlkit, controlkit.metrics, controlkit.preprocessors, controlkit.training
for module in (controlkit, controlkit.metrics, controlkit.preprocessors, controlkit.training):
    print(module.__file__)
(command,) = (entry for entry in entry_points(group="console_scripts", name="controlkit"))
sys.argv = ["controlkit", "demo", "-o", "sheet.png"]
try:
    command.load()()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lines = run_python(code, cwd=elsewhere, python=str(_python_of(home))).splitlines()
    assert all(Path(line).is_relative_to(site / "controlkit") for line in lines[:4]), lines[:4]
    assert any(line.startswith("openpose + depth") for line in lines[4:]), lines[4:]
    assert load_picture(elsewhere / "sheet.png").ndim == 3


def _python_of(home: Path) -> Path:
    scripts = sysconfig.get_path("scripts", "venv", {"base": str(home), "platbase": str(home)})
    return Path(scripts) / ("python.exe" if os.name == "nt" else "python")


@pytest.fixture
def docs():
    pytest.importorskip("pdoc")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("docs", ROOT / ".ci" / "docs.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_lists_what_docstrings_name(docs):
    told = "Two: this.\n\nlow, high: numbers, of a\n    range. kind: a name; by: whom.\nRaises ValueError."
    wanted = "* **low, high**: numbers, of a range.\n* **kind**: a name\n* **by**: whom."
    assert docs.listed(told) == f"Two: this.\n\n{wanted}\n\nRaises ValueError."


def test_the_reference_links_to_no_name_that_it_does_not_tell(docs, tmp_path):
    links = '<a href="#Task">Task</a> <a href="#_Task"><b>_Task</b></a> <a class="x" href="#_y">y</a>'
    away = '<a href="../b.html#B">B</a> <a href="../b.html#_B">_B</a> <a href="https://x.org/#q">q</a>'
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.html").write_text(f'<p id="Task">{links} {away}</p>')
    (tmp_path / "b.html").write_text('<p id="B"></p>')
    docs.unlink_what_is_not_told(tmp_path)
    told = (tmp_path / "a" / "a.html").read_text()
    left = '<a href="#Task">Task</a> <b>_Task</b> <a class="x" href="#_y">y</a>'
    away = away.replace('<a href="../b.html#_B">_B</a>', "_B")
    assert told == f'<p id="Task">{left} {away}</p>'
