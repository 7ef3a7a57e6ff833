"""Where a model's folder is: bundled, given as a path, in the Hugging Face cache, or on the hub.

A name is a bundled model, a folder, or a hub id (``owner/name``). Of a repository only the files that are
needed are downloaded, and of each part only one kind of weights.
"""

import os
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TypeVar

from controlkit.naming import did_you_mean

Answer = TypeVar("Answer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONNECT_SECONDS = 3.0  # for the hub to answer; with name resolution never more than _GIVE_UP_SECONDS
_GIVE_UP_SECONDS = 4.0
_WEIGHTS = (".safetensors", ".bin")
LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers' training scripts call it
PEFT_CONFIG = "adapter_config.json"  # of a LoRA that peft wrote, beside its weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def find_folder(
    name_or_path: str,
    *,
    what: str,
    top_file: str | Sequence[str],
    complete: Callable[[Path], bool],
    files: Sequence[str],
    bundled: Mapping[str, Path],
    aliases: Mapping[str, str] | None = None,
    revision: str | None = None,
) -> Path:
    """The local folder of a model: bundled, given as a path, in the hub's cache, or downloaded into it.

    ``what`` names the kind of model in messages ("base"). ``top_file`` is a file at the top of its folder,
    or several, of which one is there.
    ``complete`` says whether a cached copy has all that is needed; the rest of an incomplete one is
    downloaded. ``files`` are the patterns to download. ``aliases`` maps short names to hub ids.
    ``revision``: a commit, or None for the newest, whose cached copy serves for all.

    Raises ValueError, one line within about 5 seconds, when there is no such model: it names the id, the
    cache's path and why the hub could not help.
    """
    place = _place(name_or_path, what=what, bundled=bundled, aliases=aliases or {})
    if isinstance(place, Path):
        return place
    partial = False
    for commit in dict.fromkeys((revision, None)):
        cached = _cached_folder(place, top_file, commit)
        if cached is not None and complete(cached):
            return cached
        partial = partial or cached is not None
    return _download(place, files, what=what, partial=partial, bundled=bundled, revision=revision)


def check_exists(
    name_or_path: str,
    *,
    what: str,
    top_file: str | Sequence[str],
    bundled: Mapping[str, Path],
    aliases: Mapping[str, str] | None = None,
    revision: str | None = None,
) -> None:
    """Raise the error of `find_folder` for a name that leads nowhere, and download nothing."""
    place = _place(name_or_path, what=what, bundled=bundled, aliases=aliases or {})
    if isinstance(place, Path):
        return
    if all(_cached_folder(place, top_file, commit) is None for commit in (revision, None)):
        answer = _ask_briefly(place, revision)
        if isinstance(answer, str):
            raise _no_model(place, answer, what=what, partial=False, bundled=bundled)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None


def find_file(source: str, name: str, *, hint: str = "give model=FOLDER") -> Path:
    """The path of one file: in a folder, or of a hub repository (``owner/name``), downloaded where needed.

    ``hint``: what to do with a folder into which it was downloaded elsewhere, for messages.

    Raises ValueError, one line within about 5 seconds, when it is not to be had: it names the file, the
    repository, the folder where it could be put, and why the hub could not help.
    """
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{name} is missing in {source}")
        return Path(folder, name)
    if not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"there is no folder {source!r}; give one that holds {name}, or a hub id (owner/name)"
        )
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    if isinstance(cached, str):
        return Path(cached)
    answer = _ask_briefly(source)
    if not isinstance(answer, str):
        try:
            return Path(hf_hub_download(source, name))
        except _network_errors() as error:
            answer = f"the download failed: {first_sentence(error)}"
    raise ValueError(
        f"{name} of {source} is needed: it is not in the cache {constants.HF_HUB_CACHE} and {answer}; "
        f"download it elsewhere into a folder and {hint}"
    )


def find_weight_file(source: str, *, what: str, usual: str) -> Path:
    """One .safetensors file: named itself, alone in a folder, or of a hub repository.

    ``source``: the file, the folder, ``owner/name`` or ``owner/name/file.safetensors``. ``usual``: the file's
    name where none is given. ``what`` names the kind in messages ("LoRA").

    Raises ValueError, one line within about 5 seconds, when there is none, for a pickle, and for a folder
    that holds several of other names.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _only_weights(Path(path), what=what, usual=usual)
    check_weight_file(source, what=what)
    if os.path.isfile(path):
        return Path(path)
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    return find_file(f"{owner}/{name}", file or usual, hint="name that file")


def check_weight_file(source: str, *, what: str) -> None:
    """Raise the error of `find_weight_file` for what is no file, folder or hub id, and for a pickle."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return
    is_id = re.fullmatch(rf"{_HUB_ID.pattern}(/[\w./-]+\.safetensors)?", source)
    if not os.path.isfile(path) and (not is_id or source.endswith(PICKLES)):
        raise ValueError(
            f"there is no {what} {source}: give a .safetensors file, a folder that holds one, or a hub id"
            " (owner/name or owner/name/file.safetensors)"
        )
    if os.path.isfile(path) and not path.endswith(".safetensors"):
        pickle = path.endswith(PICKLES)
        raise ValueError(
            f"{what} {source} is {'a pickle, which could run code' if pickle else 'no .safetensors file'}:"
            " give one in safetensors format"
        )


