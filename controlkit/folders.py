"""Model folders: whether their files are whole, and one plain line when they are not.

Weights are read from safetensors, which hold numbers and cannot run code, or, where there are none, from a
pickle by a reader that accepts tensors and nothing else. The libraries' progress bars and load reports are
silenced here, and what matters in them (missing or misshapen weights) becomes an error.
"""

import functools
import json
import os
import pickle
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from controlkit.config_types import check_like_defaults
from controlkit.formats.hashing import HASH_KEY, archive_names, is_archive, tensor_hash
from controlkit.hub import first_sentence

if TYPE_CHECKING:
    from torch import Tensor


FLOATS: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Types of numbers by their names in safetensors, and torch's names for them."""
_TYPES: Mapping[str, str] = {
    **FLOATS,
    "BOOL": "bool",
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}
_BITS: Mapping[str, int] = {  # a bool has 8
    name: int((re.findall(r"\d+", ours) or ["8"])[0]) for name, ours in _TYPES.items()
}
P = ParamSpec("P")
T = TypeVar("T")
PICKLE_FAULTS = (  # what torch's reader raises of damaged pickles, besides UnpicklingError
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, struct.error),
)
_ARCHIVES: Mapping[bytes, str] = {  # first bytes of what has to be unpacked first
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
_OTHER_FORMATS: Mapping[str, str] = {  # by a file's suffix
    ".onnx": "an ONNX network",
    ".h5": "weights for Keras",
    ".msgpack": "weights for Flax",
    ".npz": "arrays of NumPy",
}
_PACKED = "is a packed archive ({}): unpack it, and give the weights that are in it"
_loading = threading.RLock()  # the libraries change torch for the whole process while they make a network
_quiet = threading.Lock()
_silenced: list[list[tuple[int, bool]]] = []  # how loud the libraries were, once for each block that is open
_ALIGNED = 64  # bytes: what torch's own memory begins at a multiple of


def alone(load: Callable[P, T]) -> Callable[P, T]:
    """What makes networks, so that no other thread does at the same time.

    The caller's inference mode is left meanwhile: through weights made in it no gradient ever passes.
    """

    @functools.wraps(load)
    def loaded(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        inferring = torch.is_inference_mode_enabled()
        with _loading, torch.inference_mode(False) if inferring else nullcontext():
            return load(*args, **kwargs)

    return loaded


def load_part(cls: type, folder: Path, *, dtype: Any, exact: bool = False) -> Any:
    """Build a diffusers or transformers model from one ``folder``, in evaluation mode, quietly.

    Raises ValueError, one line that names the file, for a missing, unreadable or incomplete configuration or
    weight file, for weights that do not fit the configuration, and, where ``exact``, for weights that the
    model does not have.
    """
    config = read_json(folder / "config.json")
    if cls.__module__.startswith("diffusers"):
        check_like_defaults(cls, config, folder / "config.json")
    variant = check_weights(folder)
    # The libraries differ in a name, and in which of them can report misshapen weights instead of raising.
    options = (
        {"dtype": dtype, "ignore_mismatched_sizes": True}
        if cls.__module__.startswith("transformers")
        else {"torch_dtype": dtype}
    )
    with _loading, quiet_libraries():
        try:
            model, report = cls.from_pretrained(  # type: ignore[attr-defined]
                str(folder),
                **options,
                variant=variant,
                use_safetensors=not is_pickle(weight_files(folder)[0]),
                local_files_only=True,
                output_loading_info=True,
            )
        except _build_errors() as error:
            raise ValueError(f"cannot build {cls.__name__} from {folder}: {first_sentence(error)}") from error
    _check_report(folder, report, exact=exact)
    _move_to_own_memory(model, weight_files(folder))
    return model.eval()


def _move_to_own_memory(model: Any, files: Sequence[Path]) -> None:
    """Read a model's tensors into memory of their own, as `read_tensors` does, where they lie elsewhere.

    The libraries map the files and have read nothing yet, so that this costs no more than a first use would.
    """
    import torch

    named = [*model.named_parameters(), *model.named_buffers()]
    mapped = {name: tensor for name, tensor in named if tensor.data_ptr() % _ALIGNED}
    for file in files if mapped else ():
        header = read_header(file)
        # transformers has short names in memory and long ones in files.
        keys = {name: key for name in mapped for key in (name, f"text_model.{name}") if key in header}
        same = {
            name: key
            for name, key in keys.items()
            if getattr(torch, _TYPES.get(header[key]["dtype"], ""), None) == mapped[name].dtype
            and tuple(header[key]["shape"]) == tuple(mapped[name].shape)
        }
        read = read_tensors(file, same.values())
        for name, key in same.items():
            mapped.pop(name).data = read[key]
    for tensor in mapped.values():
        tensor.data = tensor.data.clone()


def _build_errors() -> tuple[type[Exception], ...]:
    """What building a model from other people's files raises: the libraries check little, and late."""
    from huggingface_hub.errors import StrictDataclassError

    of_python = (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)
    return (*of_python, ArithmeticError, AssertionError, pickle.UnpicklingError, StrictDataclassError)


_VARIANTS = ("", ".fp16", ".bf16")


def check_weights(folder: Path) -> str | None:
    """Check that the weight files in ``folder`` are whole; of safetensors, by their headers and sizes.

    Returns their variant: None, or "fp16" or "bf16" if there is only that one. Raises ValueError, naming the
    file, when there is none, or when one is empty, cut short, a Git LFS pointer, a web page or anything else.
    """
    files = weight_files(folder)
    for file in files:
        if not file.is_file():  # of several, which an index names
            raise ValueError(f"{file} is missing")
        if is_pickle(file):
            with file.open("rb") as stream:
                refuse_impostor(file, stream.read(512))
        else:
            read_header(file)
    return next((name for name in ("fp16", "bf16") if f".{name}" in files[0].name), None)


def is_pickle(file: Path) -> bool:
    """Whether a weight file is a pickle, which says nothing about itself before it is loaded."""
    return file.suffix == ".bin"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of the model in ``folder``: several if it is sharded.

    Full precision comes before half, and safetensors before a pickle. Raises ValueError if there is none.
    """
    for variant in _VARIANTS:
        for stem in ("diffusion_pytorch_model", "model"):
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            if shards := _shards(folder / f"{stem}.safetensors.index{variant}.json"):
                return shards
    for variant in _VARIANTS:
        for stem in ("diffusion_pytorch_model", "pytorch_model"):
            if (pickle := folder / f"{stem}{variant}.bin").is_file():
                return [pickle]
            if shards := _shards(folder / f"{stem}.bin.index{variant}.json"):
                return shards
    raise ValueError(f"{folder} has no weights (diffusion_pytorch_model.safetensors or model.safetensors)")


def _shards(index: Path) -> list[Path]:
    """The files that an index lists; none where there is no index."""
    listed = read_json(index).get("weight_map", {}) if index.is_file() else {}
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise ValueError(f"{index} is damaged: its weight_map has to name a file for every tensor")
    return [index.parent / shard for shard in sorted(set(listed.values()))]


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, after checking that the file is as long as the header says.

    Raises ValueError with what the file is instead: missing, empty, cut short, a Git LFS pointer, a web page.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(512)
        refuse_impostor(file, start)
        (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
        if length > size - 8:
            raise ValueError(f"{file} is cut short or is not a safetensors file ({size} bytes)")
        stream.seek(8)
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        places = sorted((*_place(entry), key) for key, entry in header.items() if key != "__metadata__")
        told = header.get("__metadata__", {})
        if not all(isinstance(value, str) for value in told.values()):
            raise ValueError("metadata must be strings")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a safetensors file (its header is not readable)") from error
    end = max((stop for _, stop, _ in places), default=0)
    if size > 8 + length + end:
        raise ValueError(f"{file} is damaged: {size} bytes, and its header tells of {8 + length + end}")
    if size != 8 + length + end:
        raise ValueError(f"{file} is cut short: {size} bytes of {8 + length + end}; fetch it again")
    _check_places(file, header, places)
    return header


def read_tensors(file: Path, keys: Iterable[str]) -> "dict[str, Tensor]":
    """Tensors of a safetensors file by their keys, on the CPU, each in memory of its own.

    The library maps the file, in which a tensor may lie at any address; and the kernels of some processors
    round otherwise where that is no multiple of 64: the same weights in another file would give other
    pictures. Raises ValueError, naming the file, if it is damaged.
    """
    import torch

    header = read_header(file)
    found: dict[str, Tensor] = {}
    try:
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            for key in keys:
                entry = header[key]
                first, end = entry["data_offsets"]
                stored = torch.empty(end - first, dtype=torch.uint8)
                stream.seek(start + first)
                if stream.readinto(stored.numpy().data) != end - first:
                    raise EOFError(f"{key} is cut short")
                found[key] = stored.view(getattr(torch, _TYPES[entry["dtype"]])).reshape(entry["shape"])
    except (OSError, RuntimeError, LookupError, EOFError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return found


def _place(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Where a tensor begins and ends, by its entry in a header. Raises for an entry that is none."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if not (isinstance(dtype, str) and numbers):
        raise ValueError("no tensor's entry")
    return begin, end


def _check_places(file: Path, header: Mapping[str, Any], places: Sequence[tuple[int, int, str]]) -> None:
    """Raise ValueError unless tensors lie one behind the other, each as long as its type and shape say."""
    before = 0
    for begin, end, key in places:
        dtype, shape = header[key]["dtype"], header[key]["shape"]
        if begin != before:
            raise ValueError(
                f"{file} is damaged: by its header {key} begins at byte {begin}, and what lies"
                f" before it ends at {before}"
            )
        wanted = _BITS[dtype] * prod(shape) // 8 if dtype in _BITS else end - begin
        if end - begin != wanted:
            raise ValueError(
                f"{file} is damaged: by its header {key} has {end - begin} bytes, and its type and shape"
                f" ({dtype}, {'x'.join(map(str, shape)) or 'a single number'}) take {wanted}"
            )
        before = end


def read_state(file: Path, *, what: str, pickled: bool | None = None) -> dict[str, Any]:
    """What stands in a weight file, by its keys, on the CPU: of a pickle, tensors and plain values alone.

    ``pickled``: whether it is a pickle; None goes by the file's name. Raises ValueError, naming the file, for
    one that is missing, damaged, holds anything else, or no mapping; ``what`` it should be ("embedding").
    """
    if not file.is_file():
        raise ValueError(f"there is no {what} {file}")
    if not (file.suffix != ".safetensors" if pickled is None else pickled):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        read_header(file)
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {first_sentence(error)}") from error
    import torch

    with file.open("rb") as stream:
        start = stream.read(512)
    refuse_impostor(file, start)
    # An archive is mapped, so that of a large checkpoint only what is used is read. Anything else, and one
    # whose name says safetensors, is given as a stream: torch goes by a path's suffix.
    mapped = start.startswith(b"PK") and file.suffix != ".safetensors"
    try:
        with file.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it then refuses
            source: Any = str(file) if mapped else stream
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, *PICKLE_FAULTS) as error:
        raise ValueError(f"{file} {_pickle_problem(file, start, error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} is no {what}: it holds a {type(state).__name__}")
    return state


def _pickle_problem(file: Path, start: bytes, error: Exception) -> str:
    """Why torch refused a pickle, in a few words."""
    foreign = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module \S+ is blocked)", str(error))
    if foreign:
        what = f"holds more than tensors ({foreign[1]}), which is refused"
        return f"{what}: it could run code; save the tensors alone"
    is_zip = start.startswith(b"PK")
    ends = isinstance(error, EOFError | struct.error) or "unexpected EOF" in str(error)
    if ends or (is_zip and not is_archive(file)):
        return "is cut short: fetch it again"
    if is_zip and (names := archive_names(file)) and not any(name.endswith("data.pkl") for name in names):
        return _PACKED.format("zip")
    return "is damaged, or holds more than tensors, which is refused"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file if it is missing or something else."""
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise ValueError(
                f"{file} begins with a byte order mark, which the libraries do not read: save it without one"
            )
        value = json.loads(text)
    except OSError as error:
        raise ValueError(f"{file} is missing or not readable") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return value


def write_weights(file: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its arguments alone.

    Where the metadata has an entry for the hash of the tensors, the true one is put in its place. The library
    writes the metadata in a random order, so the header is put in order afterwards, in place: same entries,
    same length. Write to a temporary place (``files.replace_folder``): this is not atomic by itself.

    Raises OSError where the disk is full or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(_apart(tensors), file, metadata=dict(metadata))
    except SafetensorError as error:  # the library's own, whatever the system said
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error
    header = read_header(file)
    hashed = {HASH_KEY: tensor_hash(file)} if HASH_KEY in metadata else {}
    header["__metadata__"] = dict(sorted({**metadata, **hashed}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        assert len(text) <= length, "the header, put in order, is longer than it was"
        stream.write(text.ljust(length))


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Tensors each in memory of its own, as the library wants them: two names can stand for one."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place and place in seen else tensor
        seen.add(place)
    return apart


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars and load reports of diffusers and transformers, and restore them after."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    with _quiet:  # of blocks in several threads the last one that ends restores what was before the first
        before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
        for library in () if _silenced else libraries:  # setting a level goes through all of Python's loggers
            library.set_verbosity(library.CRITICAL)
            library.disable_progress_bar()
        _silenced.append(_silenced[0] if _silenced else before)
    try:
        yield
    finally:
        with _quiet:
            before = _silenced.pop()
            for library, (verbosity, had_bar) in zip(libraries, before, strict=True) if not _silenced else ():
                library.set_verbosity(verbosity)
                if had_bar:
                    library.enable_progress_bar()


def refuse_impostor(file: Path, start: bytes) -> None:
    """Raise ValueError for a file whose first bytes tell that it holds no weights that can be read: empty, a
    pointer, a page, GGUF, an archive, a picture, a text; and for one of another library, by its name.
    """
    if not start:
        raise ValueError(f"{file} is empty (0 bytes); fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    if start.startswith(b"GGUF"):
        raise ValueError(f"{file} is a GGUF file, whose quantized weights are not read: give .safetensors")
    is_safetensors = start[8:9] == b"{"
    packed = next((name for sign, name in _ARCHIVES.items() if start.startswith(sign)), "")
    if packed and not is_safetensors:
        raise ValueError(f"{file} {_PACKED.format(packed)}")
    if file.suffix in _OTHER_FORMATS and not is_safetensors:
        raise ValueError(f"{file} holds {_OTHER_FORMATS[file.suffix]}: give .safetensors or .pth")
    # A header's length, too, can begin with the bytes of a blank and of "<"; its JSON follows it.
    if not is_safetensors and start.lstrip().startswith(b"<"):
        raise ValueError(f"{file} is a web page, not weights: the download needed a login or another address")
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        raise ValueError(f"{file} is a picture, not weights")
    if not any(byte < 32 and byte not in b"\t\n\r" for byte in start):  # a header's length has zeros
        raise ValueError(
            f"{file} is a text, not weights: give a .safetensors or .pth file, or a model's folder"
        )


def _check_report(folder: Path, report: Mapping[str, Any], *, exact: bool) -> None:
    """Refuse a model that lacks weights or has misshapen ones: the libraries make such up at random."""
    problems = {"missing_keys": "lack", "mismatched_keys": "have the wrong shape for"}
    if exact:
        problems["unexpected_keys"] = "hold, beyond what the configuration tells of,"
    for key, problem in problems.items():
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in report.get(key, ()))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights in {folder} {problem} {names[0]}{more}")
