"""An adapter set on its backbone: hooks, frozen weights, a PEFT adapter beside, and all of it taken away again."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mgfc import fusing, peft, placement
from mgfc.adapter import Adapter
from mgfc.adapters import Adapters
from mgfc.backbones.description import is_hierarchical, max_extra_tokens, token_orders
from mgfc.backbones.detection import Tower
from mgfc.backbones.entry import adapted_layers
from mgfc.backbones.freezing import Frozen
from mgfc.backbones.grid import GridTracker, stem_hooks
from mgfc.backbones.stem import image_entry
from mgfc.backbones.tuners import tuner_layers, tuner_parameters
from mgfc.blocks import BlockHooks
from mgfc.calibrators.running import is_recomputing
from mgfc.errors import CalibrationError
from mgfc.images import ImageHook
from mgfc.lookout import Lookout
from mgfc.tree import HookedModules

T = TypeVar("T")

# Whoever finds a change of the model first mends it. Not a part of models, which are copied and pickled.
_CHANGING = threading.RLock()


class Attachment(Adapters):
    """Adapters that are attached to a backbone, as a child of it and by hooks.

    Args:
        tower: the backbone.
        adapter: the first adapter.
        name: of the first adapter.

    Attributes:
        block_names: of the backbone's blocks.
        blocks: their hooks.
        images: the hook before the patch embedding.
        has_peft: whether a PEFT adapter was injected with the calibrators, which is saved and removed with them.
    """

    def __init__(self, tower: Tower, adapter: Adapter, name: str = "default") -> None:
        values = placement.place(adapter, tower)
        super().__init__(name, adapter)
        self._values = {name: values}
        self._spare: dict[str, dict[str, Tensor]] = {}
        self.block_names = tower.blocks
        self._tracker = GridTracker(max_extra_tokens(tower), is_hierarchical(tower))
        orders = enumerate(zip(tower.blocks, token_orders(tower), strict=True))
        self.blocks = [BlockHooks(block, i, order, self._tracker, self.active) for i, (block, order) in orders]
        self.images = ImageHook(self.active)
        self.lookout = Lookout(self.active)
        self._hooked: HookedModules | None = None
        self._frozen: Frozen | None = None
        self._fused: list[tuple[nn.Parameter, Tensor]] = []
        self.has_peft = False
        self.peft_guard: nn.Module | None = None
        self.register_load_state_dict_post_hook(_settle_loaded)  # type: ignore[no-untyped-call]
        self.train(tower.root.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Within a copy of the backbone, belongs to that copy; copied alone, holds the parameters and no backbone."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = dict(self.__dict__)
        if id(state.get("_backbone")) not in memo:
            state.pop("_backbone", None)
            state |= {"_hooked": None, "_frozen": None, "_fused": [], "blocks": []}
            state["active"] = copy.copy(self.active)
            state["active"].fused = False
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin

    @property
    def backbone(self) -> nn.Module:
        """The module that this calibration is attached to."""
        if "_backbone" not in self.__dict__:
            raise CalibrationError("This calibration is not attached to a backbone; wrap_backbone attaches it.")
        return self.__dict__["_backbone"]  # type: ignore[no-any-return]

    @property
    def tower(self) -> Tower:
        """The backbone and its blocks."""
        return Tower(self.backbone, "", self.block_names)

    def attach(self, tower: Tower, tuner: peft.Tuner | None = None, *, freeze: bool = True) -> None:
        """Becomes a child of a backbone and registers the hooks; `wrap_backbone` calls it.

        Args:
            tower: the backbone.
            tuner: a PEFT adapter to inject beside the calibrators.
            freeze: freeze the backbone's parameters, except those of PEFT adapters in it, and its BatchNorm statistics.

        Raises:
            ConfigError, AdapterMismatchError: if PEFT refuses its adapter; the backbone is as it was.
        """
        if tuner is not None:
            peft.inject(tower.root, *tuner)
            self.has_peft = True
        _ = [list(adapted_layers(block)) for block in tower.modules()]  # an error comes before any hook
        self.__dict__["_backbone"] = tower.root
        first, entry = tower.modules()[0], image_entry(tower)
        for module in (tower.root, first) if entry is None else (tower.root, entry, first):  # one may be replaced
            module.register_forward_pre_hook(self._prepare)
        self.lookout.attach(first if entry is None else entry)
        self.active.attach(tower.root)
        stem_hooks(tower.root, tower.blocks, self._tracker)
        self.images.attach(tower)
        # Also on blocks that the active adapter leaves out: hooks added after torch.compile are ignored.
        for hooks in self.blocks:
            hooks.attach(tower.root)
        self._hooked = HookedModules(
            tower.root, tower.blocks, [self, self.active, self.lookout, self._tracker, self.images, *self.blocks]
        )
        if freeze:
            self._frozen = Frozen(tower.root, tuner_parameters(tower.root))
        tower.root.calibration = self

    def detach(self) -> None:
        """Removes itself, its hooks and its PEFT adapter from the backbone; `unwrap_backbone` calls it.

        Where a PEFT adapter that others injected stays, the backbone stays frozen.
        """
        root = self.backbone
        self.unfuse()
        assert self._hooked is not None
        self._hooked.remove(root)
        if self.has_peft:
            peft.eject(root)
        if self._frozen is not None:
            self._frozen.release(root, parameters=next(tuner_layers(root), None) is None)
        del root.calibration, self.__dict__["_backbone"]

    def forward(self, x: T) -> T:
        """Returns its input: containers that run their children in order, as timm's `FeatureListNet`, pass through."""
        return x

    def train(self, mode: bool = True) -> Attachment:
        """Sets the calibrators' mode; the frozen backbone's BatchNorm layers stay in eval mode whoever sets theirs.

        Warns:
            UserWarning: if PEFT, imported after the calibrators were attached, froze them.
        """
        super().train(mode)
        if "_backbone" in self.__dict__:
            self._follow()
            self._settle()
        if self._frozen is not None:
            self._frozen.hold(self.backbone)
        if self.peft_guard is None:
            if mode and "_backbone" in self.__dict__ and peft.froze(self.adapter.parameters(), self.backbone):
                warnings.warn(
                    "The calibrators are frozen and would learn nothing: PEFT, imported after wrap_backbone, freezes all that "
                    "it finds. Call calibration.set_adapter(calibration.active_adapter), or import peft before wrap_backbone.",
                    stacklevel=2,
                )
            self.peft_guard = peft.guard()
        return self

    def _add(self, name: str, adapter: Adapter) -> None:
        """Registers an adapter beside the others, on the devices of the backbone."""
        self._values[name] = placement.place(adapter, self.tower)
        self._put(name, adapter)

    def _settle(self) -> None:
        """Sees to it that calibrators have values and lie where their blocks compute, or raises `CalibrationError`."""
        with _CHANGING:
            for name, adapter in self.adapters.items():
                values, spare = self._values.setdefault(name, {}), self._spare.setdefault(name, {})
                if placement.settle(adapter, self.tower, values, spare):
                    adapter.requires_grad_(name == self.active_adapter)  # whoever read a file made new parameters

    def _follow(self) -> None:
        """Moves hooks to where the layers of the blocks are now."""
        with _CHANGING:
            if self._hooked is not None and self._hooked.has_moved():
                for hooks in self.blocks:
                    hooks.follow(self.backbone)
                self._hooked.relink(self.backbone)

    def _prepare(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the backbone, before images enter it, and before its first block."""
        if torch.compiler.is_compiling() or is_recomputing():
            return
        self._follow()
        if self._hooked is not None:
            self._hooked.require_present()
        self._settle()
        self._spare.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Attachment:
        lacking = [name for name, adapter in self.adapters.items() if placement.lacks_values(adapter)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in lacking:  # `to_empty` makes places for tensors
            placement.fill(self.adapters[name], self._values.get(name, {}))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._require_unfused("a state dict is loaded")
        super()._load_from_state_dict(*args, **kwargs)

    def fuse(self) -> None:
        """Puts the active adapter's low-rank adapters into the backbone's weights, for inference: they then cost nothing.

        Outputs stay the same up to rounding. What is saved is the adapter as it was. Train, switch or disable it after
        `unfuse`. Calling it twice changes nothing.

        Raises:
            CalibrationError: if a weight is quantised, sharded or under an adapter of PEFT's, or the calibrators are
                disabled; nothing is changed then.
        """
        if not self.enabled:
            raise CalibrationError("The calibrators are disabled. Fuse the low-rank adapters outside of disabled().")
        if not self.active.fused:
            self._fused = fusing.fuse(self.backbone, self.blocks, self.adapter)
            self.active.fused = True

    def unfuse(self) -> None:
        """Gives the backbone's weights back what they were before `fuse`, to the bit."""
        fusing.unfuse(self._fused)
        self._fused, self.active.fused = [], False

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Within it, the low-rank adapters are fused, as by `fuse`; afterwards as they were before."""
        before = self.active.fused
        self.fuse()
        try:
            yield
        finally:
            if not before:
                self.unfuse()


def _settle_loaded(calibration: nn.Module, incompatible: Any) -> None:
    """After a state dict, which may have brought values to a model that had none."""
    if isinstance(calibration, Attachment) and "_backbone" in calibration.__dict__:
        calibration._settle()
