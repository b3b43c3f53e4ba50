"""Reading one save and never two.

What a directory holds at a moment is one *generation*: the files of one save. A saver makes a generation current by one
rename, of a complete staging folder to `.incoming`, and then moves its files to their places, where people, git and
`upload_folder` find them. A file of the current generation is therefore in `.incoming` or, once moved, in its place, and a
reader that looks into the two in this order finds it. The current `config.json` is a file that no other save has written, so
its identity (inode, time, size) tells generations apart.

The invariant: if the identity of `config.json` is the same before and after a read, all that was read between is of one
generation. If it is not, or a file vanished meanwhile, the read is done again. Nothing that was read counts before, an error
included. Readers take no lock and write nothing, so that they work on read-only media, too.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from mgfc import peft
from mgfc.errors import AdapterNotFoundError, MGFCError
from mgfc.storage.format import CONFIG, HEAD, WEIGHTS
from mgfc.storage.parsing import named_in_our_words

INCOMING = ".incoming"
_SECONDS = 60.0

T = TypeVar("T")


class Files(Protocol):
    """The files of an adapter, wherever they are."""

    def __call__(self, name: str) -> Path:
        """Where a file is.

        Raises:
            AdapterNotFoundError: if there is none.
        """

    def begin(self) -> None:
        """Begins a read."""

    def is_stale(self, error: MGFCError | None) -> bool:
        """Whether what was read since `begin` has to be read again, with what came of it."""


class DirectoryFiles:
    """Those of a directory.

    Args:
        directory: of an adapter.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._generation: tuple[int, ...] | None = None
        self._found: set[Path] = set()

    def __call__(self, name: str) -> Path:
        with named_in_our_words(self.directory / name):
            for path in (self.directory / INCOMING / name, self.directory / name):
                if path.is_file():
                    self._found.add(path)
                    return path
        raise AdapterNotFoundError(
            f"{self.directory}: expected a file {name}, found none. An adapter's directory is what save_pretrained writes."
        )

    def begin(self) -> None:
        """Notes which generation is current."""
        self._generation = self._current()
        self._found = set()

    def is_stale(self, error: MGFCError | None) -> bool:
        """Whether another generation became current meanwhile, or a file was moved to its place after it was found."""
        return self._current() != self._generation or (error is not None and any(map(_is_gone, self._found)))

    def _current(self) -> tuple[int, ...] | None:
        for path in (self.directory / INCOMING / CONFIG, self.directory / CONFIG):
            try:
                found = path.stat()
            except (OSError, ValueError):
                continue
            return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
        return None


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def consistently(files: Files, read: Callable[[Files], T]) -> T:
    """What `read` makes of the files of one save.

    Raises:
        AdapterNotFoundError: if other saves came in between for a minute.
        MGFCError: what `read` raises.
    """
    end = time.monotonic() + _SECONDS
    while True:
        files.begin()
        try:
            result = read(files)
        except MGFCError as error:
            if not files.is_stale(error):
                raise
        else:
            if not files.is_stale(None):
                return result
        if time.monotonic() > end:
            raise AdapterNotFoundError(
                "Expected an adapter that stays for the time of a read, found that other saves came in between for a minute. "
                "Save less often, or read a copy."
            )
        time.sleep(random.uniform(0, 0.01))


@contextmanager
def one_save(directory: Path) -> Iterator[Path]:
    """Within it, a copy of one save of a directory, for several reads that have to be of one save, as of adapter and head.

    Examples:
        >>> with one_save(Path("out")) as fixed:  # doctest: +SKIP
        ...     wrap_backbone(vit, fixed)
        ...     head = load_head(fixed)
    """
    optional = (HEAD, peft.CONFIG, peft.WEIGHTS)

    def copy(files: Files) -> tempfile.TemporaryDirectory[str]:
        target = tempfile.TemporaryDirectory()
        try:
            for name in (CONFIG, WEIGHTS, *optional):
                try:
                    path = files(name)
                except AdapterNotFoundError:
                    if name not in optional:
                        raise
                    continue
                with named_in_our_words(path):
                    shutil.copyfile(path, Path(target.name) / name)
        except BaseException:
            target.cleanup()
            raise
        return target

    with consistently(DirectoryFiles(directory), copy) as name:
        yield Path(name)
