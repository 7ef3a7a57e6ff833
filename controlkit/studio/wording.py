"""How the page calls things, where the command line has options and files."""

from __future__ import annotations

import re

TITLES = {
    "canny": "Edges",
    "openpose": "Pose",
    "depth": "Depth",
    "normal": "Normals",
    "lineart": "Line art",
    "lineart_anime": "Anime lines",
    "mlsd": "Straight lines",
    "scribble": "Scribble",
    "shuffle": "Colours",
    "softedge": "Soft edges",
}
MODE_NAMES = {
    "balanced": "balanced: both alike",
    "prompt": "prompt: it is more important (A1111)",
    "control": "control: the map is more important (A1111)",
    "guess": "guess: the map without a prompt (the original)",
    "guess-diffusers": "guess: the map without a prompt (diffusers)",
    "more-prompt": "more-prompt (InvokeAI)",
    "more-control": "more-control (InvokeAI)",
    "unbalanced": "unbalanced (InvokeAI)",
    "paper": "paper: CFG resolution weighting",
}
SYNTAX_NAMES = {"plain": "letters, as in diffusers", "a1111": "weights, as in A1111: (red:1.3)"}
SCHEDULER_INFO = "How the noise is taken away; lcm and tcd are for bases that are distilled to few steps"
_OPTIONS = {
    "add --prompt-syntax a1111": "choose them under More maps and settings, Parentheses",
    "--negative": "the negative prompt",
    "--guidance": "Guidance",
    "--device": "the device",
    "--base": "the base",
    "--data": "the folder",
}
_OPTION = re.compile("|".join(re.escape(option) + r"(?![\w-])" for option in _OPTIONS))
_WINDOW = re.compile(r"\bstart=(\S+) to end=(\S+)")
_KIND = re.compile(r"\bthe (\w+) control\b")

_SETTING = re.compile(r"(?<!\S)\(?(?!out=)[a-z]+(?:[._][a-z]+)*=")  # but the folder, which has a field
NO_FIELD = (
    "Words with a = are settings of the recipe. This page has no fields for them, the command line takes"
    " them: controlkit train RECIPE data.source=FOLDER NAME=VALUE"
)


def about_settings(text: str) -> str:
    """Where the settings can be given that an error of a training speaks of; "" where it speaks of none."""
    return NO_FIELD if _SETTING.search(text) else ""


def title(kind: str) -> str:
    """A kind of map, as its choice is called."""
    return TITLES.get(kind, kind)


def line_of(error: ValueError) -> str:
    """What was wrong, as a sentence of the page."""
    return sentence(" ".join(str(error).split()))


def sentence(text: str) -> str:
    """A line that the command line would tell, in the page's words; a file keeps its name."""
    text = _OPTION.sub(lambda found: _OPTIONS[found[0]], text)
    text = _WINDOW.sub(r"from \1 until \2", text)
    text = _KIND.sub(
        lambda found: f"the control by {title(found[1])}" if found[1] in TITLES else found[0], text
    )
    first = text.split(maxsplit=1)[0] if text else ""
    named = any(sign in first for sign in "./\\_0123456789")
    return text if named else text[:1].upper() + text[1:]
