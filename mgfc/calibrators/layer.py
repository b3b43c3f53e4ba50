from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.calibrators.coarse import CoarseCalib
from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.medium import MediumCalib


class PartedLinear(nn.Linear):
    """A linear map without bias, of which some output channels can be asked for alone."""

    def forward(self, input: Tensor, channels: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., channels)."""
        return F.linear(input, self.weight[channels])


class CalibLayer(nn.Module):
    """The calibrator of one block: a bottleneck inside its feed-forward network, and stages, from coarse to fine, behind it.

        H <- H + 2 F W_down W_up                            F: what the network reads,  H: what its first map writes
        X <- coarse(X);   X <- medium(X);   X <- fine(X)    X: patch tokens that leave the block

    In training mode coarse and medium take X in and leave it as it is. W_up and the gate of the fine stage are 0 at
    initialisation and the statistics are empty: the layer starts as the identity. Source: `docs/method.md`, "The layer".

    Args:
        dim: channels C of the block's output tokens X.
        entry: channels of F.
        hidden: channels of H.
        rank: bottleneck width r.
        coarse: a `CoarseCalib` of width C, or None.
        medium: a `MediumCalib` of width C, or None.
        fine: a `FineCalib` of width C, or None.

    Examples:
        >>> layer = CalibLayer(64, 64, 256, 16, fine=FineCalib(64))
        >>> layer.widen(layer.bottleneck(torch.randn(2, 6 * 9, 64))).shape
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
        self.down = nn.Linear(entry, rank, bias=False)
        self.up = PartedLinear(rank, hidden, bias=False)
        nn.init.zeros_(self.up.weight)
        self.coarse = coarse
        self.medium = medium
        self.fine = fine

    def bottleneck(self, tokens: Tensor) -> Tensor:
        """2 F W_down, which `widen` maps to what the layer adds inside the block: (..., entry) -> (..., r)."""
        z: Tensor = self.down(tokens)
        return self.SCALE * z

    def widen(self, z: Tensor, channels: slice = slice(None)) -> Tensor:
        """What the layer adds to some channels of H, by default to all: (..., r) -> (..., channels)."""
        h: Tensor = self.up(z, channels)
        return h

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None, record: dict[str, Tensor] | None = None) -> Tensor:
        """Runs the stages on the patch tokens that leave the block.

        Args:
            tokens: (B, N, C), in raster order if there is a grid.
            grid: (h, w) in patches, or None where the patches have no known places; the fine stage is skipped then.
            record: takes what the losses need in training: "similarity" (B, N, K), "share" (B, N).

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
