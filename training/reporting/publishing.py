"""Putting a finished adapter on the hub: after the local save, and never able to lose it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from controlkit.hub import first_sentence

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner/name."""
    return bool(_REPO_ID.fullmatch(name)) and ".." not in name and "--" not in name


def check_repo_id(repo_id: str) -> None:
    """Refuse a repository's name before the training, not after it. Raises ValueError, one line."""
    if not is_repo_id(repo_id) or repo_id in (
        "true",
        "false",
    ):  # as the switch that it is in diffusers' script
        raise ValueError(
            f"push_to_hub {repo_id!r} is not the name of a repository: give owner/name, of letters, digits,"
            " dots, dashes and underscores"
        )


def push_to_hub(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a finished adapter's folder, README.md and all, and return its address on the hub.

    The repository is made where there is none. The folder is only read. Raises ValueError, one line that says
    where the adapter is and how to upload it later, without a token, without a network, in offline mode, and
    for whatever the hub refuses; the caller reports it and exits non-zero.
    """
    check_repo_id(repo_id)
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if constants.is_offline_mode():
        raise _kept(folder, repo_id, "the hub is switched off (HF_HUB_OFFLINE)")
    if not get_token():
        raise _kept(folder, repo_id, "you are not logged in (hf auth login, or HF_TOKEN)")
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Upload adapter")
    except OfflineModeIsEnabled as error:
        raise _kept(folder, repo_id, "the hub is switched off (HF_HUB_OFFLINE)") from error
    except LocalTokenNotFoundError as error:
        raise _kept(folder, repo_id, "you are not logged in (hf auth login, or HF_TOKEN)") from error
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # a refused card, a failed transfer
        raise _kept(folder, repo_id, first_sentence(error)) from error
    return f"{constants.ENDPOINT}/{repo_id}"


def _kept(folder: Path, repo_id: str, reason: str) -> ValueError:
    return ValueError(
        f"the adapter is complete in {folder} but not on the hub: {reason.rstrip('.')};"
        f" to upload it later: hf upload {repo_id} {shlex.quote(str(folder))}"
    )
