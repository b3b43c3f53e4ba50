from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """A low-rank adapter beside a linear layer, LoRA's update (arXiv 2106.09685) with alpha = 2 r:

        H <- H + 2 F W_down W_up        F: input of the layer,  H: its output

    W_up is 0 at initialisation: the module starts as the identity. It holds its two matrices itself, without linear layers
    of its own, so that what adapts or quantises every linear layer of a model passes it by.

    Args:
        entry: channels of F.
        hidden: channels of H.
        rank: r.

    Examples:
        >>> LowRank(64, 256, 16)(torch.randn(2, 6 * 9, 64), torch.randn(2, 6 * 9, 256)).shape
        torch.Size([2, 54, 256])
    """

    # How far one step of an optimiser goes.
    SCALE = 2.0

    def __init__(self, entry: int, hidden: int, rank: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(entry)
        self.down = nn.Parameter(torch.empty(rank, entry).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(hidden, rank))

    def extra_repr(self) -> str:
        """Its sizes, for `print`."""
        return f"entry={self.down.shape[1]}, hidden={len(self.up)}, rank={len(self.down)}"

    def forward(
        self,
        tokens: Tensor,
        output: Tensor,
        channels: slice = slice(None),
        record: dict[str, Tensor] | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Adapts what the linear layer computed.

        Args:
            tokens: F, (..., entry).
            output: H or some channels of it, (..., channels).
            channels: which channels of H these are.
            record: receives "scene", the mean of F W_down over the tokens of each image, (B, r).
            inplace: whether `output` may be written to, which saves a pass over the widest tensor of a block.

        Returns:
            H of these channels, (..., channels), in the dtype of `output`.
        """
        dtype = output.dtype
        reduced = tokens.to(dtype).flatten(0, -2) @ self.down.to(dtype).transpose(-2, -1)
        if record is not None:
            record["scene"] = reduced.view(len(tokens), -1, reduced.shape[-1]).mean(dim=1).to(self.down.dtype)
        up = self.up[channels].to(dtype)
        # Under autocast `reduced` may have another dtype, which is cast for addmm, but not for addmm_.
        add = Tensor.addmm_ if inplace and reduced.dtype == dtype else Tensor.addmm
        return add(output.flatten(0, -2), reduced, up.transpose(-2, -1), alpha=self.SCALE).view_as(output)

    def weight(self, channels: slice = slice(None)) -> Tensor:
        """What the adapter adds to the weight of the linear layer, or to some of its rows: (hidden, entry)."""
        return self.SCALE * self.up[channels] @ self.down
