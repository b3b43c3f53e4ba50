"""What can be told of a tower without running it: widths, extra tokens, patch size, a fingerprint of its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mgfc.backbones.detection import Tower
from mgfc.backbones.exceptions import TRAILING
from mgfc.backbones.layout import MaskUnitOrder, Order, RasterOrder, WindowOrder
from mgfc.backbones.tuners import own_modules
from mgfc.distributed import at_hand, whole
from mgfc.errors import UnsupportedBackboneError

_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|intermediate|^output|fc\d|swiglu", re.IGNORECASE)
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_POSITION = re.compile("pos|cpb|meta_mlp", re.IGNORECASE)
_EXTRA_TOKEN = re.compile(r"(cls|class|dist|reg|query|queries|detection)\w*|\w+_tokens?$", re.IGNORECASE)
_NOT_EXTRA_TOKEN = re.compile(r"mask|pos|type|segment", re.IGNORECASE)
_PREFIX_TOKEN = re.compile(r"(cls|class|dist|reg|storage)\w*(token|embedding)|(cls|class)_?(token|embed)", re.IGNORECASE)


def _feed_forward_linears(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers of a block's feed-forward network, in order; the block's last one where none is named so."""
    linears = [
        (name, module)
        for name, module in own_modules(block)
        if ("out_features" in vars(module) or "out_channels" in vars(module))
        and (weight := weight_of(module)) is not None
        and weight.ndim in (2, 4)
    ]
    if not linears:
        raise UnsupportedBackboneError(f"{type(block).__name__}: expected a block with linear layers, found none.")
    named = [(name, m) for name, m in linears if _last(_FEED_FORWARD, name) > _last(_ATTENTION, name)]
    return [(name, m) for name, m in named if not _POSITION.search(name)] or linears[-1:]


def weight_of(module: Any) -> Tensor | None:
    """The weight of a linear layer; PyTorch's quantised ones give it when called."""
    weight = getattr(module, "weight", None)
    weight = weight() if callable(weight) and not isinstance(weight, Tensor) else weight
    return weight if isinstance(weight, Tensor) else None


def _last(pattern: re.Pattern[str], name: str) -> int:
    return max((match.start() for match in pattern.finditer(name)), default=-1)


def output_linear(block: nn.Module) -> nn.Module:
    """The last linear layer of a block's feed-forward network, whose output width is the block's own."""
    return _feed_forward_linears(block)[-1][1]


def first_linears(block: nn.Module) -> list[nn.Module]:
    """The linear layers that read the input of a block's feed-forward network: one, or a gate's and a value's."""
    return _first([module for _, module in _feed_forward_linears(block)])


def first_outputs(block: nn.Module) -> Iterator[tuple[nn.Module, slice]]:
    """The same layers, each with its place among the channels that they write together."""
    start = 0
    for module in first_linears(block):
        stop = start + linear_size(module)[1]
        yield module, slice(start, stop)
        start = stop


def _first(linears: list[nn.Module]) -> list[nn.Module]:
    first, *others = linears
    size = linear_size(first)
    return [first, *takewhile(lambda module: linear_size(module) == size, others[:-1])]


def linear_size(module: nn.Module) -> tuple[int, int]:
    """Channels that a linear layer or a convolution reads and writes."""
    linear: Any = module
    if hasattr(module, "in_features"):
        return int(linear.in_features), int(linear.out_features)
    return int(linear.in_channels), int(linear.out_channels)


class BlockWidths(NamedTuple):
    """Channels where calibrators work in a block.

    Args:
        dim: of the block's output tokens.
        entry: of its feed-forward network's input.
        hidden: of the outputs of the network's first linear layers, all together.
    """

    dim: int
    entry: int
    hidden: int


def block_widths(block: nn.Module) -> BlockWidths:
    """The widths of a block.

    Raises:
        UnsupportedBackboneError: if it holds no linear layer.
    """
    names, linears = zip(*_feed_forward_linears(block), strict=True)
    sizes = [linear_size(module) for module in _first(list(linears))]
    entry = sizes[0][0]
    # The experts of a mixture write a part of the channels each, but read all of them.
    dim = entry if any("expert" in name for name in names) else linear_size(linears[-1])[1]
    return BlockWidths(dim, entry, sum(hidden for _, hidden in sizes))


