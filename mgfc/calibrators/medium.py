from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MediumCalib(nn.Module):
    """Category-level discriminability: patches are drawn towards the prototypes that they resemble.

    With patch tokens Z (N x C), K prototypes P and temperature tau:

        A = softmax(cos(Z, P) / tau)
        Z <- Z + g * A (P + c) W,   c_k = mean of Z under A_k

    The centroids c carry what a category looks like in this very image. The per-channel gate g is 0 at initialisation:
    the module starts as the identity. Cost is linear in N. Source: `docs/concepts.md`, "Medium".

    Args:
        dim: channels C of the tokens.
        num_prototypes: prototypes K; None if each call brings its own, as blocks do that share one set.
        temperature: tau; smaller is harder.

    Examples:
        >>> MediumCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(self, dim: int, num_prototypes: int | None = 32, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.prototypes = None if num_prototypes is None else nn.Parameter(torch.randn(num_prototypes, dim))
        self.mix = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(dim))

    def similarity(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """cos(Z, P) / tau, the logits of the assignment: (B, N, C), (K, C) -> (B, N, K)."""
        return F.normalize(tokens, dim=-1) @ F.normalize(prototypes, dim=-1).mT / self.temperature

    def draw(self, tokens: Tensor, similarity: Tensor, prototypes: Tensor) -> Tensor:
        """Draws patches towards their prototypes: (B, N, C), (B, N, K), (K, C) -> (B, N, C)."""
        assignment = similarity.softmax(dim=-1)
        mass = assignment.sum(dim=1).clamp_min(torch.finfo(torch.float16).tiny)
        centroids = assignment.mT @ tokens / mass.unsqueeze(-1)
        pull: Tensor = self.mix(assignment @ (prototypes + centroids).to(assignment.dtype))
        return tokens + self.gate * pull

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None, prototypes: Tensor | None = None) -> Tensor:
        """Refines patch tokens.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since categories have no places.
            prototypes: (K, C) to use instead of the module's own.

        Returns:
            (B, h*w, C).

        Raises:
            ValueError: if neither the module nor the call has prototypes.
        """
        prototypes = self.prototypes if prototypes is None else prototypes
        if prototypes is None:
            raise ValueError("MediumCalib(num_prototypes=None) expects prototypes of shape (K, C) in each call.")
        return self.draw(tokens, self.similarity(tokens, prototypes), prototypes)
