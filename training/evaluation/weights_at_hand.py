"""Weights of networks that judge pictures: in PyTorch's cache, or fetched into it once."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

_SECONDS = 5  # before an unreachable host counts as one


class NotAtHand(Exception):
    """Weights that cannot be had; the message says which and why, in a phrase."""


def cached_file(url: str, *, what: str) -> Path:
    """The file of an address in PyTorch's cache ($TORCH_HOME), downloaded where it is not there.

    Nothing is downloaded where HF_HUB_OFFLINE is set. Raises NotAtHand where it cannot be had.
    """
    import torch

    name = os.path.basename(urlsplit(url).path)
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise NotAtHand(
            f"{what} wants {name} in {without_home(str(path.parent))}, and HF_HUB_OFFLINE forbids fetching it"
        )
    try:
        _reach(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = Path(name).stem.rpartition("-")[2]
        torch.hub.download_url_to_file(url, str(path), hash_prefix=mark, progress=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise NotAtHand(
            f"{what} wants {name} in {without_home(str(path.parent))}: it could not be fetched ({reason})"
        ) from error
    return path


def _reach(url: str) -> None:
    """Find out within seconds whether a host answers."""
    from urllib.request import Request, urlopen

    with urlopen(Request(url, method="HEAD"), timeout=_SECONDS):
        pass


def without_home(text: str) -> str:
    """A text whose paths below the home begin with ~, for others read it, too."""
    home = os.path.expanduser("~")
    if home in ("/", "~"):  # in a container
        return text
    return text.replace(home + os.sep, f"~{os.sep}")
