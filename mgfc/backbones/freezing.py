"""What wrapping freezes in a backbone, and how to give it back."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mgfc.backbones.tuners import own_name


class Frozen:
    """Parameters and BatchNorm statistics of a backbone that were frozen.

    Args:
        root: the backbone.
        keep: identities of parameters that stay as they are.
    """

    def __init__(self, root: nn.Module, keep: set[int]) -> None:
        frozen = {n: p for n, p in root.named_parameters() if p.requires_grad and id(p) not in keep}
        self.names = {own_name(name) for name in frozen}  # PEFT may be gone when they are given back
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        self._has_meta = any(parameter.is_meta for parameter in frozen.values())
        self.norms = [module for module in root.modules() if isinstance(module, _BatchNorm)]
        self.in_training = [norm for norm in self.norms if norm.training or not root.training]
        self.hold(root)

    def hold(self, root: nn.Module) -> None:
        """After the mode of the model was set, puts BatchNorm layers into eval mode, and freezes weights that came later."""
        for norm in self.norms:
            norm.eval()
        if self._has_meta:
            weights = [p for name, p in root.named_parameters() if own_name(name) in self.names]
            for parameter in weights:
                parameter.requires_grad_(False)
            self._has_meta = any(parameter.is_meta for parameter in weights)

    def release(self, root: nn.Module, *, parameters: bool) -> None:
        """Gives BatchNorm layers the backbone's mode and, if asked to, the parameters their `requires_grad` flags back."""
        for norm in self.in_training:
            norm.train(root.training)
        for name, parameter in root.named_parameters():
            if parameters and name in self.names:
                parameter.requires_grad_(True)
