"""Writing files whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system, where nobody locks
    fcntl = None  # type: ignore[assignment]


def write_bytes(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: whoever looks sees the old file or the new one, never half of it.

    Raises:
        OSError: if the folder cannot be written or the disk is full; it names the file, and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def halves(path: Path) -> list[Path]:
    """What killed processes left of ``path`` half-written."""
    return list(path.parent.glob(f".{escape(path.name)}.*.tmp"))


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    write_bytes(path, text.encode())


def digest(path: Path) -> str:
    """A short fingerprint of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder.

    Raises:
        ValueError: if another process is at work there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(AttributeError, OSError):  # no locks on this system or this disk
            _lock(handle, folder)
        yield
    finally:
        os.close(handle)  # which unlocks


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {folder}; wait until it is done, or choose another folder") from None
