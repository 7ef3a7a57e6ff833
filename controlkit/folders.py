"""Model folders: where they are, whether their files are whole, and one plain line when they are not.

A name is a bundled model, a folder, or a hub id (``owner/name``, kept in the Hugging Face cache). Only
safetensors are read: they hold numbers and cannot run code. The libraries' progress bars and load reports
are silenced here, and what matters in them (missing or misshapen weights) becomes an error.
"""

import json
import os
import re
import struct
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.naming import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONNECT_SECONDS = 3.0  # for the hub to answer; with name resolution never more than _GIVE_UP_SECONDS
_GIVE_UP_SECONDS = 4.0
_UNWANTED_FILES = ("*.fp16.*", "*.non_ema.*", "*.bin", "*.msgpack", "*.onnx*")


def find_folder(
    name_or_path: str,
    *,
    what: str,
    needs: Sequence[str],
    files: Sequence[str],
    bundled: Mapping[str, Path],
    aliases: Mapping[str, str] | None = None,
) -> Path:
    """The local folder of a model: bundled, given as a path, in the hub's cache, or downloaded into it.

    ``what`` names the kind of model in messages ("base"). ``needs`` are the patterns without which a cached
    copy is incomplete; the first is the name of a file at its top. ``files`` are the patterns to download.
    ``aliases`` maps short names to hub ids.

    Raises ValueError, one line within about 5 seconds, when there is no such model: it names the id, the
    cache's path and why the hub could not help.
    """
    aliases = aliases or {}
    if name_or_path in bundled:
        return _bundled_folder(what, name_or_path, bundled[name_or_path])
    path = os.path.expanduser(name_or_path)  # pathlib raises for unknown users and long names
    if os.path.isdir(path):
        return Path(path)
    if os.path.isfile(path):
        raise ValueError(f"{what} {name_or_path}: this is a file; give the folder that holds the model")
    repo_id = aliases.get(name_or_path, name_or_path)
    if not _HUB_ID.fullmatch(repo_id):
        known = [*bundled, *aliases]
        raise ValueError(
            f"no {what} called {name_or_path!r}{did_you_mean(name_or_path, known)};"
            f" give one of {', '.join(known)}, an existing folder, or a hub id (owner/name)"
        )
    cached = _cached_folder(repo_id, needs[0])
    if cached is not None and all(any(cached.glob(pattern)) for pattern in needs):
        return cached
    return _download(repo_id, files, what=what, partial=cached is not None, bundled=bundled)


