from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainLinear(nn.Module):
    """A linear layer that is no `nn.Linear`.

    What adapts, quantises or initialises every `nn.Linear` of a user's model, as PEFT, torchao and Transformers do, passes
    the calibrators by.

    Args:
        in_features: channels read.
        out_features: channels written.
        bias: whether to add a learnt bias.
        zero: start with zeros instead of the uniform distribution of `nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, zero: bool = False) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        bound = 0.0 if zero else 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_features).uniform_(-bound, bound)) if bias else None

    def extra_repr(self) -> str:
        """Its sizes, for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias)
