"""Warnings, once and early, of calibrators that cannot learn, or lack the statistics that they need."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from mgfc.active import Active
from mgfc.adapter import Adapter
from mgfc.calibrators.running import is_recomputing

_PAGE = 'The page "Code bases that freeze their backbone" of the documentation has the common cases.'
FROZEN = (
    "The calibrators are frozen, so that they learn nothing: something set requires_grad to False after wrap_backbone. Call "
    f"calibration.set_adapter(calibration.active_adapter) behind it. If it is meant, call calibration.eval(). {_PAGE}"
)
NO_GRADIENTS = (
    "Forwards in training mode run without gradients (torch.no_grad or inference_mode), so that the calibrators learn nothing. "
    f"Call the backbone outside of it. If it is meant, call calibration.eval(). {_PAGE}"
)
EVAL = (
    "The calibrators are trained in eval mode, so that the statistics of the source stay empty, and coarse and medium "
    "calibration have no effect. Call calibration.train() behind what calls .eval() of the backbone, or gather the statistics "
    f"after training: `with calibration.observing(): ...`. {_PAGE}"
)
EMPTY = (
    "The statistics of the source are empty, so that coarse and medium calibration have no effect. Gather them: "
    "`with backbone.calibration.observing(): ...`, and call the model on images of the source in it."
)
PASSED_BY = (
    "The model embeds images, but calls none of the calibrated blocks{}. calibration.check(images, model=MODEL) tells what it "
    f"reaches. {_PAGE}"
)
LOW_RANK_ALONE = ": it runs their parts itself, so that low-rank adapters have an effect, but the stages behind a block none"
NOTHING = ", so that calibrators have no effect"


class Lookout:
    """What forwards tell of training, seen from where images enter a backbone.

    Args:
        active: what the hooks run.
    """

    def __init__(self, active: Active) -> None:
        self.active = active
        self._warned: set[str] = set()
        self._seen: int | None = None
        self._without_gradients: int | None = None

    def attach(self, module: nn.Module) -> None:
        """Registers the hook."""
        module.register_forward_pre_hook(self._enter)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before images enter the backbone."""
        if torch.compiler.is_compiling() or is_recomputing() or not self.active.enabled:
            return
        adapter = self.active.adapter
        before = self.active.start()
        if adapter.training and before is not None and adapter.layers and not before.left:
            self._warn(PASSED_BY.format(LOW_RANK_ALONE if before.adapted else NOTHING))
        parameters = [tensor for tensor in adapter.tensors() if isinstance(tensor, nn.Parameter)]
        if any(mean.observing for mean in adapter.statistics) or any(p.is_inference() or p.is_meta for p in parameters):
            return
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        version = sum(p._version for p in parameters)
        if is_frozen and (_is_fresh(adapter) if not adapter.training else torch.is_grad_enabled()):
            self._warn(FROZEN)
        elif adapter.training:
            self._watch_gradients([p for p in parameters if p.requires_grad], version)
        elif version != self._seen:  # something changed a parameter, as an optimizer does
            self._seen = version
            if adapter.num_batches == 0 and adapter.learnt:
                self._warn(EVAL if torch.is_grad_enabled() and parameters and not is_frozen else EMPTY)

    def _watch_gradients(self, parameters: list[nn.Parameter], version: int) -> None:
        """Reentrant checkpointing runs a forward without gradients, too; but then an optimizer's step follows some of them."""
        if torch.is_grad_enabled() or not parameters or any(p.grad is not None for p in parameters):
            self._without_gradients = None
        elif self._without_gradients == version:
            self._warn(NO_GRADIENTS)
        else:
            self._without_gradients = version

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _is_fresh(adapter: Adapter) -> bool:
    return not adapter.learnt and not adapter.num_batches
