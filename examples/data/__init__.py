"""Finds data sets by path or by name, and unpacks the one that comes with the repository.

A data set is a folder of `images/NAME.jpg` or `.png`, `labels/NAME.png` and `splits/SPLIT.txt`, one name a line. Names are
looked up in a folder of data sets: the one that is given, else that of the environment variable `MGFC_DATA`, else
`unpacked` beside this file, which git ignores.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
SYNTH_TOWN = "synth_town"


def home(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that data sets are in: `folder`, else `MGFC_DATA`, else the one beside this file."""
    return Path(folder or os.environ.get("MGFC_DATA") or HERE / "unpacked").expanduser()


def find(data: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a data set; synth_town is unpacked when it is first asked for.

    Args:
        data: path of a data set, or its name in the folder of data sets.
        folder: that folder; see `home` for what None means.

    Raises:
        FileNotFoundError: if it is at neither place.
    """
    root = home(folder)
    for place in (Path(data).expanduser(), root / data):
        if (place / "splits").is_dir():
            return place
    if Path(data) == Path(SYNTH_TOWN):
        return unpack(HERE / f"{SYNTH_TOWN}.zip", root / SYNTH_TOWN)
    raise FileNotFoundError(
        f"No data set {data}: neither {Path(data)} nor {root / data} holds a folder `splits`. Give its path, or name the "
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
