"""Ends processes of a group without the interpreter's end: `torchrun leaving.py SCRIPT ARGUMENTS...`, or `leave()`.

PyTorch keeps a process group that a mesh or DDP has used, and with it Gloo's threads. One that still holds a tensor when
the interpreter ends aborts the process, which happens rarely. What is registered with `atexit` does not run.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import NoReturn


def leave() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