def _learnt_tokens(tower: Tower) -> dict[str, int]:
    """How many tokens each token-like parameter outside the blocks adds at most, by parameter name."""
    inside = tuple(name + "." for name in tower.blocks)
    counts = {}
    for name, parameter in tower.root.named_parameters():
        parts = name.split(".")
        own = parts[-1] if parts[-1] != "weight" else ".".join(parts[-2:-1])
        if name.startswith(inside) or not _EXTRA_TOKEN.fullmatch(own) or _NOT_EXTRA_TOKEN.search(own):
            continue
        counts[name] = 1 if parameter.ndim == 1 else int(parameter.shape[-2])
    return counts


def max_extra_tokens(tower: Tower) -> int:
    """The most tokens besides patches that a sequence of this tower can hold."""
    return max(sum(_learnt_tokens(tower).values()), num_prefix_tokens(tower))


def is_hierarchical(tower: Tower) -> bool:
    """Whether the blocks are of several widths, so that the grid may change between them."""
    return len({block_widths(block).dim for block in tower.modules()}) > 1


def num_prefix_tokens(tower: Tower) -> int:
    """Class, distillation and register tokens that stand before the patches, as the model declares them."""
    for module in tower.root.modules():
        declared = getattr(module, "num_prefix_tokens", None)
        if isinstance(declared, int):
            return declared
    trailing = _trailing_name(tower)
    names = _learnt_tokens(tower)
    return sum(n for name, n in names.items() if _PREFIX_TOKEN.search(name.split(".")[-1]) and trailing not in name)


def _trailing_name(tower: Tower) -> str:
    return TRAILING.get(type(tower.root).__name__, "\0")


def token_orders(tower: Tower) -> list[Order]:
    """How each block orders its sequence of tokens."""
    owner = next(
        (module for module in tower.root.modules() if hasattr(type(module), "reroll") or "reroll" in module._modules), None
    )
    if owner is not None:
        stages = [int(re.findall(r"\d+", name)[0]) for name in tower.blocks]
        return [MaskUnitOrder(owner, stage) for stage in stages]
    leading = num_prefix_tokens(tower)
    config = getattr(tower.root, "config", None)
    side = getattr(config, "num_windows_side", None) or getattr(config, "num_windows", None)
    if isinstance(side, int) and side > 1:
        return [WindowOrder(side, leading) for _ in tower.blocks]
    trailing = sum(n for name, n in _learnt_tokens(tower).items() if _trailing_name(tower) in name)
    return [RasterOrder(leading, trailing) for _ in tower.blocks]


def patch_size(tower: Tower) -> tuple[int, int] | None:
    """Height and width of a patch in pixels, as the model declares it; None if it does not."""
    config = getattr(tower.root, "config", None)
    for source in [*tower.root.modules(), config]:
        ratio = getattr(source, "feat_ratio", None)
        size = ratio() if callable(ratio) else getattr(source, "patch_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


@torch.no_grad()
def fingerprint(tower: Tower) -> list[float] | None:
    """One number a block that tells a backbone's weights: the norm of every 32nd row of its last linear layer.

    The same for every library's form of the same weights, and nearly so in another precision. None while these have no
    values.
    """
    norms = []
    for block in tower.modules():
        module: Any = output_linear(block)
        with at_hand(module):
            weight = whole(weight_of(module).detach())  # type: ignore[union-attr]
            if weight.is_meta:
                return None
            if weight.is_quantized or type(weight).__module__.startswith("torchao"):
                weight = weight.dequantize()
            norms.append(float(weight[::32].float().norm()))
    return [float(f"{norm:.6g}") for norm in norms]


def describe(tower: Tower) -> dict[str, Any]:
    """JSON-ready facts about a backbone, as an adapter's `config.json` keeps them."""
    root = tower.root
    widths = [block_widths(block).dim for block in tower.modules()]
    size = patch_size(tower)
    return {
        "library": type(root).__module__.partition(".")[0],
        "architecture": type(root).__name__,
        "base_model": _hub_id(root),
        "depth": len(widths),
        "embed_dim": widths[0] if len(set(widths)) == 1 else widths,
        "patch_size": None if size is None else list(size),
        "num_prefix_tokens": num_prefix_tokens(tower),
        "fingerprint": fingerprint(tower),
    }


def _hub_id(root: nn.Module) -> str | None:
    """The Hub repository that the backbone says it came from; never a local path."""
    cfg = getattr(root, "pretrained_cfg", None) or {}
    name = cfg.get("hf_hub_id") if isinstance(cfg, dict) else None
    if name == "timm/":
        name = f"timm/{cfg.get('architecture')}.{cfg.get('tag')}"
    name = name or getattr(getattr(root, "config", None), "name_or_path", None) or ""
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not os.path.exists(name) else None
