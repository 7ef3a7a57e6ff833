"""Executing the notebooks: `uv run python tests/notebook_runs.py [NAME ...]` writes fresh outputs into them.

What a reader sees is what was executed: top to bottom, offline, with the bundled models.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SECONDS = 600  # for a cell
LARGE = 120_000  # bytes of a picture
_KEPT = {"parameters"}  # of a cell's tags
_CHATTER = ("Failed to load CPU gemm_4bit_forward from kernels-community",)  # bitsandbytes's, where it is


def names() -> list[str]:
    """The notebooks, in the order in which they are read."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def execute(
    path: Path, *, folder: Path, changes: Mapping[str, str] = MappingProxyType({})
) -> tuple[NotebookNode, dict[str, Any]]:
    """Execute a notebook in a folder; return it with its outputs, and what its variable `results` held.

    changes: what a reader writes into the first code cell, in the place of a text that is there once.
    """
    import nbformat  # takes seconds
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for before, after in changes.items():
        assert first.source.count(before) == 1, before
        first.source = first.source.replace(before, after)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    os.environ.update(HF_HUB_OFFLINE="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads round differently
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of progress bars, none of which is shown
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        asked = nbformat.v4.new_code_cell("import json; print(json.dumps(results))")
        notebook.cells.append(asked)  # the client puts a cell that it executed back at its index
        client.execute_cell(asked, len(notebook.cells) - 1, store_history=False)
        notebook.cells.pop()
    return _tidied(notebook), json.loads(asked.outputs[0]["text"])


def _tidied(notebook: NotebookNode) -> NotebookNode:
    """The same without what differs from one execution to the next."""
    from nbformat import NotebookNode

    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        tags = [tag for tag in cell.metadata.get("tags", []) if tag in _KEPT]
        cell["metadata"] = NotebookNode({"tags": tags} if tags else {})
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not _is_chatter(output)]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _smaller(output["data"]["image/png"])
    language = {"name": "python"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] = NotebookNode({"kernelspec": kernel, "language_info": language})
    return notebook


def _is_chatter(output: NotebookNode) -> bool:
    """Whether an output is nothing but what a library says of itself on stderr; a warning is not."""
    if output.get("name") != "stderr":
        return False
    lines = [line for line in output["text"].splitlines() if line.strip()]
    return all(line.startswith(_CHATTER) for line in lines)


def _smaller(png: str) -> str:
    """A large picture in 256 colours, a third of its bytes; a small one as it is."""
    data = base64.b64decode(png)
    if len(data) < LARGE:
        return png
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook as it is kept."""
    import nbformat

    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")


def main(wanted: list[str]) -> None:
    """Execute notebooks and put them back with their outputs."""
    for name in wanted or names():
        path = FOLDER / f"{name}.ipynb"
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook, results = execute(path, folder=Path(folder))
        write(notebook, path)
        print(f"{name}: {time.monotonic() - started:.0f} s, {results}")


if __name__ == "__main__":
    main(sys.argv[1:])
