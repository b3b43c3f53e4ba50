"""Which adapter the hooks of a backbone run: the active one, or its copy on another device."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mgfc.adapter import Adapter
from mgfc.distributed import is_replica
from mgfc.errors import CalibrationError


@dataclass
class Reached:
    """What a forward reached.

    Args:
        adapted: a layer with a low-rank adapter.
        left: the end of a calibrated block.
    """

    adapted: bool = False
    left: bool = False


class _Thread(threading.local):
    """The copy of the active adapter that a thread runs under `nn.DataParallel`, and what its last forward reached."""

    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.has_called = False
        self.reached = Reached()

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        return _Thread, ()


class Active:
    """The adapter that the hooks of one backbone run, and how.

    `nn.DataParallel` copies a backbone for each forward, and the copies have the hooks of the original. Each runs in a
    thread of its own, which is told the copy's calibrators before the copy is called.

    Args:
        adapter: the active one.

    Attributes:
        enabled: whether they run it.
        fused: whether its low-rank adapters are in the backbone's weights, and pass by here.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.enabled = True
        self.fused = False
        self._thread = _Thread()

    def attach(self, root: nn.Module) -> None:
        """Registers the hook before a backbone."""
        root.register_forward_pre_hook(self._enter)

    def enter(self, root: Any) -> None:
        """Tells this thread the calibrators of a backbone that it calls, if that is a copy."""
        if is_replica(root):
            self._thread.adapter = adapter = root.calibration.adapters[root.calibration.active_adapter]
            for layer in adapter.layers.values() if adapter.maps is not None else ():
                layer.__dict__["shared"] = adapter.maps

    @property
    def reached(self) -> Reached | None:
        """What the last forward of this thread reached; None if there was none."""
        return replace(self._thread.reached) if self._thread.has_called else None

    def start(self) -> Reached | None:
        """Begins a forward of this thread, and tells what its last one reached."""
        before = self.reached
        self._thread.has_called = True
        self._thread.reached.adapted = self._thread.reached.left = False
        return before

    # Compiled blocks note it, too: in one object that stays, since what they write to a `threading.local` itself is lost.

    def note_adapted(self) -> None:
        """Notes that a forward reached a layer with a low-rank adapter."""
        self._thread.reached.adapted = True

    def note_left(self) -> None:
        """Notes that a forward reached the end of a calibrated block."""
        self._thread.reached.left = True

    def of(self, module: nn.Module) -> Adapter:
        """The adapter for a module of the backbone, or of a copy.

        Raises:
            CalibrationError: if the calibrators of the copy are not known.
        """
        if not is_replica(module):
            return self.adapter
        if self._thread.adapter is None:
            raise CalibrationError(
                "nn.DataParallel: expected copies of the backbone to be called themselves or through FeatureMaps, found that a "
                "host calls a method of theirs, so that their calibrators cannot be told. Use DistributedDataParallel."
            )
        return self._thread.adapter

    def _enter(self, root: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the backbone."""
        self.enter(root)
