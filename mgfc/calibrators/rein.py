from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mgfc.calibrators.linear import PlainLinear


class ReinShared(nn.Module):
    """What Rein's blocks share: two linear layers of width C and a scale.

    Args:
        dim: channels C of the tokens.
        use_softmax: whether similarities pass a softmax.
    """

    def __init__(self, dim: int, use_softmax: bool = True) -> None:
        super().__init__()
        self.use_softmax = use_softmax
        self.token_to_feature = PlainLinear(dim, dim)
        self.delta = PlainLinear(dim, dim, zero=True)
        self.scale = nn.Parameter(torch.tensor(0.001))

    def forward(self, tokens: Tensor, learnt: Tensor) -> Tensor:
        """What a block adds, s ((X + D) W_d + b_d): X (B, N, C) and T (m, C) -> (B, N, C)."""
        similarity = tokens @ learnt.transpose(-2, -1)
        if self.use_softmax:
            similarity = (similarity * tokens.shape[-1] ** -0.5).softmax(dim=-1)
        retrieved = similarity[..., 1:] @ self.token_to_feature(learnt[1:])
        added: Tensor = self.scale * self.delta(tokens + retrieved)
        return added


class ReinCalib(nn.Module):
    """Rein's refinement of one block's tokens, from the equations of arXiv 2312.04265.

    With patch tokens X and m learnt tokens T, which are A B of low rank r, or stand by themselves:

        S = softmax(X T^T / sqrt C), or X T^T;   D = S[:, 1:] (T[1:] W_t + b_t);   X <- X + s ((X + D) W_d + b_d)

    W_t, b_t, W_d, b_d and s are shared by all blocks. W_d and b_d are 0 at initialisation: the module starts as the
    identity. Rein's link to the queries of a head is no part of it.

    Args:
        dim: channels C of the tokens.
        shared: what the blocks share; not one of this module's children.
        num_tokens: m.
        token_rank: r; None for tokens that stand by themselves.

    Examples:
        >>> ReinCalib(64, ReinShared(64))(torch.randn(2, 6 * 9, 64)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(self, dim: int, shared: ReinShared, num_tokens: int = 100, token_rank: int | None = 16) -> None:
        super().__init__()
        self.dim = dim
        self.__dict__["shared"] = shared
        width = dim if token_rank is None else token_rank
        bound = math.sqrt(6 / (3 * 16**2 + math.sqrt(dim * width)))
        self.tokens = nn.Parameter(torch.empty(num_tokens, width).uniform_(-bound, bound))
        self.basis = None if token_rank is None else nn.Parameter(torch.empty(token_rank, dim).uniform_(-bound, bound))

    @property
    def dtype(self) -> torch.dtype:
        """In which the refinement is computed."""
        return self.tokens.dtype

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None, record: object = None) -> Tensor:
        """Refines patch tokens: (B, N, C) -> (B, N, C). Grid and record are not used."""
        shared: ReinShared = self.__dict__["shared"]
        refined: Tensor = tokens + shared(tokens, self.tokens if self.basis is None else self.tokens @ self.basis)
        return refined
