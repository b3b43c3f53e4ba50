"""Ways to adapt a backbone. Each changes it in place and leaves trainable what it trains."""

from __future__ import annotations

import re
from collections.abc import Callable

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mgfc import ReinConfig, wrap_backbone

# Behind the last block, or only for masked images: nothing that a head sees depends on them.
UNUSED = re.compile(r"(norm|fc_norm|layernorm|head)\..*|.*mask_token")


def frozen(vit: nn.Module) -> None:
    vit.requires_grad_(False)


def full(vit: nn.Module) -> None:
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(UNUSED.fullmatch(name) is None)


def lora(vit: nn.Module, rank: int = 16) -> None:
    """LoRA (arXiv 2106.09685) on every linear layer of the blocks, by `peft`, with SoMA's rank and scale."""
    linear = [name for name, module in vit.named_modules() if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), vit)


def rein(vit: nn.Module) -> None:
    """Rein's low-rank tokens (arXiv 2312.04265), without its link to the head's queries."""
    wrap_backbone(vit, ReinConfig())


def mgfc(vit: nn.Module) -> None:
    wrap_backbone(vit)


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "frozen": frozen,
    "full": full,
    "lora": lora,
    "rein": rein,
    "mgfc": mgfc,
}
