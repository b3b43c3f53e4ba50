"""One saver at a time in a directory, whoever dies meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_FILE = ".saving.lock"  # only where a directory itself cannot be locked


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Waits until no other process or thread holds this lock, and holds it.

    The operating system gives a lock back when its process ends, however it ends, so no lock outlives its owner. On
    POSIX systems the directory itself is locked, which leaves no file behind; on Windows a file in it.

    Yields:
        Whether the lock is held: some network file systems have none, and a saver is then on its own.
    """
    descriptor = _open(directory)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)  # which gives the lock back
        if os.name == "nt":
            with suppress(OSError):  # another saver has it open
                os.unlink(directory / LOCK_FILE)


def _open(directory: Path) -> int:
    if os.name == "nt":
        return os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    return os.open(directory, os.O_RDONLY)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _lock_on_windows(descriptor: int) -> bool:
    import msvcrt

    windows: object = msvcrt
    while True:
        try:
            # It gives up after ten tries, a second apart.
            windows.locking(descriptor, windows.LK_LOCK, 1)  # type: ignore[attr-defined]
        except OSError:
            continue
        return True
