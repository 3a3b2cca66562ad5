"""Files that are there whole or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from compression.core.errors import Problem


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then renames it: `path` is never seen half-written.

    Raises:
        Problem: the disk is full; nothing is left behind.
    """
    draft = path.with_name(path.name + ".part")
    try:
        write(draft)
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        draft.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(sign in str(error) for sign in ("No space left", "File too large")):
            raise Problem(
                str(path), "the disk is full", "free some space and run again: finished blocks are kept"
            ) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text whole or not at all."""

    def write(draft: Path) -> None:
        draft.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file whole or not at all."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda draft: save_file(ready, draft, metadata={"format": "pt"}))


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What a safetensors file says of its tensors, by name (dtype, shape, data_offsets), and where their bytes begin.

    The format is eight bytes that hold the header's length, a JSON header, and the tensors' bytes one after the other.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def join_tensors(path: Path, parts: list[Path]) -> None:
    """Joins safetensors files into one, whole or not at all, with one tensor's bytes in memory."""
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}  # name -> file, where its bytes begin there, entry
    for part in parts:
        header, begin = read_header(part)
        found |= {name: (part, begin + entry["data_offsets"][0], entry) for name, entry in header.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (_, _, entry) in sorted(found.items()):
        start, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        entries[name] = entry | {"data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(draft: Path) -> None:
        with draft.open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for _, (part, place, entry) in sorted(found.items()):
                with part.open("rb") as file:
                    file.seek(place)
                    out.write(file.read(entry["data_offsets"][1] - entry["data_offsets"][0]))

    write_atomically(path, write)


def read_tensors(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file once, and checks its hash on those very bytes.

    Raises:
        Problem: the file is missing, is not safetensors, or is not the file that the manifest names. DVC
            does not notice an object that was corrupted in its cache; this does.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Problem(str(path), "the file is missing", "run the stage that makes it again") from None
    if expected_sha256 and hashlib.sha256(content).hexdigest() != expected_sha256:
        raise Problem(
            str(path),
            "the file is not the one its manifest names (corrupt or changed)",
            "delete its folder and the damaged object in .dvc/cache, then run the stage again",
        )
    try:
        return dict(sorted(load(content).items()))  # the library gives them in an order of its own, anew each time
    except SafetensorError as error:
        raise Problem(str(path), f"not a safetensors file: {error}") from None
