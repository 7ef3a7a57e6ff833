"""Makes .github/studio.png, the studio page in a browser: `uv run python tests/studio_screenshot.py`.

The pictures are those of fixed seeds, so that the same page is seen wherever it is made.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from controlkit.files import write_bytes
from controlkit.studio import server

TARGET = Path(__file__).parent.parent / ".github" / "studio.png"
WIDTH, HEIGHT, SCALE = 1360, 1000, 2
MOST_BYTES = 400_000
SEED = "11"


class Quiet:
    """A report that nobody reads."""

    def status(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""


def shoot(address: str, *, scene: int, kind: str, seed: str, scheme: str = "light") -> bytes:
    """The first tab once four pictures are made, as PNG."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme=scheme
        )
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator(".picture.map img").first.wait_for()
        page.get_by_role("button", name=f"Scene {scene}", exact=True).click()
        page.wait_for_timeout(2000)
        if kind != "canny":
            page.locator(f"input[value={kind}]").first.check(force=True)
            page.wait_for_timeout(2000)
        page.locator("#more button").first.click()
        page.get_by_label("Seed").fill(seed)
        page.locator("#more button").first.click()
        page.locator("#generate").click()
        page.get_by_text("4 pictures made").wait_for()
        page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
        page.mouse.move(5, 5)
        page.wait_for_timeout(2500)
        picture = page.screenshot()
        browser.close()
    return picture


def reduced(picture: bytes) -> bytes:
    """The same picture with a palette of its own, in fewer bytes."""
    import io

    from PIL import Image

    out = io.BytesIO()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(out, "PNG", optimize=True)
    return out.getvalue()


def main() -> None:
    """Serve the page, look at it, write what is seen."""
    with (
        tempfile.TemporaryDirectory() as folder,
        server.opened("tiny", port=None, runs=folder, report=Quiet()) as address,
    ):
        picture = reduced(shoot(address, scene=2, kind="canny", seed=SEED))
    if len(picture) > MOST_BYTES:
        sys.exit(f"the picture has {len(picture)} bytes, more than {MOST_BYTES}")
    write_bytes(TARGET, picture)


if __name__ == "__main__":
    main()
