from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.calibrators.coarse import CoarseCalib
from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.medium import MediumCalib


class CalibLayer(nn.Module):
    """The calibrator of one block: its stages, from coarse to fine, and a bottleneck that learns.

        X <- coarse(X);   X <- medium(X);   Z = fine(LayerNorm(X) W_down);   X <- X + gelu(Z) W_up

    The first two stages work on the tokens themselves, the last one inside the bottleneck. W_up is 0 at initialisation and
    the statistics are empty: the layer starts as the identity. Source: `docs/method.md`, "The layer".

    Args:
        dim: channels C of the block's tokens.
        rank: bottleneck width r.
        coarse: a `CoarseCalib` of width C, or None.
        medium: a `MediumCalib` of width C, or None.
        fine: a `FineCalib` of width r, or None.

    Examples:
        >>> CalibLayer(64, 16, fine=FineCalib(16))(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        coarse: CoarseCalib | None = None,
        medium: MediumCalib | None = None,
        fine: FineCalib | None = None,
    ) -> None:
        super().__init__()
        self.coarse = coarse
        self.medium = medium
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, rank, bias=False)
        self.fine = fine
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def delta(self, tokens: Tensor, grid: tuple[int, int] | None, record: dict[str, Tensor] | None = None) -> Tensor:
        """What the layer adds: (B, N, C) -> (B, N, C).

        Args:
            tokens: (B, N, C) patch tokens, in raster order if there is a grid.
            grid: (h, w) in patches, or None where the patches have no known places; the fine stage is skipped then.
            record: takes what the losses need: "scene" (B, r), "similarity" (B, N, K), "detail" (B, N, r).
        """
        record = {} if record is None else record
        delta = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
        if self.coarse is not None:
            delta = delta + self.coarse.shift(tokens).to(tokens.dtype)
        if self.medium is not None:
            shift, record["similarity"] = self.medium.shift(tokens + delta)
            delta = delta + shift.to(tokens.dtype)
        z = self.down(self.norm(tokens + delta))
        record["scene"] = z.mean(dim=1)
        if self.fine is not None and grid is not None:
            record["detail"] = detail = self.fine.high_pass(z, grid)
            z = self.fine.add(z, detail)
        learnt: Tensor = self.up(F.gelu(z))
        return delta + learnt

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Calibrates patch tokens: (B, h*w, C) -> (B, h*w, C); arguments as in `delta`."""
        return tokens + self.delta(tokens, grid)
