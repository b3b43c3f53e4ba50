"""Reads files of folders and zip archives alike, without unpacking."""

from __future__ import annotations

import os
import re
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

UNREAD = (".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz")


class Files:
    """All files of some folders and archives, by the path that they have there.

    Args:
        places: folders, archives in zip format, or folders that hold such archives.

    Raises:
        SystemExit: if a place is missing, or an archive of another format.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self.paths: dict[str, Path | tuple[zipfile.ZipFile, threading.Lock]] = {}
        self.unread: list[Path] = []
        for place in places:
            if place.is_dir():
                self._add_folder(place)
            elif place.is_file():
                self._add_archive(place)
            else:
                raise SystemExit(f"{place} is missing.")
        if len(self.unread) and not self.paths:
            raise SystemExit(f"{self.unread[0]} is no zip archive. Unpack it and give the folder.")

    def _add_folder(self, folder: Path) -> None:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for path in (Path(parent, name) for name in sorted(names)):
                if path.suffix == ".zip" or path.suffix in UNREAD:
                    self._add_archive(path)
                else:
                    self.paths.setdefault(path.relative_to(folder.parent).as_posix(), path)

    def _add_archive(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            self.unread.append(path)
            return
        archive, lock = zipfile.ZipFile(path), threading.Lock()
        for name in archive.namelist():
            if not name.endswith("/") and not name.startswith("__MACOSX/"):
                self.paths.setdefault(name, (archive, lock))

    def match(self, pattern: re.Pattern[str]) -> dict[frozenset[tuple[str, str]], str]:
        """The files whose whole path matches, by the pattern's named groups."""
        found: dict[frozenset[tuple[str, str]], str] = {}
        for name in self.paths:
            if match := pattern.fullmatch(name):
                found.setdefault(frozenset(match.groupdict().items()), name)
        return found

    def read(self, name: str) -> bytes:
        place = self.paths[name]
        if isinstance(place, Path):
            return place.read_bytes()
        archive, lock = place
        with lock:
            return archive.read(name)

    def __str__(self) -> str:
        return ", ".join(str(place) for place in self.places)
