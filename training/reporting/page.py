"""How report.html looks, on light paper, on dark and printed, and its tables and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from controlkit.training.reporting.charts import number
from controlkit.training.reporting.run_record import is_number

_LARGEST_PICTURE = 8_000_000  # bytes of a grid that goes in as it is

LIGHT = (
    "--paper:#fff;--ink:#1d2430;--faint:#5c6675;--grid:#e4e8ee;--panel:#f5f7fa;--good:#0b7a4b;--bad:#b3261e;"
    "--c0:#2563ad;--c1:#0b7a4b;--c2:#8a6100;--c3:#b3261e;--c4:#6b4fa8;--c5:#0f7285"
)
DARK = (
    "--paper:#14181f;--ink:#e6eaf0;--faint:#9aa6b6;--grid:#2b323d;--panel:#1c222b;--good:#4fce92;--bad:#ff8a80;"
    "--c0:#7db3f2;--c1:#4fce92;--c2:#e2b44c;--c3:#ff8a80;--c4:#bda4f5;--c5:#5cc8dc"
)

STYLE = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
@media print{{:root{{color-scheme:light;{LIGHT}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,sans-serif}}
main{{max-width:1080px;margin:0 auto;padding:40px 24px 80px}}
h1{{font-size:32px;line-height:1.2;margin:0;letter-spacing:-.01em}}
h2{{font-size:20px;margin:48px 0 12px;padding-top:16px;border-top:1px solid var(--grid)}}
h3{{font-size:15px;margin:24px 0 6px}}
header p,section>p,figcaption{{color:var(--faint)}}
header p{{margin:6px 0 0}}
section>p{{margin:0 0 12px}}
.status{{margin-top:24px;background:var(--panel);border-radius:12px;padding:20px 24px}}
.status p{{max-width:46em;margin:8px 0 0}}
.verdict{{font-size:20px;font-weight:600;margin:0!important;color:var(--ink)!important}}
.verdict.good{{color:var(--good)!important}}
.verdict.bad{{color:var(--bad)!important}}
.tiles{{display:flex;flex-wrap:wrap;gap:12px 40px;margin:16px 0 0}}
.tiles:empty{{display:none}}
.tiles dt{{font-size:13px;color:var(--faint)}}
.tiles dd{{margin:0;font-size:22px;font-variant-numeric:tabular-nums}}
.tiles small{{font-size:14px;color:var(--faint)}}
figure{{margin:0}}
figure img{{max-width:100%;height:auto;display:block;border-radius:6px;background:#fff}}
.latest img{{width:min(100%,760px)}}
figcaption{{font-size:13px;line-height:1.4;margin:4px 0 8px}}
figcaption b{{color:var(--ink);font-size:14px}}
.curves{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:28px 32px}}
.curves figure{{min-width:0}}
.small{{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:16px}}
table{{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{text-align:left;vertical-align:top;padding:4px 24px 4px 0;border-bottom:1px solid var(--grid)}}
th{{font-weight:600}}
tbody th{{font-weight:400;color:var(--faint)}}
.numbers td,.numbers thead th{{text-align:right}}
.mono td{{font:12.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}}
pre{{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--panel);
border-radius:8px;padding:16px;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}}
@media print{{main{{max-width:none;padding:0}}body{{font-size:11pt}}
.latest img{{width:auto;max-height:15cm}}figure,tr,.status{{break-inside:avoid}}
h2,h3{{break-after:avoid}}.curves{{grid-template-columns:1fr 1fr}}}}
"""


def pairs_table(values: Mapping[str, Any], *, mono: bool = False) -> str:
    """A table of names and values, escaped; "" where there are none."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>'
        for key, value in values.items()
    )
    kind = ' class="mono"' if mono else ""
    return f"<table{kind}><tbody>{rows}</tbody></table>" if rows else ""


def _plain(value: Any) -> str:
    if is_number(value) and not isinstance(value, int):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def picture(path: Path, *, alt: str, width: int = 0) -> str:
    """A picture as part of the page, narrowed to `width`; "" where the file is broken."""
    try:
        data = path.read_bytes()
        if width or len(data) > _LARGEST_PICTURE:
            data = _narrowed(data, width or 2400)
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            size = opened.size
    except (OSError, SyntaxError, ValueError):  # Pillow raises each of them for damaged files
        return ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}" width="{size[0]}" height="{size[1]}">'


def _narrowed(data: bytes, width: int) -> bytes:
    with Image.open(io.BytesIO(data)) as picture:
        height = max(1, round(picture.height * min(1.0, width / picture.width)))
        small = picture.convert("RGB").resize((min(width, picture.width), height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return buffer.getvalue()


def duration(seconds: float) -> str:
    """Seconds for people: "2 h 05 min", "41 min 16 s", "9 s"."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
