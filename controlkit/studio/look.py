"""How the page looks: one accent colour, system fonts, nothing from another host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def css() -> str:
    """The page's own rules."""
    return (Path(__file__).parent / "studio.css").read_text(encoding="utf-8")


def theme() -> Any:
    """The theme: gradio's plainest, in system fonts."""
    fonts = {
        name: [gr.themes.Font(font) for font in stack]
        for name, stack in (("font", SANS), ("font_mono", MONO))
    }
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        **fonts,
    )
