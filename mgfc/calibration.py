"""The calibrators of one backbone: the hooks that run them, their losses, what they are and whether they work."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mgfc.backbones.description import block_width, max_extra_tokens, token_orders
from mgfc.backbones.detection import Tower
from mgfc.backbones.grid import Grid, GridTracker, first_tensor, stem_hooks, tag
from mgfc.backbones.layout import PatchView, padding, pick_tensor, put_tensor, view_patches
from mgfc.calibrators import CalibLayer, CoarseCalib, FineCalib, MediumCalib
from mgfc.calibrators.running import RunningMean, is_recomputing, keep_read
from mgfc.config import CoarseConfig, FineConfig, MediumConfig, MGFCConfig, select_layers
from mgfc.errors import CalibrationError, ConfigError
from mgfc.losses import check_labels, coarse_loss, fine_loss, label_boundaries, label_mix, medium_loss

T = TypeVar("T")


@dataclass(frozen=True)
class BlockReport:
    """What one calibrated block saw in a forward.

    Args:
        name: the block's name in the backbone.
        shape: of the block's tensor.
        grid: (h, w) of its patches, or None where it has none.
        num_patches: patches refined in each image.
        leading: extra tokens before the patches, passed through.
        trailing: extra tokens after them, passed through.
        changed: whether refinement changed the tensor; False in a fresh calibration.
    """

    name: str
    shape: tuple[int, ...]
    grid: Grid | None
    num_patches: int
    leading: int
    trailing: int
    changed: bool

    def __str__(self) -> str:
        grid = "no grid, fine stage skipped" if self.grid is None else f"grid {self.grid[0]} x {self.grid[1]}"
        extra = f"{self.leading} leading and {self.trailing} trailing tokens passed through"
        return f"{self.name}: {self.num_patches} patches, {grid}, {extra}, {'refined' if self.changed else 'unchanged'}"


class _Records(dict[int, dict[str, Any]]):
    """Intermediate tensors of the last forward, by block. They are part of one graph, so copies and files start empty."""

    def __deepcopy__(self, memo: object) -> _Records:
        return _Records()

    def __reduce__(self) -> tuple[type[_Records], tuple[()]]:
        return _Records, ()


class Calibration(nn.Module):
    """The trainable calibrators of one backbone, reached as `backbone.calibration`.

    `wrap_backbone` makes it; its parameters are what a user's loop trains. It refines the patch tokens that leave each
    calibrated block, whoever calls the block, and changes nothing else.

    Args:
        tower: the backbone.
        config: what to put on it.

    Raises:
        ConfigError: if the configuration does not fit the backbone's width or depth.
    """

    def __init__(self, tower: Tower, config: MGFCConfig) -> None:
        super().__init__()
        blocks = tower.modules()
        self.config = config
        self.block_names = tower.blocks
        self.dims = tuple(block_width(block) for block in blocks)
        self.enabled = True
        indices = select_layers(config.layers, len(blocks), "MGFCConfig.layers")
        if config.rank > min(self.dims[i] for i in indices):
            raise ConfigError(
                f"MGFCConfig.rank: expected at most {min(self.dims[i] for i in indices)}, the width of the backbone's "
                f"narrowest calibrated block, found {config.rank}. Choose a smaller rank."
            )
        self.layers = nn.ModuleDict(_build_layers(config, indices, self.dims))
        num_classes, weights = config.num_classes or 0, config.loss_weights
        self.presence = nn.Linear(config.rank, num_classes) if "coarse" in weights else None
        num_prototypes = config.medium.num_prototypes if config.medium else 0
        self.category = nn.Linear(num_prototypes, num_classes) if "medium" in weights else None
        self.boundary = nn.Linear(config.rank, 1) if "fine" in weights else None
        self._orders = token_orders(tower)
        self._tracker = GridTracker(max_extra_tokens(tower))
        self._records = _Records()
        self._reports: dict[int, BlockReport] | None = None
        self._handles: list[Any] = []
        self._frozen_names: tuple[str, ...] = ()
        self._frozen_norms: list[nn.Module] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        """Within a copy of the backbone, belongs to that copy; copied alone, holds the parameters and no backbone."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = dict(self.__dict__)
        if id(state.get("_backbone")) not in memo:
            state.pop("_backbone", None)
            state |= {"_handles": [], "_frozen_norms": [], "_orders": []}
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin

    @property
    def backbone(self) -> nn.Module:
        """The module that this calibration is attached to."""
        if "_backbone" not in self.__dict__:
            raise CalibrationError("This calibration is not attached to a backbone; wrap_backbone attaches it.")
        return self.__dict__["_backbone"]  # type: ignore[no-any-return]

    @property
    def tower(self) -> Tower:
        """The backbone and its blocks."""
        return Tower(self.backbone, "", self.block_names)

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the calibrators."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_batches(self) -> int | None:
        """Training batches in the running statistics; None if no stage has any. They count in training mode alone."""
        counts = [int(module.count) for module in self.modules() if isinstance(module, RunningMean)]
        return min(counts) if counts else None

    def attach(self, tower: Tower) -> None:
        """Registers the hooks on a tower's blocks and around its stem."""
        self.__dict__["_backbone"] = tower.root
        self._handles = stem_hooks(tower.root, tower.blocks, self._tracker)
        for key in self.layers:
            block = tower.root.get_submodule(tower.blocks[int(key)])
            hook = functools.partial(self._refine_block, int(key))
            # Transformers captures feature maps by hooks of its own: ours has to run before them.
            self._handles.append(block.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def forward(self, x: T) -> T:
        """Returns its input: containers that run their children in order, as timm's `FeatureListNet`, pass through."""
        return x

    def detach(self) -> None:
        """Removes the hooks again and gives back the `requires_grad` flags that `freeze` took."""
        for handle in self._handles:
            handle.remove()
        parameters = dict(self.backbone.named_parameters())
        for name in self._frozen_names:
            if name in parameters:
                parameters[name].requires_grad_(True)
        for norm in self._frozen_norms:
            norm.train(self.backbone.training)
        del self.__dict__["_backbone"]

    def freeze(self) -> None:
        """Freezes the backbone's parameters, except those of PEFT adapters in it, and its BatchNorm statistics."""
        keep = _adapter_parameters(self.backbone) | {id(p) for p in self.parameters()}
        names = []
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad and id(parameter) not in keep:
                parameter.requires_grad_(False)
                names.append(name)
        self._frozen_names = tuple(names)
        self._frozen_norms = [module for module in self.backbone.modules() if isinstance(module, _BatchNorm)]
        for norm in self._frozen_norms:
            norm.eval()

    def train(self, mode: bool = True) -> Calibration:
        """Sets the calibrators' mode; the frozen backbone's BatchNorm layers stay in eval mode whoever sets theirs."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def _refine_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.enabled:
            return None
        tensor = pick_tensor(output)
        if tensor is None:
            raise self._error(index, f"expected tokens from the block, found {type(output).__name__}")
        layer = cast(CalibLayer, self.layers[str(index)])
        try:
            view = view_patches(tensor, self.dims[index], self._orders[index], self._tracker, args, kwargs, output)
        except ValueError as error:
            raise self._error(index, str(error)) from None
        record = self._new_record(index, view)
        entry = first_tensor(args, kwargs)
        if entry is not None:
            keep_read(layer, entry)
        mask = padding(args, kwargs, tensor.shape[1]) if view.grid is None and tensor.ndim == 3 else None
        patches = view.patches.to(layer.norm.weight.dtype)
        if mask is None:
            delta = layer.delta(patches, view.grid, record)
        else:
            delta = _padded_delta(layer, patches, mask[:, view.leading :])
        refined = tensor + view.like_block(view.scatter(delta)).to(tensor.dtype)
        tag(view.grid, entry, refined)
        if self._reports is not None:
            self._reports[index] = self._report(index, tensor, refined, view)
        return put_tensor(output, tensor, refined)

    def _new_record(self, index: int, view: PatchView) -> dict[str, Any] | None:
        recording = self.training and torch.is_grad_enabled() and bool(self.config.loss_weights)
        if not recording or is_recomputing():
            return None
        self._records[index] = record = {"grid": view.grid, "batch": len(view.patches)}
        return record

    def _report(self, index: int, tensor: Tensor, refined: Tensor, view: PatchView) -> BlockReport:
        changed = not torch.equal(tensor, refined)
        num_patches = view.patches.shape[1]
        name = self.block_names[index]
        return BlockReport(name, tuple(tensor.shape), view.grid, num_patches, view.leading, view.trailing, changed)

    def _error(self, index: int, problem: str) -> CalibrationError:
        return CalibrationError(
            f"Block {self.block_names[index]!r} of {type(self.backbone).__name__}: {problem}. "
            "Leave the block out with MGFCConfig(layers=...) or name other blocks with wrap_backbone(..., blocks=...)."
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the backbone computes what it would without calibrators."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def losses(self, labels: Tensor, ignore_index: int = 255) -> dict[str, Tensor]:
        """The hierarchical losses of the last forward, each already times its weight, averaged over the blocks.

        Frees the intermediate tensors that the losses need.

        Args:
            labels: (B, H, W) integer class ids of the images of the last forward, at any resolution.
            ignore_index: id of pixels that do not count.

        Returns:
            Scalars by granularity: those of "coarse", "medium" and "fine" whose weight is above 0. In eval mode nothing
            is recorded, and the dict is empty.

        Raises:
            LabelError: if labels have a wrong shape, dtype or class id.
            CalibrationError: in training mode, if no forward came before.
        """
        weights = self.config.loss_weights
        if not weights or not self.training:
            return {}
        if not self._records:
            raise CalibrationError(
                "The losses expect a forward of the backbone in training mode, with gradients, before each call; found none "
                "since the last call. Call the backbone, then .loss(labels) once."
            )
        records = list(self._records.values())
        check_labels(labels, records[0]["batch"], self.config.num_classes or 0, ignore_index)
        self._records.clear()
        functions = {"coarse": self._coarse_loss, "medium": self._medium_loss, "fine": self._fine_loss}
        return {name: weight * functions[name](records, labels, ignore_index) for name, weight in weights.items()}

    def loss(self, labels: Tensor, ignore_index: int = 255) -> Tensor:
        """The sum of `losses`: a scalar to add to the task's loss; 0 with all weights at 0 and in eval mode."""
        device = next(self.parameters()).device
        return sum(self.losses(labels, ignore_index).values(), start=torch.zeros((), device=device))

    def _coarse_loss(self, records: list[dict[str, Any]], labels: Tensor, ignore_index: int) -> Tensor:
        assert self.presence is not None
        logits = [self.presence(record["scene"]) for record in records if "scene" in record]
        return coarse_loss(torch.stack(logits), labels, ignore_index) if logits else self.presence.weight.sum() * 0

    def _medium_loss(self, records: list[dict[str, Any]], labels: Tensor, ignore_index: int) -> Tensor:
        assert self.category is not None and self.config.num_classes is not None
        placed = [record for record in records if "similarity" in record and record["grid"] is not None]
        mixes = {grid: label_mix(labels, grid, self.config.num_classes, ignore_index) for grid in {r["grid"] for r in placed}}
        terms = [medium_loss(self.category(r["similarity"].softmax(dim=-1)), mixes[r["grid"]]) for r in placed]
        return torch.stack(terms).mean() if terms else self.category.weight.sum() * 0

    def _fine_loss(self, records: list[dict[str, Any]], labels: Tensor, ignore_index: int) -> Tensor:
        assert self.boundary is not None
        placed = [record for record in records if "detail" in record]
        targets = {grid: label_boundaries(labels, grid, ignore_index) for grid in {r["grid"] for r in placed}}
        terms = [fine_loss(self.boundary(r["detail"].abs()).squeeze(-1), targets[r["grid"]]) for r in placed]
        return torch.stack(terms).mean() if terms else self.boundary.weight.sum() * 0

    @torch.no_grad()
    def check(self, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> list[BlockReport]:
        r"""Runs one forward and reports what each calibrated block saw.

        Args:
            *args: of the forward.
            model: what to call; None for the backbone. Give the host model to learn whether the host reaches every block.
            **kwargs: of the forward.

        Returns:
            One report a block, in order; `print(*reports, sep="\n")` shows them.

        Raises:
            CalibrationError: naming the blocks that the forward did not call.
        """
        model = self.backbone if model is None else model
        modes = {module: module.training for module in model.modules()}
        self._reports = {}
        try:
            model.eval()
            model(*args, **kwargs)
            reports = self._reports
        finally:
            self._reports = None
            for module, mode in modes.items():
                module.training = mode
        missing = [self.block_names[int(key)] for key in self.layers if int(key) not in reports]
        if missing:
            raise CalibrationError(
                f"{type(model).__name__}: expected every calibrated block to be called, found that these were not: "
                f"{', '.join(missing)}. The model skips them or runs their parts itself, so that their calibrators have no "
                "effect. Leave them out with MGFCConfig(layers=...), or call the blocks."
            )
        return [reports[index] for index in sorted(reports)]

    def summary(self) -> str:
        """A table of trainable parameters per block and granularity, their share of the backbone, and batches seen."""
        rows = [(self.block_names[int(key)], _count_stages(layer)) for key, layer in self.layers.items()]
        shared = sum(p.numel() for n, p in self.named_parameters() if not n.startswith("layers."))
        columns = ("bottleneck", "coarse", "medium", "fine")
        width = max([len(name) for name, _ in rows] + [len("shared")])
        lines = ["  ".join([" " * width, *(f"{column:>10}" for column in columns)])]
        lines += ["  ".join([f"{name:<{width}}", *(f"{counts[c]:>10,}" for c in columns)]) for name, counts in rows]
        lines.append(f"{'shared':<{width}}  {shared:>10,}  (heads of the losses)")
        own = self.num_parameters
        backbone = sum(p.numel() for p in self.backbone.parameters()) - own
        lines.append(f"{own:,} parameters, {100 * own / backbone:.2f} % of the backbone's {backbone:,}")
        if self.num_batches is not None:
            lines.append(f"statistics of {self.num_batches} training batches")
        return "\n".join(lines)

    def save_pretrained(self, directory: str | os.PathLike[str], *, head: nn.Module | None = None, **card: Any) -> None:
        """Writes the adapter into a directory; arguments as in `mgfc.checkpoint.save_pretrained`."""
        from mgfc.checkpoint import save_pretrained

        save_pretrained(self, directory, head=head, **card)

    def push_to_hub(self, repo_id: str, *, head: nn.Module | None = None, **options: Any) -> str:
        """Uploads the adapter to the Hugging Face Hub; arguments and result as in `mgfc.hub.push_to_hub`."""
        from mgfc.hub import push_to_hub

        return push_to_hub(self, repo_id, head=head, **options)


def _build_layers(config: MGFCConfig, indices: tuple[int, ...], dims: tuple[int, ...]) -> dict[str, nn.Module]:
    def chosen(name: str, stage: CoarseConfig | MediumConfig | FineConfig | None) -> tuple[int, ...]:
        where = f"MGFCConfig.{name}.layers"
        return () if stage is None else select_layers(stage.layers, len(dims), where, among=indices)

    coarse, medium, fine = config.coarse, config.medium, config.fine
    in_coarse, in_medium, in_fine = chosen("coarse", coarse), chosen("medium", medium), chosen("fine", fine)
    layers: dict[str, nn.Module] = {}
    for index in indices:
        dim = dims[index]
        layers[str(index)] = CalibLayer(
            dim,
            config.rank,
            CoarseCalib(dim, coarse.strength) if coarse and index in in_coarse else None,
            MediumCalib(dim, medium.num_prototypes, medium.temperature, medium.strength)
            if medium and index in in_medium
            else None,
            FineCalib(config.rank, fine.kernel_size) if fine and index in in_fine else None,
        )
    return layers


def _padded_delta(layer: CalibLayer, patches: Tensor, valid: Tensor) -> Tensor:
    """What the layer adds to each image's real patches alone; padding stays as it is."""
    delta = torch.zeros_like(patches)
    for index in range(len(patches)):
        real = layer.delta(patches[index : index + 1, valid[index]], None)[0]
        delta[index, valid[index]] = real.to(delta.dtype)
    return delta


def _adapter_parameters(backbone: nn.Module) -> set[int]:
    """Parameters that PEFT put into a backbone: everything under a tuner layer except what it wraps."""
    found: set[int] = set()
    bases = {"BaseTunerLayer", "AuxiliaryTrainingWrapper"}
    tuners = tuple(cls for cls in set(map(type, backbone.modules())) if bases & {base.__name__ for base in cls.__mro__})
    for module in backbone.modules():
        if isinstance(module, tuners):
            wrapped = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
            base = {id(p) for p in wrapped.parameters()} if isinstance(wrapped, nn.Module) else set()
            found |= {id(p) for p in module.parameters() if id(p) not in base}
    return found


def _count_stages(layer: nn.Module) -> dict[str, int]:
    counts = dict.fromkeys(("bottleneck", "coarse", "medium", "fine"), 0)
    for name, parameter in layer.named_parameters():
        stage = name.split(".")[0]
        counts[stage if stage in counts else "bottleneck"] += parameter.numel()
    return counts
