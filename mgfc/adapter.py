"""One set of calibrators: what a training run trains, what a directory holds, what can be switched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mgfc.backbones.description import BlockWidths
from mgfc.calibrators import CalibLayer, CoarseCalib, FineCalib, MediumCalib, ReinCalib
from mgfc.calibrators.linear import PlainLinear
from mgfc.calibrators.low_rank import LowRank
from mgfc.calibrators.rein import ReinShared
from mgfc.calibrators.running import RunningMean, is_recomputing
from mgfc.config import AdapterConfig, FineConfig, MediumConfig, MGFCConfig, ReinConfig
from mgfc.distributed import is_replica, whole
from mgfc.errors import CalibrationError, ConfigError
from mgfc.layers import select_layers
from mgfc.losses import check_labels, coarse_loss, fine_loss, label_boundaries, label_mix, medium_loss

GRANULARITIES = ("coarse", "medium", "fine")
LOW_RANK = "low-rank"
STAGES = (LOW_RANK, *GRANULARITIES)


class _Records(dict[int, dict[str, Any]]):
    """Intermediate tensors of the last forward, by block. They are part of one graph, so copies and files start empty."""

    def __deepcopy__(self, memo: object) -> _Records:
        return _Records()

    def __reduce__(self) -> tuple[type[_Records], tuple[()]]:
        return _Records, ()


class Adapter(nn.Module):
    """The calibrators of one backbone's blocks and the heads of their losses; knows no hook.

    Args:
        config: what to put on which blocks.
        widths: of each block of the backbone.
        in_channels: of the images that it takes; None where it is given patches, which leaves the coarse stage out.

    Attributes:
        layers: `CalibLayer` by block index.
        coarse: the coarse stage, which is one for all blocks, or None.

    Raises:
        ConfigError: if the configuration does not fit the widths or their number.
    """

    def __init__(self, config: AdapterConfig, widths: Sequence[BlockWidths], in_channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.coarse: CoarseCalib | None = None
        self.presence: PlainLinear | None = None
        self.category: PlainLinear | None = None
        self.maps: ReinShared | None = None  # named as in files of format 1
        self._records = _Records()
        indices = select_layers(config.layers, len(widths), f"{type(config).__name__}.layers")
        if isinstance(config, ReinConfig):
            self._build_rein(config, indices, widths)
        else:
            self._build(config, indices, widths)
            if config.coarse is not None and in_channels is not None:
                self.coarse = CoarseCalib(in_channels, config.coarse.strength, config.coarse.randomise)
        self._parts = [part for part in self.modules() if part._parameters or part._buffers]

    def _build_rein(self, config: ReinConfig, indices: tuple[int, ...], widths: Sequence[BlockWidths]) -> None:
        dims = {widths[i].dim for i in indices}
        if len(dims) > 1:
            raise ConfigError(f"ReinConfig: expected blocks of one width, found {sorted(dims)}. Use MGFCConfig.")
        (dim,) = dims
        self.maps = shared = ReinShared(dim, config.use_softmax)
        layers = {str(i): ReinCalib(dim, shared, config.num_tokens, config.token_rank) for i in indices}
        self.layers = nn.ModuleDict(layers)

    def _build(self, config: MGFCConfig, indices: tuple[int, ...], widths: Sequence[BlockWidths]) -> None:
        narrowest = min(widths[i].entry for i in indices)
        if config.rank is not None and config.rank > narrowest:
            raise ConfigError(
                f"MGFCConfig.rank: expected at most {narrowest}, the narrowest input of the calibrated blocks' feed-forward "
                f"networks, found {config.rank}. Choose a smaller rank."
            )
        self.layers = nn.ModuleDict(_build_layers(config, indices, widths))
        num_classes, weights = config.num_classes or 0, config.loss_weights
        self.presence = PlainLinear(config.rank or 0, num_classes) if "coarse" in weights else None
        num_prototypes = config.medium.num_prototypes if config.medium else 0
        self.category = PlainLinear(num_prototypes, num_classes) if "medium" in weights else None

    @property
    def num_classes(self) -> int:
        """Categories of the labels; 0 if no loss needs them."""
        return getattr(self.config, "num_classes", None) or 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers, as quickly as every forward needs them."""
        own = [tensor for part in self._parts for tensor in (*part._parameters.values(), *part._buffers.values())]
        return [tensor for tensor in own if tensor is not None]

    @property
    def num_batches(self) -> int | None:
        """Batches in the running statistics; None if no stage has any."""
        counts = [math.ceil(mean.count) for mean in self.statistics]  # of a merge with an empty one, a fraction
        return min(counts) if counts else None

    @property
    def statistics(self) -> list[RunningMean]:
        """The running statistics of all stages."""
        return [part for part in self._parts if isinstance(part, RunningMean)]

    @property
    def is_observing(self) -> bool:
        """Whether the statistics are being gathered after training."""
        return any(mean.observing for mean in self.statistics)

    @property
    def is_observed(self) -> bool:
        """Whether the statistics were gathered after training, in one pass over the source."""
        return all(bool(mean.observed >= 1) for mean in self.statistics)

    @property
    def learnt(self) -> bool:
        """Whether the low-rank adapters are no longer as they were made; True if there are none."""
        ups = [whole(p.detach()) for name, p in self.named_parameters() if name.endswith("low_rank.up")]
        return not ups or any(bool(up.any()) for up in ups)

    @property
    def problem(self) -> str | None:
        """Why the adapter is not what a training should have made; None if it may be."""
        if not self.learnt:
            return "The low-rank adapters are as they were made, without an effect: nothing trained them."
        if self.num_batches == 0:
            return (
                "The calibrators' statistics have seen no batch, so that coarse and medium calibration have no effect. Gather "
                "them before you save: `with calibration.observing(): ...` over images of the source."
            )
        return None

    def count_stages(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Parameters of each block's stages, by block index."""
        for key, layer in self.layers.items():
            counts = dict.fromkeys(STAGES, 0)
            for name, parameter in layer.named_parameters():
                stage = name.split(".")[0]
                counts[stage if stage in GRANULARITIES else LOW_RANK] += parameter.numel()
            yield int(key), counts

    def start_record(self, index: int) -> None:
        """Forgets what an earlier forward left of a block."""
        if not is_recomputing():
            self._records.pop(index, None)

    def record(self, index: int) -> dict[str, Any] | None:
        """Where a forward leaves what the losses need of a block; None while none is needed.

        A recomputation computes it again, as checkpointing demands, and leaves it nowhere.
        """
        if not (self.training and torch.is_grad_enabled() and self.config.loss_weights):
            return None
        if is_replica(self):
            raise CalibrationError(
                "nn.DataParallel: expected a configuration without losses, whose tensors copies of a model cannot hand back. "
                "Use DistributedDataParallel."
            )
        return {} if is_recomputing() else self._records.setdefault(index, {})

    def losses(self, labels: Tensor, ignore_index: int = 255) -> dict[str, Tensor]:
        """The hierarchical losses, as `Calibration.losses` says."""
        weights = self.config.loss_weights
        if not weights or not self.training:
            return {}
        records = [record for record in self._records.values() if "batch" in record]  # of blocks that came to their end
        if not records:
            raise CalibrationError(
                "The losses expect a forward of the backbone in training mode, with gradients, before each call; found none "
                "since the last call. Call the backbone, then .loss(labels) once."
            )
        check_labels(labels, records[0]["batch"], self.num_classes, ignore_index)
        self._records.clear()
        functions = {"coarse": self._coarse_loss, "medium": self._medium_loss, "fine": self._fine_loss}
        return {name: weight * functions[name](records, labels, ignore_index) for name, weight in weights.items()}

    def _coarse_loss(self, records: list[dict[str, Any]], labels: Tensor, ignore_index: int) -> Tensor:
        assert self.presence is not None
        scenes = [rearrange(r["scene"], "(b w) r -> b w r", b=r["batch"]).mean(dim=1) for r in records if "scene" in r]
        logits = [self.presence(scene) for scene in scenes]  # a batch axis may hold windows
        return coarse_loss(torch.stack(logits), labels, ignore_index) if logits else self.presence.weight.sum() * 0

    def _medium_loss(self, records: list[dict[str, Any]], labels: Tensor, ignore_index: int) -> Tensor:
        assert self.category is not None
        dtype = self.category.weight.dtype
        placed = [record for record in records if "similarity" in record and record["grid"] is not None]
        mixes = {grid: label_mix(labels, grid, self.num_classes, ignore_index) for grid in {r["grid"] for r in placed}}
        terms = [medium_loss(self.category(r["similarity"].softmax(dim=-1).to(dtype)), mixes[r["grid"]]) for r in placed]
        return torch.stack(terms).mean() if terms else self.category.weight.sum() * 0

    def _fine_loss(self, records: list[dict[str, Any]], labels: Tensor, ignore_index: int) -> Tensor:
        placed = [record for record in records if "share" in record]
        targets = {grid: label_boundaries(labels, grid, ignore_index) for grid in {r["grid"] for r in placed}}
        terms = [fine_loss(r["share"], targets[r["grid"]]) for r in placed]
        return torch.stack(terms).mean() if terms else torch.zeros((), device=labels.device)


def _build_layers(config: MGFCConfig, indices: tuple[int, ...], widths: Sequence[BlockWidths]) -> dict[str, nn.Module]:
    def chosen(name: str, stage: MediumConfig | FineConfig | None) -> tuple[int, ...]:
        where = f"MGFCConfig.{name}.layers"
        return () if stage is None else select_layers(stage.layers, len(widths), where, among=indices)

    medium, fine = config.medium, config.fine
    in_medium, in_fine = chosen("medium", medium), chosen("fine", fine)
    layers: dict[str, nn.Module] = {}
    for index in indices:
        if config.rank is None and index not in {*in_medium, *in_fine}:
            continue
        dim = widths[index].dim
        layers[str(index)] = CalibLayer(
            dim,
            None if config.rank is None else LowRank(*widths[index][1:], config.rank),
            MediumCalib(dim, medium.num_prototypes, medium.temperature, medium.strength, medium.threshold)
            if medium and index in in_medium
            else None,
            FineCalib(dim, fine.kernel_size) if fine and index in in_fine else None,
        )
    return layers
