"""The public interface: names and signatures of `mgfc` and `mgfc.viz` are those in interface.json, beside this file.

A change that is meant is written down by `python tests/test_interface.py --write`; review the difference, and say in
CHANGELOG.md what a user has to do.
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import mgfc
from mgfc import viz

SNAPSHOT = Path(__file__).with_name("interface.json")


def signature(function: Any) -> str:
    return str(inspect.signature(function))


def member(value: Any) -> str | None:
    """What a user sees of a class's member; None for plain values."""
    if isinstance(value, property):
        return f"property -> {inspect.signature(value.fget).return_annotation}"
    if isinstance(value, (classmethod, staticmethod)):
        return f"{type(value).__name__} {signature(value.__func__)}"
    return signature(value) if inspect.isfunction(value) else None


def members(cls: type) -> dict[str, str]:
    """Public methods and properties that the library itself defines, also in bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] == "mgfc":
            for name, value in vars(base).items():
                if not name.startswith("_") and (described := member(value)) is not None:
                    found[name] = described
    return dict(sorted(found.items()))


def describe(value: Any) -> Any:
    if not inspect.isclass(value):
        return signature(value) if callable(value) else type(value).__name__
    described: dict[str, Any] = {"bases": [base.__name__ for base in value.__bases__]}
    if not issubclass(value, Exception):
        described |= {"constructor": signature(value), "members": members(value)}
    return described


def interface() -> dict[str, Any]:
    found = {name: describe(getattr(mgfc, name)) for name in sorted(mgfc.__all__)}
    return found | {f"viz.{name}": describe(getattr(viz, name)) for name in sorted(viz.__all__)}


def as_text(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2) + "\n"


def test_the_public_interface_is_the_one_written_down() -> None:
    expected, found = SNAPSHOT.read_text(), as_text(interface())
    difference = difflib.unified_diff(expected.splitlines(), found.splitlines(), "interface.json", "mgfc", lineterm="", n=1)
    message = "The public interface has changed. If that is meant: python tests/test_interface.py --write, and CHANGELOG.md."
    assert found == expected, "\n".join([message, *difference])


def test_nothing_in_it_depends_on_the_machine() -> None:
    assert " at 0x" not in SNAPSHOT.read_text()


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/test_interface.py --write")
    SNAPSHOT.write_text(as_text(interface()))
