"""The hash of a safetensors file's tensors, written into its header and compared when it is read."""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

HASH_KEY = "modelspec.hash_sha256"  # "0x" and the SHA-256 of the bytes behind the header
_PIECE = 1 << 22  # bytes that are read at a time
NO_HASH = f"0x{'0' * 64}"  # stands in the header until the tensors are written


def check_hash(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise ValueError, naming the file, if ``metadata`` knows its tensors' hash and they have another."""
    known = metadata.get(HASH_KEY, "").lower().removeprefix("0x")
    if known and f"0x{known}" != tensor_hash(path):
        raise ValueError(
            f"{path} is damaged: its weights are not those it was written with (SHA-256); fetch it again"
            f" (or, if a tool changed it and kept the header, remove the header's {HASH_KEY})"
        )


def check_records(path: Path) -> None:
    """Raise ValueError, naming the file, if a record of torch's archive has another CRC-32 than is written in
    it. What is no archive, or was written without checksums, which are 0 then, is passed over.
    """
    if not is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            written = [record for record in archive.infolist() if record.CRC]
            for record in written:
                with archive.open(record) as stream:
                    while stream.read(_PIECE):  # compared at its end
                        pass
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {str(error).rstrip('.')}; fetch it again") from error


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive whose table of contents can be found."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # a table that tells of several disks
        return False


def archive_names(path: Path) -> list[str]:
    """The names in a zip archive; none of one whose table of contents is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError):
        return []


def tensor_hash(path: Path) -> str:
    """``0x`` and the SHA-256 of a safetensors file's bytes behind the header (ModelSpec's hash_sha256)."""
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return f"0x{hashlib.file_digest(stream, 'sha256').hexdigest()}"
