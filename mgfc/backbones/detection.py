"""Finds the vision tower inside a model, and the transformer blocks inside the tower."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mgfc.backbones.exceptions import HOSTS, UNSUPPORTED
from mgfc.errors import UnsupportedBackboneError

_ATTENTION = re.compile(r"attn|attention|mhsa", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|intermediate|fc1|swiglu", re.IGNORECASE)
_NOT_PATCH_BLOCKS = re.compile(r"class|cls|token_only|post_network|decoder|pool", re.IGNORECASE)
_SEQUENCES = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True)
class Tower:
    """A vision transformer inside a model.

    Args:
        root: the module that embeds the image and owns the blocks.
        name: its name in the model; "" if it is the model.
        blocks: names of its transformer blocks relative to `root`, in order of execution.
    """

    root: nn.Module
    name: str
    blocks: tuple[str, ...]

    def modules(self) -> list[nn.Module]:
        """The blocks themselves."""
        return [self.root.get_submodule(name) for name in self.blocks]


def find_tower(model: nn.Module, blocks: str | Sequence[str] | None = None) -> Tower:
    """Finds the vision tower of a model and its transformer blocks, from structure alone: nothing is run.

    Args:
        model: a timm or Transformers vision model, or any host that contains one.
        blocks: a regular expression that block names must match in full, or the names themselves; None to detect them.

    Raises:
        UnsupportedBackboneError: if there is no such tower, more than one, or one whose tokens cannot be calibrated.
    """
    _reject_graphs(model)
    found = _named_blocks(model, blocks) if blocks is not None else _detect_blocks(model)
    if not found:
        raise UnsupportedBackboneError(
            f"{type(model).__name__}: expected a vision transformer, found no list of blocks with both attention and a "
            'feed-forward network. Name them yourself, e.g. wrap_backbone(model, blocks=r"encoder\\.layers\\.\\d+").'
        )
    root_name = _hugging_face_root(model, found)
    if root_name is None:
        root_name = _lowest_owner(model, found)
    root = model.get_submodule(root_name)
    prefix = root_name + "." if root_name else ""
    names = tuple(name.removeprefix(prefix) for name in found if name.startswith(prefix))
    _reject_unsupported(root)
    tower = Tower(root, root_name, names)
    _reject_sequence_first(tower)
    return tower


def _reject_graphs(model: nn.Module) -> None:
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())  # by model.compile()
    if is_compiled or any(cls.__name__ == "OptimizedModule" for cls in type(model).__mro__):
        raise UnsupportedBackboneError(
            "The model is already compiled, and hooks added after torch.compile are ignored. "
            "Wrap the original model first, then compile it."
        )
    if any(cls.__name__ in ("GraphModule", "ScriptModule") for cls in type(model).__mro__):
        raise UnsupportedBackboneError(
            f"{type(model).__name__}: expected a model with its transformer blocks as modules, found a traced graph, "
            "whose blocks are inlined. Wrap the original model (timm: feature_cls='getter' instead of 'fx')."
        )


def _reject_unsupported(root: nn.Module) -> None:
    for module in root.modules():
        reason = UNSUPPORTED.get(type(module).__name__)
        if reason is None and isinstance(module, nn.Conv3d):
            reason = "its stem is a 3-D convolution: a video model, or a packed vision-language tower"
        if reason is not None:
            raise UnsupportedBackboneError(
                f"{type(root).__name__}: expected one grid of patch tokens per image, but {reason}. "
                "See the page on supported backbones for models that work."
            )


def _reject_sequence_first(tower: Tower) -> None:
    for name, block in zip(tower.blocks, tower.modules(), strict=True):
        if any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in block.modules()):
            raise UnsupportedBackboneError(
                f"{type(tower.root).__name__}: expected blocks that take (B, N, C), found that {name} attends over the first "
                "axis (nn.MultiheadAttention with batch_first=False). Build it with batch_first=True, as open_clip does by "
                "default, or take timm's or Transformers' form of the same weights."
            )


def _named_blocks(model: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    if isinstance(blocks, str):
        try:
            pattern = re.compile(blocks)
        except re.error as error:
            raise UnsupportedBackboneError(f"blocks: expected a regular expression, found {blocks!r} ({error}).") from None
        return [name for name in names if pattern.fullmatch(name)]
    missing = [name for name in blocks if name not in names]
    if missing:
        raise UnsupportedBackboneError(f"{type(model).__name__} has no module named {missing[0]!r} (given in `blocks`).")
    return list(blocks)


def _detect_blocks(model: nn.Module) -> list[str]:
    candidates = []
    for list_name, container in model.named_modules():
        if isinstance(container, _SEQUENCES) and not _NOT_PATCH_BLOCKS.search(list_name):
            prefix = list_name + "." if list_name else ""
            candidates += [prefix + name for name, child in container.named_children() if _is_block(child)]
    outer = {name for name in candidates if any(other.startswith(name + ".") for other in candidates)}
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted((name for name in candidates if name not in outer), key=order.__getitem__)


def _is_block(module: nn.Module) -> bool:
    parts = [f"{name.rpartition('.')[2]} {type(child).__name__}" for name, child in module.named_modules() if name]
    return any(map(_ATTENTION.search, parts)) and any(map(_FEED_FORWARD.search, parts))


def has_image_stem(module: nn.Module, blocks: Sequence[str] = ()) -> bool:
    """Whether a convolution or a module named after patches stands outside the blocks (names relative to `module`)."""
    inside = tuple(name + "." for name in blocks)
    return any(
        isinstance(child, (nn.Conv2d, nn.Conv3d)) or "patch" in name.rpartition(".")[2].lower()
        for name, child in module.named_modules()
        if not (name + ".").startswith(inside)
    )


def _hugging_face_root(model: nn.Module, blocks: list[str]) -> str | None:
    """The innermost Transformers vision model that owns blocks and an image stem, if there is one.

    A model inside a `*Backbone` class gives way to it, whose own norms are part of the backbone.
    """
    owners: list[str] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if getattr(type(module), "main_input_name", "input_ids") == "input_ids" or type(module).__name__ in HOSTS:
            continue
        prefix = name + "." if name else ""
        inside = [block.removeprefix(prefix) for block in blocks if block.startswith(prefix)]
        if inside and has_image_stem(module, inside) and not any(_is_inside(name, backbone) for backbone in outer):
            owners.append(name)
            if any(cls.__name__ == "BackboneMixin" for cls in type(module).__mro__):
                outer.append(name)
    innermost = [name for name in owners if not any(other != name and _is_inside(other, name) for other in owners)]
    if len(innermost) > 1:
        raise UnsupportedBackboneError(
            f"{type(model).__name__}: expected one vision tower, found {len(innermost)}: {', '.join(innermost)}. "
            "Wrap one of them, e.g. wrap_backbone(model.get_submodule(name))."
        )
    return innermost[0] if innermost else None


def _is_inside(name: str, owner: str) -> bool:
    return not owner or name.startswith(owner + ".")


def _lowest_owner(model: nn.Module, blocks: list[str]) -> str:
    """The innermost module with a forward of its own that holds every block and an image stem."""
    parts = blocks[0].split(".")[:-1]
    while parts and not all(_is_inside(name, ".".join(parts)) for name in blocks):
        parts.pop()
    while parts:
        name = ".".join(parts)
        module = model.get_submodule(name)
        inside = [block.removeprefix(name + ".") for block in blocks]
        if not isinstance(module, _SEQUENCES) and has_image_stem(module, inside):
            return name
        parts.pop()
    text = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and "token" in name]
    if text:
        raise UnsupportedBackboneError(
            f"{type(model).__name__}: expected one vision tower, found text beside it ({text[0]}). "
            "Wrap the vision tower itself, e.g. wrap_backbone(model.visual)."
        )
    return ""
