from __future__ import annotations

import torch
from torch import Tensor, nn


class CoarseCalib(nn.Module):
    """Scene-level context: a few tokens gather the scene and every patch reads it back.

    With patch tokens Z (N x C) and m learnt scene tokens T:

        S = T + softmax(T Z^T / sqrt C) Z
        Z <- Z + g * softmax(Z S^T / sqrt C) S W

    The per-channel gate g is 0 at initialisation: the module starts as the identity. Cost is linear in N, and the
    result does not depend on the order of the patches. Source: `docs/concepts.md`, "Coarse".

    Args:
        dim: channels C of the tokens.
        num_tokens: scene tokens m.

    Examples:
        >>> CoarseCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(self, dim: int, num_tokens: int = 8) -> None:
        super().__init__()
        self.scene_tokens = nn.Parameter(torch.randn(num_tokens, dim))
        self.mix = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(dim))

    def scene(self, tokens: Tensor) -> Tensor:
        """Gathers the scene: (B, N, C) -> (B, m, C)."""
        attention = torch.einsum("mc,bnc->bmn", self.scene_tokens * tokens.shape[-1] ** -0.5, tokens).softmax(dim=-1)
        return self.scene_tokens + attention @ tokens

    def read(self, tokens: Tensor, scene: Tensor) -> Tensor:
        """Lets every patch read the scene: (B, N, C), (B, m, C) -> (B, N, C)."""
        attention = (tokens @ scene.mT * tokens.shape[-1] ** -0.5).softmax(dim=-1)
        context: Tensor = self.mix(attention @ scene)
        return tokens + self.gate * context

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Refines patch tokens.

        Args:
            tokens: (B, h*w, C).
            grid: (h, w) in patches; not used, since the scene has no places.

        Returns:
            (B, h*w, C).
        """
        return self.read(tokens, self.scene(tokens))
