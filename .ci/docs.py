"""The API reference, from docstrings: `uv run python .ci/docs.py FOLDER`. A warning is an error."""

import importlib
import pkgutil
import re
import sys
import warnings
from pathlib import Path

import pdoc

import controlkit

WITHOUT = ("__main__",)
# "name: what it is", at the start of a paragraph and behind each sentence in it.
_NAMED = re.compile(r"(?:^|(?<=[.;] ))(?=[a-z_]\w*(?:, [a-z_]\w*)*: )")
_ANCHOR = re.compile(r'\bid="([^"]+)"')
_LINK = re.compile(r'<a href="([^":#]*)#([^"]+)">(.*?)</a>', re.DOTALL)
_PARAGRAPHS = re.compile(r"\n\n|(?<=\.)\n(?=[A-Z])")


def listed(docstring: str) -> str:
    """The docstring with its paragraphs of "name: what it is" as lists."""
    return "\n\n".join(_as_list(paragraph) for paragraph in _PARAGRAPHS.split(docstring))


def _as_list(paragraph: str) -> str:
    flat = " ".join(paragraph.split())
    if not _NAMED.match(flat):
        return paragraph
    items = [item.strip(" ;").partition(": ") for item in _NAMED.split(flat) if item]
    return "\n".join(f"* **{names}**: {what}" for names, _, what in items)


def modules() -> list[str]:
    """Every module, and on every package the names that it would import only when asked for."""
    found = ["controlkit"]
    for module in pkgutil.walk_packages(controlkit.__path__, "controlkit."):
        if not module.name.endswith(WITHOUT):
            found.append(module.name)
    for name in found:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            setattr(module, public, getattr(module, public))
        if hasattr(module, "__path__") and hasattr(module, "__all__"):
            below = [other for other in found if other.rpartition(".")[0] == name]
            module.__all__ = [*module.__all__, *(other.rpartition(".")[2] for other in below)]
    return found


def unlink_what_is_not_told(folder: Path) -> None:
    """Leave the text alone of links to names that have no place in the pages: private or foreign ones."""
    pages = {page.resolve(): page.read_text(encoding="utf-8") for page in folder.rglob("*.html")}
    places = {page: set(_ANCHOR.findall(text)) for page, text in pages.items()}
    for page, text in pages.items():

        def kept(link: re.Match[str], page: Path = page) -> str:
            to = (page.parent / link[1]).resolve() if link[1] else page
            return link[0] if link[2] in places.get(to, ()) else link[3]

        page.write_text(_LINK.sub(kept, text), encoding="utf-8")


def main(folder: str) -> None:
    """Write the pages into a folder."""
    count = len(modules())
    pdoc.render.configure(docformat="google", show_source=True)
    google = pdoc.docstrings.google
    pdoc.docstrings.google = lambda docstring: google(listed(docstring))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Error parsing type annotation")  # imported for type checkers only
        pdoc.pdoc("controlkit", output_directory=Path(folder))
    unlink_what_is_not_told(Path(folder))
    sys.stdout.write(f"{count} modules in {folder}\n")


if __name__ == "__main__":
    main(sys.argv[1])