def _only_weights(folder: Path, *, what: str, usual: str) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if folder / usual in found:
        return folder / usual
    if len(found) != 1:
        raise ValueError(
            f"{what} {folder}: the folder holds {len(found) or 'no'} .safetensors files; name the one"
        )
    return found[0]


def _place(
    name_or_path: str, *, what: str, bundled: Mapping[str, Path], aliases: Mapping[str, str]
) -> Path | str:
    """The folder of a model that is here, or the hub id of one that need not be."""
    if name_or_path in bundled:
        return _bundled_folder(what, name_or_path, bundled[name_or_path])
    path = os.path.expanduser(name_or_path)  # pathlib raises for unknown users and long names
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        raise ValueError(f"{what} {name_or_path}: this is a file; give the folder that holds the model")
    if name_or_path.endswith((".safetensors", *PICKLES)):
        raise ValueError(f"no {what} called {name_or_path!r}: there is no such file")
    repo_id = aliases.get(name_or_path, name_or_path)
    if not _HUB_ID.fullmatch(repo_id):
        known = [*bundled, *aliases]
        raise ValueError(
            f"no {what} called {name_or_path!r}{did_you_mean(name_or_path, known)};"
            f" give one of {', '.join(known)}, an existing folder, or a hub id (owner/name)"
        )
    return repo_id


def wanted_files(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Of a repository's files those that match a pattern and, in each folder, one kind of weights.

    safetensors come before pickles (.bin) and full precision before half; of "non_ema" weights there are
    always others.
    """
    matching = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    weights = [name for name in matching if name.endswith(_WEIGHTS) and ".non_ema" not in name]
    best: dict[PurePosixPath, int] = {}
    for name in weights:
        folder = PurePosixPath(name).parent
        best[folder] = min(best.get(folder, 99), _rank(name))
    chosen = {name for name in weights if _rank(name) == best[PurePosixPath(name).parent]}
    return [name for name in matching if name in chosen or not name.endswith(_WEIGHTS)]


def _rank(name: str) -> int:
    return 2 * name.endswith(".bin") + (".fp16" in name)


def _bundled_folder(what: str, name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"the bundled {what} {name!r} is not part of this installation ({folder} is missing)"
        )
    return folder


def _cached_folder(repo_id: str, top_file: str | Sequence[str], revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in [top_file] if isinstance(top_file, str) else top_file:
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def _download(
    repo_id: str,
    files: Sequence[str],
    *,
    what: str,
    partial: bool,
    bundled: Collection[str],
    revision: str | None = None,
) -> Path:
    from huggingface_hub import snapshot_download

    answer = _ask_briefly(repo_id, revision)
    if not isinstance(answer, str):
        try:
            given = wanted_files(answer, files)
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=given))
        except _network_errors() as error:
            answer = f"the download failed: {first_sentence(error)}"
    raise _no_model(repo_id, answer, what=what, partial=partial, bundled=bundled)


def _no_model(repo_id: str, reason: str, *, what: str, partial: bool, bundled: Collection[str]) -> ValueError:
    from huggingface_hub import constants

    state = "only a part of it is" if partial else "it is not"
    offline = f"; bundled: {', '.join(bundled)}" if bundled else ""
    return ValueError(
        f"no {what} {repo_id!r}: there is no such folder, {state} in the cache {constants.HF_HUB_CACHE}"
        f" and {reason}{offline}"
    )


def _ask_briefly(repo_id: str, revision: str | None = None) -> list[str] | str:
    """The files of a repository, or why they cannot be had, in words. Waits no longer than a few seconds."""
    return briefly(lambda: _ask_hub(repo_id, revision)) or "the hub does not answer (no network?)"


def briefly(ask: Callable[[], Answer]) -> Answer | None:
    """What a question to the hub gives, or None where that takes longer than a few seconds."""
    answers: list[Answer] = []
    # A thread, because name resolution has no timeout of its own. A daemon, so that it never delays the exit.
    asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(_GIVE_UP_SECONDS)
    return answers[0] if answers else None


def _ask_hub(repo_id: str, revision: str | None = None) -> list[str] | str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        info = HfApi().model_info(repo_id, revision=revision, timeout=CONNECT_SECONDS)
    except GatedRepoError:
        return "the hub asks you to accept its terms and to log in first (hf auth login)"
    except RepositoryNotFoundError:
        return "the hub knows no such model (or it is private: hf auth login)"
    except OfflineModeIsEnabled:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    except HfHubHTTPError as error:
        return f"the hub answers with an error: {first_sentence(error)}"
    except _network_errors():
        return "the hub cannot be reached (no network?)"
    return [file.rfilename for file in info.siblings or ()]


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failing connection raises: OSError, or an error of the HTTP library that the hub client uses."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (OSError, HTTPError)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return re.split(r"\. (?=[A-Z])", lines[0])[0] if lines else type(error).__name__
