from __future__ import annotations

from torch import Tensor, nn

from mgfc.calibrators.coarse import CoarseCalib
from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.linear import PlainLinear
from mgfc.calibrators.medium import MediumCalib


class CalibLayer(nn.Module):
    """The calibrator of one block: a low-rank adapter inside its feed-forward network, and stages from coarse to fine after it.

        H <- H + 2 F W_down W_up                            F: input of the network,  H: output of its first linear layer
        X <- coarse(X);   X <- medium(X);   X <- fine(X)    X: patch tokens that leave the block

    In training mode coarse and medium gather statistics of X and leave it as it is. W_up and the gate of the fine stage
    are 0 at initialisation and the statistics are empty: the layer starts as the identity. Source: `docs/method.md`,
    "The layer".

    Args:
        dim: channels C of the block's output tokens X.
        entry: channels of F.
        hidden: channels of H.
        rank: r of the low-rank adapter.
        coarse: a `CoarseCalib` of width C, or None.
        medium: a `MediumCalib` of width C, or None.
        fine: a `FineCalib` of width C, or None.

    Examples:
        >>> layer = CalibLayer(64, 64, 256, 16, fine=FineCalib(64))
        >>> layer.expand(layer.reduce(torch.randn(2, 6 * 9, 64))).shape
        torch.Size([2, 54, 256])
        >>> layer(torch.randn(2, 6 * 9, 64), (6, 9)).shape
        torch.Size([2, 54, 64])
    """

    # As of LoRA with alpha = 2 r: how far one step of an optimiser goes.
    SCALE = 2.0

    def __init__(
        self,
        dim: int,
        entry: int,
        hidden: int,
        rank: int,
        coarse: CoarseCalib | None = None,
        medium: MediumCalib | None = None,
        fine: FineCalib | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.down = PlainLinear(entry, rank, bias=False)
        self.up = PlainLinear(rank, hidden, bias=False, zero=True)
        self.coarse = coarse
        self.medium = medium
        self.fine = fine

    def reduce(self, tokens: Tensor) -> Tensor:
        """2 F W_down: (..., entry) -> (..., r)."""
        z: Tensor = self.down(tokens)
        return self.SCALE * z

    def expand(self, z: Tensor, channels: slice = slice(None)) -> Tensor:
        """What the low-rank adapter adds to some channels of H, by default to all: (..., r) -> (..., channels)."""
        h: Tensor = self.up(z, channels)
        return h

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None, record: dict[str, Tensor] | None = None) -> Tensor:
        """Runs the stages on the patch tokens that leave the block.

        Args:
            tokens: (B, N, C), in raster order if there is a grid.
            grid: (h, w) in patches, or None where the patches have no known places; the fine stage is skipped then.
            record: receives what the losses need in training: "similarity" (B, N, K), "share" (B, N).

        Returns:
            (B, N, C); the very tensor that came in where no stage had anything to do.
        """
        if self.coarse is not None:
            tokens = self.coarse(tokens)
        if self.medium is not None:
            tokens = self.medium(tokens)
            if record is not None:
                record["similarity"] = self.medium.similarity(tokens)
        if self.fine is not None and grid is not None:
            tokens = self.fine(tokens, grid, record)
        return tokens
