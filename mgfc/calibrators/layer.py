from __future__ import annotations

import torch
from torch import Tensor, nn

from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.low_rank import LowRank
from mgfc.calibrators.medium import MediumCalib


class CalibLayer(nn.Module):
    """The calibrator of one block: a low-rank adapter inside its feed-forward network, and the stages after the block.

        H <- H + 2 F W_down W_up          F, H: input and output of the network's first linear layer, every token
        X <- medium(X);   X <- fine(X)    X: patch tokens that leave the block

    In training mode medium gathers statistics of X and leaves it as it is. W_up and the gate of the fine stage are 0 at
    initialisation and the statistics are empty: the layer starts as the identity. Source: `docs/method.md`, "The layer".

    Args:
        dim: channels C of the block's output tokens X.
        low_rank: a `LowRank` for the network's first linear layer, or None.
        medium: a `MediumCalib` of width C, or None.
        fine: a `FineCalib` of width C, or None.

    Examples:
        >>> layer = CalibLayer(64, LowRank(64, 256, 16), fine=FineCalib(64))
        >>> layer(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    def __init__(
        self,
        dim: int,
        low_rank: LowRank | None = None,
        medium: MediumCalib | None = None,
        fine: FineCalib | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.low_rank = low_rank
        self.medium = medium
        self.fine = fine

    @property
    def dtype(self) -> torch.dtype | None:
        """In which the stages compute; None for that of the tokens."""
        return None if self.fine is None else self.fine.gate.dtype

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None, record: dict[str, Tensor] | None = None) -> Tensor:
        """Runs the stages on the patch tokens that leave the block.

        Args:
            tokens: (B, N, C), in raster order if there is a grid.
            grid: (h, w) in patches, or None where the patches have no known places; the fine stage is skipped then.
            record: receives what the losses need in training: "similarity" (B, N, K), "share" (B, N).

        Returns:
            (B, N, C); the very tensor that came in where no stage had anything to do.
        """
        if self.medium is not None:
            tokens = self.medium(tokens)
            if record is not None:
                record["similarity"] = self.medium.similarity(tokens)
        if self.fine is not None and grid is not None:
            tokens = self.fine(tokens, grid, record)
        return tokens
