"""Ways to adapt one backbone. Each changes a Transformers DINOv2 in place and leaves trainable what it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from domain_generalization.peers.adaptformer import add_adaptformer
from domain_generalization.peers.haar import add_haar_tokens
from domain_generalization.peers.rein import add_rein
from domain_generalization.peers.vpt import add_prompts
from mgfc import MGFCConfig, wrap_backbone
from mgfc.calibrators import LowRank


def linears(vit: nn.Module) -> list[str]:
    """Names of the linear layers of all blocks."""
    return [name for name, module in vit.named_modules() if name.startswith("encoder.") and isinstance(module, nn.Linear)]


def attention(vit: nn.Module) -> list[str]:
    """Names of the linear layers that make queries, keys and values, whose names differ between versions of Transformers."""
    return [name for name in linears(vit) if name.rpartition(".")[2] in ("query", "key", "value", "q_proj", "k_proj", "v_proj")]


def frozen(vit: nn.Module) -> None:
    vit.requires_grad_(False)


def full(vit: Any) -> None:
    vit.requires_grad_(True)
    vit.embeddings.mask_token.requires_grad_(False)


def lora_attention(vit: nn.Module, rank: int = 8) -> None:
    """LoRA on queries, keys and values (arXiv 2106.09685), by `peft`."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=attention(vit)), vit)


def lora_all(vit: nn.Module, rank: int = 8) -> None:
    """LoRA on every linear layer of the blocks, by `peft`."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears(vit)), vit)


def dora_all(vit: nn.Module, rank: int = 8) -> None:
    """DoRA, weight-decomposed LoRA (arXiv 2402.09353), on every linear layer of the blocks, by `peft`."""
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears(vit), use_dora=True), vit)


def soma(vit: Any, rank: int = 8) -> None:
    """SoMA (arXiv 2412.04077): LoRA that starts as the minor singular components of each weight, which leave the weight.

    The backbone's function is unchanged at first: W = (W - B A) + B A.
    """
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linears(vit)), vit)
    for layer in vit.modules():
        if hasattr(layer, "lora_A"):
            weight = layer.base_layer.weight.data
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            root = s[-rank:].sqrt()
            layer.lora_A["default"].weight.data = root[:, None] * vh[-rank:]
            layer.lora_B["default"].weight.data = u[:, -rank:] * root
            weight -= layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data


def rein(vit: Any) -> None:
    """Rein's low-rank tokens (arXiv 2312.04265)."""
    add_rein(vit, vit.encoder.layer)


def adaptformer(vit: Any) -> None:
    """AdaptFormer (arXiv 2205.13535)."""
    add_adaptformer(vit, vit.encoder.layer)


def vpt_deep(vit: Any) -> None:
    """VPT-deep (arXiv 2203.12119)."""
    add_prompts(vit, vit.encoder.layer)


def haar(vit: Any) -> None:
    """Tokens for low and high Haar frequencies, after FADA's idea (NeurIPS 2024)."""
    add_haar_tokens(vit, vit.encoder.layer, vit.config.patch_size)


def mgfc(vit: nn.Module, **config: Any) -> None:
    wrap_backbone(vit, MGFCConfig.from_dict(config))


def mgfc_patches(vit: nn.Module, **config: Any) -> None:
    """Mgfc with low-rank adapters on the patch tokens alone, without the class token."""
    mgfc(vit, **config)
    for module in vit.modules():
        if isinstance(module, LowRank):
            module.register_forward_hook(_restore_class_token)


def _restore_class_token(module: nn.Module, args: tuple[Any, ...], adapted: Tensor) -> Tensor:
    """Of an adapter's second input, what the linear layer computed: (B, 1 + N, hidden)."""
    return torch.cat([args[1][:, :1], adapted[:, 1:]], dim=1)


def mgfc_lora(vit: nn.Module, **config: Any) -> None:
    """Mgfc's default calibrators, and LoRA on queries, keys and values beside them."""
    lora_attention(vit)
    mgfc(vit, **config)


METHODS: dict[str, Callable[..., None]] = {
    "frozen": frozen,
    "full": full,
    "lora_attention": lora_attention,
    "lora_all": lora_all,
    "dora_all": dora_all,
    "rein": rein,
    "adaptformer": adaptformer,
    "vpt_deep": vpt_deep,
    "haar": haar,
    "soma": soma,
    "mgfc": mgfc,
    "mgfc_patches": mgfc_patches,
    "mgfc_lora": mgfc_lora,
}
