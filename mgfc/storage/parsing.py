"""Reading files that strangers wrote: every size, depth and number is bounded, and every failure is named in our words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgfc.errors import AdapterFileError, AdapterNotFoundError, MGFCError

MAX_JSON_BYTES = 1 << 20
_MAX_DEPTH = 32
# The largest integer that a float holds exactly, with all below it; what JSON itself promises.
_MAX_INTEGER = 2**53


@contextmanager
def named_in_our_words(path: Path, what: str = "read") -> Iterator[None]:
    """Turns what an operating system raises about a path into an `AdapterNotFoundError`."""
    try:
        yield
    except MGFCError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        shown = shorten(str(path))
        raise AdapterNotFoundError(
            f"{shown}: expected what can be {what}, found that it cannot ({type(error).__name__}: {shorten(str(reason))}). "
            "Check the path, its permissions and the space on the disk."
        ) from error


def local_path(source: str | os.PathLike[str]) -> Path:
    """The path that a user's text means if it means one: `~` is the home, and timm's `local-dir:` may stand before it."""
    return Path(os.path.expanduser(os.fspath(source).removeprefix("local-dir:")))


def shorten(text: str, limit: int = 300) -> str:
    """A text that fits into a message, and into any terminal."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit - 20]}... ({len(text):,} characters)"


def printable(text: str) -> str:
    """A line of text that a stranger wrote, without the characters that steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def read_bytes(path: Path, limit: int) -> bytes:
    """A small file.

    Raises:
        AdapterNotFoundError: if it cannot be read.
        AdapterFileError: if it is larger than `limit` bytes.
    """
    with named_in_our_words(path), path.open("rb") as file:
        data = file.read(limit + 1)
        size = os.fstat(file.fileno()).st_size
    if len(data) > limit:
        raise AdapterFileError(f"{path}: expected at most {limit} bytes, found {size}.")
    return data


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        AdapterNotFoundError: if it cannot be read.
        AdapterFileError: if it is no JSON, oversized, nested deeply, or holds a number or a text that nothing can use.
    """
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(data: bytes, where: str) -> Any:
    """What JSON text holds, as `read_json` says."""
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse)
        problem = _problem(content)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{where}: expected JSON, found a damaged file ({shorten(str(error))}). Fetch or save it again."
        ) from None
    if problem:
        raise AdapterFileError(f"{where}: expected JSON {problem}. Fetch or save it again.")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _problem(content: Any) -> str | None:
    """What is wrong with parsed JSON, level by level, without recursion."""
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                deeper += value.keys()
                deeper += value.values()
            elif isinstance(value, list):
                deeper += value
            elif isinstance(value, str) and not _is_text(value):
                return f"whose texts are Unicode, found {shorten(value)!r}"
            elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
                return f"whose integers are at most {_MAX_INTEGER}, found one of {value.bit_length()} bits"
            elif isinstance(value, float) and not math.isfinite(value):
                return "whose numbers are finite, found one that is not"
        if not deeper:
            return None
        level = deeper
    return f"of at most {_MAX_DEPTH} levels, found more"


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
