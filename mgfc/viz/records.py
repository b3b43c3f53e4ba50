"""What was measured of an image, as tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CoarseRecord:
    """What the coarse stage did.

    Args:
        picture: the calibrated image, (H, W, 3) in 0 to 1.
        before: t - t' of the image in standard deviations of the source, (2, C): of the means, and of the logarithms of
            the standard deviations of its channels.
        after: the same of the calibrated image.
    """

    picture: Tensor
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class MediumRecord:
    """What the medium stage did after one block.

    Args:
        assignment: A, how much each patch belongs to each category, (h, w, K).
        before: of each category, how far its centroid lies from its prototype, in standard deviations of the source, (K,).
        after: the same of the calibrated tokens, by the same assignment.
        moved: of each patch, how far its token was moved, in lengths of the token, (h, w).
    """

    assignment: Tensor
    before: Tensor
    after: Tensor
    moved: Tensor

    @property
    def shares(self) -> Tensor:
        """Of the image that each category fills: (K,), with sum 1."""
        return self.assignment.mean(dim=(0, 1))


@dataclass(frozen=True)
class FineRecord:
    """What the fine stage did after one block.

    Args:
        share: of the detail that each patch lets through, (h, w) in 0 to 1.
        added: what was added to each patch, in lengths of its token, (h, w).
    """

    share: Tensor
    added: Tensor


@dataclass(frozen=True)
class Record:
    """What calibration did to one image. Tensors are float32 on the CPU.

    Before is what the model computes with what its adapter learnt and without calibration by statistics; for an adapter
    without statistics, such as Rein's, it is the bare backbone. After is the model as it is.

    Args:
        picture: the image, (H, W, 3) in 0 to 1.
        baseline: what before is, in words.
        distance: how far the image lies from the source, as `Calibration.distance` says; None without a coarse stage
            that has statistics.
        coarse: of the coarse stage, or None.
        medium: of the medium stage, by the names of its blocks.
        fine: of the fine stage, by the names of its blocks.
        blocks: names of all blocks.
        learnt: how far what was learnt moved the patch tokens that leave each block, against the bare backbone, in lengths
            of the tokens; None if nothing is learnt.
        calibrated: the same of calibration by statistics, against what was learnt alone; None without such stages.
        features: patch tokens that leave the last block, before and after, (h, w, C) each.
        prediction: classes of the pixels, before and after, (H, W) each; None without `predict`.
        num_classes: K of the prediction; 0 without one.
    """

    picture: Tensor
    baseline: str
    distance: float | None
    coarse: CoarseRecord | None
    medium: dict[str, MediumRecord]
    fine: dict[str, FineRecord]
    blocks: tuple[str, ...]
    learnt: tuple[float, ...] | None
    calibrated: tuple[float, ...] | None
    features: tuple[Tensor, Tensor]
    prediction: tuple[Tensor, Tensor] | None
    num_classes: int
