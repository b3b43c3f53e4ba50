"""The calibrators of one backbone: its adapters, their losses, what they are and whether they work."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mgfc import reports
from mgfc.adapter import Adapter, Adapters, average
from mgfc.backbones.description import max_extra_tokens, token_orders
from mgfc.backbones.detection import Tower
from mgfc.backbones.grid import GridTracker, stem_hooks
from mgfc.backbones.tuners import own_name, tuner_layers, tuner_parameters
from mgfc.blocks import BlockHooks
from mgfc.config import AdapterConfig
from mgfc.errors import AdapterMismatchError, CalibrationError, ConfigError
from mgfc.peft import Tuner, eject, inject

T = TypeVar("T")


class Calibration(nn.Module):
    """The trainable calibrators of one backbone, reached as `backbone.calibration`.

    `wrap_backbone` makes it; its parameters are what a user's loop trains. It refines the patch tokens that leave each
    calibrated block, whoever calls the block, and changes nothing else. It holds one or more adapters by name, of which
    one is active; `wrap_backbone` gives it the first, "default".

    Args:
        tower: the backbone.

    Attributes:
        adapters: `Adapter` by name.
        active_adapter: name of the one that the backbone uses and training trains.
    """

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.block_names = tower.blocks
        self.adapters = Adapters()
        self.active_adapter = ""
        self.enabled = True
        self._tracker = GridTracker(max_extra_tokens(tower))
        self.blocks = [BlockHooks(self, index, order, self._tracker) for index, order in enumerate(token_orders(tower))]
        self._handles: list[Any] = []
        self._frozen_names: set[str] = set()
        self._frozen_norms: list[nn.Module] = []
        self.has_peft = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        """Within a copy of the backbone, belongs to that copy; copied alone, holds the parameters and no backbone."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = dict(self.__dict__)
        if id(state.get("_backbone")) not in memo:
            state.pop("_backbone", None)
            state |= {"_handles": [], "_frozen_norms": [], "blocks": []}
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

    @property
    def adapter(self) -> Adapter:
        """The active adapter."""
        return self.adapters[self.active_adapter]

    @property
    def config(self) -> AdapterConfig:
        """Configuration of the active adapter."""
        return self.adapter.config

    @property
    def layers(self) -> nn.ModuleDict:
        """Calibrators of the active adapter by block index."""
        return self.adapter.layers

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the active adapter."""
        return self.adapter.num_parameters

    @property
    def num_batches(self) -> int | None:
        """Training batches in the active adapter's running statistics; None if no stage has any."""
        return self.adapter.num_batches

    def put_adapter(self, name: str, adapter: Adapter, root: nn.Module) -> None:
        """Takes an adapter in, on the backbone's device; the first one becomes active."""
        _follow(adapter, root)
        adapter.train(self.training)
        self.adapters[name] = adapter
        if self.active_adapter:
            adapter.requires_grad_(False)
        else:
            self.active_adapter = name

    def add_adapter(
        self,
        name: str,
        adapter: AdapterConfig | str | os.PathLike[str] | None = None,
        **hub_options: Any,
    ) -> None:
        """Adds an adapter beside the others. The active one stays active: `set_adapter` switches.

        Args:
            name: new among `adapters`, without dots.
            adapter: as in `wrap_backbone`.
            **hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, as in `wrap_backbone`.

        Raises:
            ConfigError: if the name is taken or cannot be one, or the configuration does not fit the backbone.
            AdapterNotFoundError, AdapterFileError, AdapterMismatchError: as in `wrap_backbone`.
        """
        from mgfc.checkpoint import build

        self._check_new(name)
        built, tuner = build(self.tower, adapter, **hub_options)
        if tuner is not None:
            raise AdapterMismatchError(
                f"{adapter}: expected calibrators alone, found an adapter of PEFT's beside them, which all adapters would "
                "share. Load it with wrap_backbone."
            )
        self.put_adapter(name, built, self.backbone)

    def set_adapter(self, name: str) -> None:
        """Makes an adapter the active one: the backbone uses it, and its parameters alone require gradients.

        Raises:
            ConfigError: if there is none of this name.
        """
        self._check_known(name)
        self.active_adapter = name
        for other in self.adapters:
            self.adapters[other].requires_grad_(other == name)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter that is not active.

        Raises:
            ConfigError: if there is none of this name, or it is the active one.
        """
        self._check_known(name)
        if name == self.active_adapter:
            raise ConfigError(
                f"Adapter {name!r} is active. Activate another with set_adapter first, or remove all with unwrap_backbone."
            )
        del self.adapters[name]

    def merge_adapters(self, names: Sequence[str], weights: Sequence[float] | None = None, *, name: str = "merged") -> None:
        """Adds an adapter whose parameters and statistics are the weighted mean of others'. The active one stays active.

        A mean of weights computes something sensible for adapters trained from one start, such as one adapter tuned
        further for several domains; not for adapters trained apart.

        Args:
            names: of adapters with one configuration.
            weights: one for each, divided by their sum; None for equal ones.
            name: of the new adapter.

        Raises:
            ConfigError: if a name is unknown or the new one taken, the configurations differ, or the weights do not fit.
        """
        for known in names:
            self._check_known(known)
        self._check_new(name)
        adapters = [self.adapters[known] for known in names]
        self.put_adapter(name, average(adapters, [1.0] * len(names) if weights is None else weights), self.backbone)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name or name in self.adapters:
            raise ConfigError(
                f"Adapter's name: expected a new one without dots beside {', '.join(self.adapters)}, found {name!r}."
            )

    def _check_known(self, name: str) -> None:
        if name not in self.adapters:
            raise ConfigError(f"Adapter {name!r}: expected one of {', '.join(self.adapters)}. add_adapter adds others.")

    def attach(self, tower: Tower, tuner: Tuner | None = None) -> None:
        """Puts an adapter of PEFT's into a tower, if there is one, and registers the hooks on its blocks and stem."""
        if tuner is not None:
            inject(tower.root, *tuner)
            self.has_peft = True
        self.__dict__["_backbone"] = tower.root
        self._handles = stem_hooks(tower.root, tower.blocks, self._tracker)
        # Also on blocks that the active adapter leaves out: hooks added after torch.compile are ignored.
        for hooks, block in zip(self.blocks, tower.modules(), strict=True):
            self._handles += hooks.attach(block)

    def forward(self, x: T) -> T:
        """Returns its input: containers that run their children in order, as timm's `FeatureListNet`, pass through."""
        return x

    def detach(self) -> None:
        """Removes the hooks and PEFT's adapter again, and gives back the `requires_grad` flags that `freeze` took.

        An adapter of PEFT's that others put in wants the backbone frozen, so that it stays so.
        """
        for handle in self._handles:
            handle.remove()
        if self.has_peft:
            eject(self.backbone)
        if next(tuner_layers(self.backbone), None) is None:
            for name, parameter in self.backbone.named_parameters():
                if name in self._frozen_names:
                    parameter.requires_grad_(True)
        for norm in self._frozen_norms:
            norm.train(self.backbone.training)
        del self.__dict__["_backbone"]

    def freeze(self) -> None:
        """Freezes the backbone's parameters, except those of PEFT adapters in it, and its BatchNorm statistics."""
        keep = tuner_parameters(self.backbone) | {id(p) for p in self.parameters()}
        frozen = {n: p for n, p in self.backbone.named_parameters() if p.requires_grad and id(p) not in keep}
        self._frozen_names = {own_name(name) for name in frozen}  # PEFT may be gone when they are given back
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        self._frozen_norms = [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]
        for norm in self._frozen_norms:
            norm.eval()

    def train(self, mode: bool = True) -> Calibration:
        """Sets the calibrators' mode; the frozen backbone's BatchNorm layers stay in eval mode whoever sets theirs."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Within it, another adapter is active.

        Raises:
            ConfigError: if there is none of this name.
        """
        before, flags = self.active_adapter, [(p, p.requires_grad) for p in self.parameters()]
        self.set_adapter(name)
        try:
            yield
        finally:
            self.active_adapter = before
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the backbone computes what it would without calibrators."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def losses(self, labels: Tensor, ignore_index: int = 255) -> dict[str, Tensor]:
        """The hierarchical losses of the last forward, each already times its weight, averaged over the blocks.

        Frees the intermediate tensors that the losses need.

        Args:
            labels: (B, H, W) integer class ids of the images of the last forward, at any resolution.
            ignore_index: id of pixels that do not count.

        Returns:
            Scalars by granularity: those of "coarse", "medium" and "fine" whose weight is above 0. In eval mode nothing
            is recorded, and the dict is empty.

        Raises:
            LabelError: if labels have a wrong shape, dtype or class id.
            CalibrationError: in training mode, if no forward came before.
        """
        return self.adapter.losses(labels, ignore_index)

    def loss(self, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """The sum of `losses`: a scalar to add to the task's loss; 0 with all weights at 0 and in eval mode."""
        device = next(self.parameters()).device
        return sum(self.losses(labels, ignore_index).values(), start=torch.zeros((), device=device))

    def check(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> list[reports.BlockReport]:
        r"""Runs one forward and reports what each calibrated block saw.

        Args:
            *args: of the forward.
            model: what to call; None for the backbone. Give the host model to learn whether the host reaches every block.
            **kwargs: of the forward.

        Returns:
            One report a block, in order; `print(*reports, sep="\n")` shows them.

        Raises:
            CalibrationError: naming the blocks that the forward did not call.
        """
        return reports.check(self, self.backbone if model is None else model, args, kwargs)

    def summary(self) -> str:
        """A table of trainable parameters per block and granularity, their share of the backbone, and batches seen."""
        return reports.summary(self)

    def save_pretrained(self, directory: str | os.PathLike[str], *, head: nn.Module | None = None, **card: Any) -> None:
        """Writes the adapter into a directory; arguments as in `mgfc.checkpoint.save_pretrained`."""
        from mgfc.checkpoint import save_pretrained

        save_pretrained(self, directory, head=head, **card)

    def push_to_hub(self, repo_id: str, *, head: nn.Module | None = None, **options: Any) -> str:
        """Uploads the adapter to the Hugging Face Hub; arguments and result as in `mgfc.hub.push_to_hub`."""
        from mgfc.hub import push_to_hub

        return push_to_hub(self, repo_id, head=head, **options)


def _follow(adapter: Adapter, root: nn.Module) -> None:
    """Moves calibrators to the backbone's device; half precision is no place to train, so they stay in float32."""
    reference = next((p for p in root.parameters() if p.is_floating_point()), None)
    if reference is not None:
        place = (reference.device, torch.promote_types(reference.dtype, torch.float32))
        if any((p.device, p.dtype) != place for p in adapter.parameters()):
            adapter.to(*place)
