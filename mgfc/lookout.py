"""Warnings, once and early, of calibrators that cannot learn, or lack the statistics that they need."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from mgfc.active import Active
from mgfc.adapter import Adapter
from mgfc.calibrators.running import is_recomputing, is_traced

_PAGE = 'The page "Code bases that freeze their backbone" of the documentation has the common cases.'
FROZEN = (
    "The calibrators are frozen, so that they learn nothing: something set requires_grad to False after wrap_backbone. Call "
    "calibration.set_adapter(calibration.active_adapter) behind it. If it is meant, call calibration.eval(), or, while they "
    f"are fresh, set calibration.enabled = False. {_PAGE}"
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
        self._seen: tuple[int, bool, bool] | None = None
        self._had_gradients = False
        self._had_none = False
        self._passed_by = False

    def attach(self, module: nn.Module) -> None:
        """Registers the hook."""
        module.register_forward_pre_hook(self._enter)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before images enter the backbone."""
        if is_traced() or not self.active.enabled:
            return
        adapter = self.active.adapter
        self._had_gradients |= adapter.training and torch.is_grad_enabled()
        if is_recomputing():  # of a forward that reentrant checkpointing ran without gradients
            return
        self._watch_blocks(adapter)
        parameters = [tensor for tensor in adapter.tensors() if isinstance(tensor, nn.Parameter)]
        if adapter.is_observing or any(p.is_inference() or p.is_meta for p in parameters):
            return
        is_training = bool(parameters) and torch.is_grad_enabled()
        is_frozen = not any(p.requires_grad for p in parameters)
        state = sum(p._version for p in parameters), is_training, is_frozen
        if adapter.training:
            self._watch_training(is_training, is_frozen)
        elif state != self._seen:  # something changed a parameter, as an optimizer does
            self._seen = state
            self._watch_evaluation(adapter, is_training, is_frozen)

    def _watch_blocks(self, adapter: Adapter) -> None:
        """One forward may have ended before the blocks, by an error, or been of the patch embedding alone; not two in a row."""
        before = self.active.start()
        passed_by = adapter.training and before is not None and len(adapter.layers) > 0 and not before.left
        if passed_by and self._passed_by and before is not None:
            self._warn(PASSED_BY.format(LOW_RANK_ALONE if before.adapted else NOTHING))
        self._passed_by = passed_by

    def _watch_training(self, is_training: bool, is_frozen: bool) -> None:
        if is_frozen:
            if is_training:
                self._warn(FROZEN)
        elif not self._had_gradients:  # one may be a look at the outputs
            if self._had_none:
                self._warn(NO_GRADIENTS)
            self._had_none = True

    def _watch_evaluation(self, adapter: Adapter, is_training: bool, is_frozen: bool) -> None:
        if adapter.num_batches == 0 and adapter.learnt:
            if is_training and not is_frozen:
                self._warn(EVAL)
            elif EVAL not in self._warned:
                self._warn(EMPTY)
        elif is_training and is_frozen and not adapter.learnt and not adapter.num_batches:
            self._warn(FROZEN)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)
