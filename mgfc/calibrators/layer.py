from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mgfc.calibrators.coarse import CoarseCalib
from mgfc.calibrators.fine import FineCalib
from mgfc.calibrators.medium import MediumCalib


class CalibLayer(nn.Module):
    """The bottleneck of one block and the stages inside it, from coarse to fine.

        Z = LayerNorm(X) W_down;   Z = fine(medium(coarse(Z)));   X <- X + gelu(Z) W_up

    W_up is 0 at initialisation: the layer starts as the identity. It has no bias, so that a token with zero Z, such as a
    class token, stays exactly as it was. Source: `docs/concepts.md`, "The bottleneck".

    Args:
        dim: channels C of the block's tokens.
        rank: bottleneck width r.
        coarse: a `CoarseCalib` of width r, or None.
        medium: a `MediumCalib` of width r, or None.
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
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, rank, bias=False)
        self.coarse = coarse
        self.medium = medium
        self.fine = fine
        self.up = nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def refine(
        self,
        tokens: Tensor,
        grid: tuple[int, int] | None,
        prototypes: Tensor | None = None,
        record: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """What goes into W_up: (B, N, C) -> (B, N, r).

        Args:
            tokens: (B, N, C) patch tokens, in raster order if there is a grid.
            grid: (h, w) in patches, or None where the patches have no known places; the fine stage is skipped then.
            prototypes: (K, r) shared by the blocks; None if the medium stage owns its own.
            record: takes what the losses need: "scene" (B, m, r), "similarity" (B, N, K), "detail" (B, N, r).
        """
        record = {} if record is None else record
        z = self.down(self.norm(tokens))
        if self.coarse is not None:
            record["scene"] = scene = self.coarse.scene(z)
            z = self.coarse.read(z, scene)
        if self.medium is not None:
            prototypes = self.medium.prototypes if prototypes is None else prototypes
            assert prototypes is not None
            record["similarity"] = similarity = self.medium.similarity(z, prototypes)
            z = self.medium.draw(z, similarity, prototypes)
        if self.fine is not None and grid is not None:
            record["detail"] = detail = self.fine.high_pass(z, grid)
            z = self.fine.add(z, detail)
        return F.gelu(z)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None, prototypes: Tensor | None = None) -> Tensor:
        """Refines patch tokens: (B, h*w, C) -> (B, h*w, C); arguments as in `refine`."""
        delta: Tensor = self.up(self.refine(tokens, grid, prototypes))
        return tokens + delta
