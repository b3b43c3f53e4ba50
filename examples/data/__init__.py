"""Finds data sets by path or by name, and unpacks the one that comes with the repository.

A data set is a folder of `images/NAME.jpg` or `.png`, `labels/NAME.png` and `splits/SPLIT.txt`, one name a line. Names are
looked up in a folder of data sets: that of the environment variable `MGFC_DATA`, else `unpacked` beside this file, which
git ignores.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
SYNTH_TOWN = "synth_town"


def home() -> Path:
    """The folder that data sets are in: that of `MGFC_DATA`, else the one beside this file."""
    return Path(os.environ.get("MGFC_DATA") or HERE / "unpacked").expanduser()


def find(data: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a data set; synth_town is unpacked into `home()` when it is first asked for.

    Args:
        data: path of a data set, or its name in a folder of data sets.
        folder: such a folder to look into first. Nothing is written to it.

    Raises:
        FileNotFoundError: if it is at none of these places.
    """
    places = [*([] if folder is None else [Path(folder) / data]), Path(data).expanduser(), home() / data]
    for place in places:
        if (place / "splits").is_dir():
            return place
    if Path(data) == Path(SYNTH_TOWN):
        return unpack(HERE / f"{SYNTH_TOWN}.zip", home() / SYNTH_TOWN)
    raise FileNotFoundError(
        f"No data set {data}: none of {', '.join(map(str, places))} holds a folder `splits`. Give its path, or name the "
        f"folder that holds it with MGFC_DATA. `python examples/data/prepare.py --help` makes some from their archives."
    )


def unpack(archive: Path, target: Path) -> Path:
    """Unpacks an archive into a folder, which is there whole or not at all, also with several processes at it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        part = Path(temporary) / target.name
        with zipfile.ZipFile(archive) as file:
            file.extractall(part)
        try:
            os.rename(part, target)
        except OSError:  # another process was faster, or what is there is no data set
            if not (target / "splits").is_dir():
                raise
    return target


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
