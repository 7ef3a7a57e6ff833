"""The notebooks as they are kept: executed, whole, and readable without executing them."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from notebook_runs import FOLDER, names

LARGEST = 2_000_000  # bytes
_PLACES = re.compile(r"/(work|root|home|tmp|Users)/")


@pytest.fixture(params=names())
def notebook(request):
    import nbformat  # takes seconds

    return nbformat.read(FOLDER / f"{request.param}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_of(notebook) for output in cell.outputs]


def test_the_extra_brings_what_it_imports(notebook):
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["notebooks"],
        "controlkit",
        "ipython",
    ]
    brought = {re.split(r"[^\w.-]", line)[0].lower() for line in wanted}  # ipykernel brings ipython
    trees = [ast.walk(ast.parse(cell.source)) for cell in code_of(notebook)]
    nodes = [node for tree in trees for node in tree]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
        assert brought & {found.lower() for found in packages_distributions().get(name, [name])}, name


def test_there_are_six():
    assert [name[:2] for name in names()] == ["01", "02", "03", "04", "05", "06"]


def test_it_was_executed_from_top_to_bottom(notebook):
    import nbformat

    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code_of(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_nothing_went_wrong(notebook):
    kinds = {output.output_type for output in outputs_of(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs_of(notebook) if output.output_type == "stream"} <= {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(notebook)) >= 3


def test_it_is_small_and_speaks_of_no_machine(notebook):
    import nbformat

    text = nbformat.writes(notebook)
    assert len(text) < LARGEST
    told = [cell.source for cell in notebook.cells]
    told += [
        output.get("text", "") + str(output.get("data", {}).get("text/plain", ""))
        for output in outputs_of(notebook)
    ]
    assert not [line for part in told for line in part.splitlines() if _PLACES.search(line)]


def test_the_first_code_cell_switches_to_real_models(notebook):
    first = code_of(notebook)[0]
    assert first.metadata.get("tags") == ["parameters"]
    assert "BASE" in first.source
    assert "sd15" in first.source
    assert "cuda" in first.source


def test_it_is_written_for_a_person(notebook):
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert texts[0].startswith("# ")
    assert sum("Try it yourself" in text for text in texts) >= 2
    assert sum("$$" in text for text in texts) >= (1 if "05" not in texts[0] else 0)
    assert max(len(cell.source.splitlines()) for cell in code_of(notebook)) <= 30
    assert "results = {" in code_of(notebook)[-1].source


def test_no_label_of_a_bundled_adapter_is_written_out():
    """With another base adapters are called otherwise, in reports and in their files' names."""
    import nbformat

    kept = nbformat.read(FOLDER / "06_compare_and_choose.ipynb", as_version=4)
    written = re.compile(r"""== "canny"|plan\("canny"|"canny \(|f"canny |(best|worst)-openpose""")
    assert not [cell.source for cell in code_of(kept)[1:] if written.search(cell.source)]