def load_part(cls: type, folder: Path, *, dtype: Any) -> Any:
    """Build a diffusers or transformers model from one ``folder``, in evaluation mode, quietly.

    Raises ValueError, one line that names the file, for a missing, unreadable or incomplete configuration or
    weight file, and for weights that do not fit the configuration.
    """
    read_json(folder / "config.json")
    variant = check_weights(folder)
    # The libraries differ in a name, and in which of them can report misshapen weights instead of raising.
    options = (
        {"dtype": dtype, "ignore_mismatched_sizes": True}
        if cls.__module__.startswith("transformers")
        else {"torch_dtype": dtype}
    )
    with quiet_libraries():
        try:
            model, report = cls.from_pretrained(  # type: ignore[attr-defined]
                str(folder),
                **options,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(
                f"cannot build {cls.__name__} from {folder}: {_first_sentence(error)}"
            ) from error
    _check_report(folder, report)
    return model.eval()


def check_weights(folder: Path) -> str | None:
    """Check that the safetensors files in ``folder`` are whole, by their headers and sizes.

    Returns their variant: None, or "fp16" if there is only that one. Raises ValueError, naming the file, when
    there is none, or when one is empty, cut short, a Git LFS pointer, a web page or something else.
    """
    files = weight_files(folder)
    for file in files:
        read_header(file)
    return "fp16" if ".fp16" in files[0].suffixes else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in ``folder``: several if it is sharded.

    Full precision comes before half. Raises ValueError if there is neither.
    """
    for variant in ("", ".fp16"):
        for stem in ("diffusion_pytorch_model", "model"):
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if single.is_file():
                return [single]
            if index.is_file() and (shards := set(read_json(index).get("weight_map", {}).values())):
                return [folder / shard for shard in sorted(shards)]
    if any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has pickled weights only (.bin), which can run code: convert to safetensors"
        )
    raise ValueError(f"{folder} has no weights (diffusion_pytorch_model.safetensors or model.safetensors)")


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, after checking that the file is as long as the header says.

    Raises ValueError with what the file is instead: missing, empty, cut short, a Git LFS pointer, a web page.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
        _refuse_impostor(file, start)
        (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
        if length > size - 8:
            raise ValueError(f"{file} is cut short or is not a safetensors file ({size} bytes)")
        stream.seek(8)
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        end = max(
            (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a safetensors file (its header is not readable)") from error
    if size != 8 + length + end:
        raise ValueError(f"{file} is cut short: {size} bytes of {8 + length + end}; fetch it again")
    return header


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file if it is missing or something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} is missing or not readable") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return value


def write_weights(file: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its arguments alone.

    The library writes the metadata in a random order, so the header is put in order afterwards, in place:
    same entries, same length. Write to a temporary folder (``files.replace_folder``): this is not atomic by
    itself.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), file, metadata=dict(metadata))
    header = read_header(file)
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        assert len(text) <= length, "the header, put in order, is longer than it was"
        stream.write(text.ljust(length))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and load reports of diffusers and transformers, and restore them after."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, had_bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if had_bar:
                library.enable_progress_bar()


def _bundled_folder(what: str, name: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"the bundled {what} {name!r} is not part of this installation ({folder} is missing)"
        )
    return folder


def _cached_folder(repo_id: str, top_file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, top_file)
    return Path(found).parent if isinstance(found, str) else None


def _download(
    repo_id: str, files: Sequence[str], *, what: str, partial: bool, bundled: Collection[str]
) -> Path:
    from huggingface_hub import constants, snapshot_download

    reason = _why_unreachable(repo_id)
    if reason is None:
        try:
            return Path(
                snapshot_download(repo_id, allow_patterns=list(files), ignore_patterns=list(_UNWANTED_FILES))
            )
        except _network_errors() as error:
            reason = f"the download failed: {_first_sentence(error)}"
    state = "only a part of it is" if partial else "it is not"
    offline = f"; bundled: {', '.join(bundled)}" if bundled else ""
    raise ValueError(
        f"no {what} {repo_id!r}: there is no such folder, {state} in the cache {constants.HF_HUB_CACHE}"
        f" and {reason}{offline}"
    )


def _why_unreachable(repo_id: str) -> str | None:
    """None if the hub has this model for us, else why not, in words. Waits no longer than a few seconds."""
    answers: list[str | None] = []
    # A thread, because name resolution has no timeout of its own. A daemon, so that it never delays the exit.
    asking = threading.Thread(target=lambda: answers.append(_ask_hub(repo_id)), daemon=True)
    asking.start()
    asking.join(_GIVE_UP_SECONDS)
    return answers[0] if answers else "the hub does not answer (no network?)"


def _ask_hub(repo_id: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        HfApi().model_info(repo_id, timeout=_CONNECT_SECONDS)
    except GatedRepoError:
        return "the hub asks you to accept its terms and to log in first (hf auth login)"
    except RepositoryNotFoundError:
        return "the hub knows no such model (or it is private: hf auth login)"
    except OfflineModeIsEnabled:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    except HfHubHTTPError as error:
        return f"the hub answers with an error: {_first_sentence(error)}"
    except _network_errors():
        return "the hub cannot be reached (no network?)"
    return None


def _network_errors() -> tuple[type[Exception], ...]:
    """What a failing connection raises: OSError, or an error of the HTTP library that the hub client uses."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (OSError, HTTPError)


def _refuse_impostor(file: Path, start: bytes) -> None:
    if not start:
        raise ValueError(f"{file} is empty (0 bytes); fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{file} is a web page, not weights: the download needed a login or another address")


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse a model that lacks weights or has misshapen ones: the libraries make such up at random."""
    for key, problem in (("missing_keys", "lack"), ("mismatched_keys", "have the wrong shape for")):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report.get(key, ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights in {folder} {problem} {names[0]}{more}")


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return re.split(r"\. (?=[A-Z])", lines[0])[0] if lines else type(error).__name__
