"""The hash of a safetensors file's tensors, written into its header and compared when it is read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

HASH_KEY = "modelspec.hash_sha256"  # "0x" and the SHA-256 of the bytes behind the header
NO_HASH = f"0x{'0' * 64}"  # stands in the header until the tensors are written


def check_hash(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise ValueError, naming the file, if ``metadata`` knows its tensors' hash and they have another."""
    known = metadata.get(HASH_KEY, "").lower()
    if known and known != tensor_hash(path):
        raise ValueError(
            f"{path} is damaged: its weights are not those it was written with (SHA-256); fetch it again"
            f" (or, if a tool changed it and kept the header, remove the header's {HASH_KEY})"
        )


def tensor_hash(path: Path) -> str:
    """``0x`` and the SHA-256 of a safetensors file's bytes behind the header (ModelSpec's hash_sha256)."""
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return f"0x{hashlib.file_digest(stream, 'sha256').hexdigest()}"
