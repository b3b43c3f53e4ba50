from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.calibrators.linear import PlainLinear


class FineCalib(nn.Module):
    """High-frequency spatial detail: a gated depth-wise high-pass over the patch grid.

    With patch tokens X on an h x w grid:

        X <- X + g * sigmoid(LN(X) w + b) * HP(X)

    HP is a depth-wise convolution, at first the identity minus a box blur. Borders are replicated, so that a constant map
    has zero response everywhere at initialisation. The sigmoid lets a share of the detail through at each patch; LN has no
    parameters. The gate g has a value for each channel, 0 at initialisation: the module starts as the identity.
    Source: `docs/method.md`, "Fine".

    Args:
        dim: channels C of the tokens.
        kernel_size: odd side of the kernel, in patches.

    Raises:
        ValueError: if the kernel's side is not odd.

    Examples:
        >>> FineCalib(64)(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"FineCalib: expected kernel_size to be odd and positive, found {kernel_size}.")
        kernel = torch.full((dim, kernel_size, kernel_size), -1 / kernel_size**2)
        kernel[..., kernel_size // 2, kernel_size // 2] += 1
        self.kernel = nn.Parameter(kernel)
        self.select = PlainLinear(dim, 1)
        self.gate = nn.Parameter(torch.zeros(dim))

    def high_pass(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """HP(X): (B, h*w, C) -> (B, h*w, C)."""
        pad = self.kernel.shape[-1] // 2
        maps = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0])
        # Not F.pad(mode="replicate"), whose backward gets other strides than torch.compile's inductor expects.
        maps = torch.cat([maps[:, :, :1]] * pad + [maps] + [maps[:, :, -1:]] * pad, dim=2)
        maps = torch.cat([maps[..., :1]] * pad + [maps] + [maps[..., -1:]] * pad, dim=3)
        return F.conv2d(maps, self.kernel.unsqueeze(1), groups=tokens.shape[-1]).flatten(2).transpose(-2, -1)

    def forward(self, tokens: Tensor, grid: tuple[int, int], record: dict[str, Tensor] | None = None) -> Tensor:
        """Refines patch tokens.

        Args:
            tokens: (B, h*w, C) in raster order.
            grid: (h, w) in patches.
            record: takes "share", the logits of what is let through at each patch, (B, h*w).

        Returns:
            (B, h*w, C).

        Raises:
            ValueError: if there are not h*w tokens.
        """
        height, width = grid
        if tokens.shape[1] != height * width:
            raise ValueError(
                f"FineCalib: expected {height} x {width} = {height * width} tokens, found {tokens.shape[1]}. "
                "Leave extra tokens (class, registers) out."
            )
        logits: Tensor = self.select(F.layer_norm(tokens, tokens.shape[-1:]))
        if record is not None:
            record["share"] = logits.squeeze(-1)
        return tokens + self.gate * logits.sigmoid() * self.high_pass(tokens, grid)
