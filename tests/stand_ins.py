"""Small stand-ins for vision transformers in their authors' own code, which users have: the same names of modules, parameters
and attributes, and the same ways to call blocks. Written from descriptions; no code of theirs is in here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DIM, PATCH, DEPTH = 32, 8, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        shape = x.shape
        q, k, v = self.qkv(x.reshape(shape[0], -1, DIM)).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        if rope is not None:  # of the patches alone, which stand last
            q, k = (torch.cat([t[..., : -len(rope), :], t[..., -len(rope) :, :] * rope], dim=2) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape))


class Mlp(nn.Module):
    def __init__(self, names: tuple[str, str] = ("fc1", "fc2")) -> None:
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Linear(DIM, 2 * DIM))
        setattr(self, names[1], nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.names)
        return second(F.gelu(first(x)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Of dinov2, dinov3 and segment-anything, whose tokens are maps."""

    def __init__(self, mlp: tuple[str, str] = ("fc1", "fc2")) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(DIM), Attention(), LayerScale()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(DIM), Mlp(mlp), LayerScale()

    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, flatten: bool) -> None:
        super().__init__()
        self.patch_size, self.flatten = (PATCH, PATCH), flatten
        self.proj = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).mT if self.flatten else x.permute(0, 2, 3, 1)


class DinoVisionTransformer(nn.Module):
    """dinov2's, with registers: learnt positions that are resized, an output that is a dict."""

    def __init__(self, num_register_tokens: int = 4) -> None:
        super().__init__()
        self.embed_dim = self.num_features = DIM
        self.num_tokens, self.n_blocks, self.num_heads, self.patch_size = 1, DEPTH, 2, PATCH
        self.num_register_tokens, self.chunked_blocks = num_register_tokens, False
        self.patch_embed = PatchEmbed(flatten=True)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 16, DIM))
        self.register_tokens = nn.Parameter(torch.randn(1, num_register_tokens, DIM)) if num_register_tokens else None
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, DIM))

    def prepare_tokens_with_masks(self, x: Tensor) -> Tensor:
        grid = x.shape[2] // PATCH, x.shape[3] // PATCH
        patches = self.patch_embed(x)
        maps = self.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
        patches = patches + F.interpolate(maps, size=grid, mode="bicubic").flatten(2).mT
        leading = [self.cls_token + self.pos_embed[:, :1], *([] if self.register_tokens is None else [self.register_tokens])]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in leading), patches], dim=1)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        x = self.prepare_tokens_with_masks(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        extra = 1 + self.num_register_tokens
        return {"x_norm_clstoken": x[:, 0], "x_norm_regtokens": x[:, 1:extra], "x_norm_patchtokens": x[:, extra:]}

    def forward(self, x: Tensor, is_training: bool = False) -> Any:
        features = self.forward_features(x)
        return features if is_training else self.head(features["x_norm_clstoken"])


class ReinsDinoVisionTransformer(DinoVisionTransformer):
    """Rein's: a backbone of mmsegmentation, which returns maps of some blocks."""

    def __init__(self) -> None:
        super().__init__(num_register_tokens=0)
        self.out_indices = [0, 1, 2]

    def forward(self, x: Tensor) -> Any:
        grid = x.shape[2] // PATCH, x.shape[3] // PATCH
        x, maps = self.prepare_tokens_with_masks(x), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.out_indices:
                maps.append(x[:, 1:].mT.unflatten(2, grid))
        return tuple(maps)


class RopePositionEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("periods", torch.linspace(1, 3, DIM // 2))

    def forward(self, *, H: int, W: int) -> Tensor:  # noqa: N803
        places = torch.arange(H * W, device=self.periods.device).unsqueeze(1)
        return torch.cos(places / self.periods)


class DinoV3VisionTransformer(nn.Module):
    """dinov3's: storage tokens, rotary positions that are handed to each block."""

    def __init__(self, n_storage_tokens: int = 4) -> None:
        super().__init__()
        self.embed_dim = self.num_features = DIM
        self.n_blocks, self.num_heads, self.patch_size, self.n_storage_tokens = DEPTH, 2, PATCH, n_storage_tokens
        self.patch_embed, self.rope_embed = PatchEmbed(flatten=False), RopePositionEmbedding()
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM))
        self.storage_tokens = nn.Parameter(torch.randn(1, n_storage_tokens, DIM))
        self.mask_token = nn.Parameter(torch.zeros(1, DIM))
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(DIM)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        patches = self.patch_embed(x)
        height, width = patches.shape[1:3]
        leading = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.storage_tokens)]
        x = torch.cat([*leading, patches.flatten(1, 2)], dim=1)
        rope = self.rope_embed(H=height, W=width)
        for block in self.blocks:
            x = block(x, rope)
        extra = 1 + self.n_storage_tokens
        x = self.norm(x)
        return {"x_norm_clstoken": x[:, 0], "x_storage_tokens": x[:, 1:extra], "x_norm_patchtokens": x[:, extra:]}

    def forward(self, x: Tensor) -> Any:
        return self.forward_features(x)["x_norm_clstoken"]


DinoV3VisionTransformer.__name__ = "DinoVisionTransformer"  # as its authors call it, too


class ImageEncoderViT(nn.Module):
    """segment-anything's: tokens are maps with the channels last, a neck of convolutions behind."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = 32
        self.patch_embed = PatchEmbed(flatten=False)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, 4, DIM))
        self.blocks = nn.ModuleList(Block(("lin1", "lin2")) for _ in range(DEPTH))
        self.neck = nn.Sequential(nn.Conv2d(DIM, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class MultiScaleBlock(nn.Module):
    """sam2's: the first one of a stage halves the map and widens it."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.dim, self.dim_out = dim, dim_out
        self.norm1, self.attn = nn.LayerNorm(dim), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim_out), nn.Linear(dim_out, dim_out)
        self.norm2, self.mlp = nn.LayerNorm(dim_out), nn.Module()
        self.mlp.layers = nn.ModuleList([nn.Linear(dim_out, 2 * dim_out), nn.Linear(2 * dim_out, dim_out)])
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).flatten(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v).unflatten(1, x.shape[1:3])
        x = self.attn.proj(attended) + (x if self.proj is None else self.proj(x))
        if self.proj is not None:
            x = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        first, second = self.mlp.layers
        return x + second(F.gelu(first(self.norm2(x))))


class Hiera(nn.Module):
    """sam2's trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 7, 4, padding=3)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 7, 7))
        self.blocks = nn.ModuleList([MultiScaleBlock(16, 16), MultiScaleBlock(16, 32), MultiScaleBlock(32, 32)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed.proj(x)
        x = (x + F.interpolate(self.pos_embed, size=x.shape[2:], mode="bicubic")).permute(0, 2, 3, 1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x.permute(0, 3, 1, 2))
        return outputs


class ResidualAttentionBlock(nn.Module):
    """open_clip's."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(DIM), nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.ln_2 = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(DIM, 2 * DIM))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.layers = DIM, DEPTH
        self.resblocks = nn.ModuleList(ResidualAttentionBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    """open_clip's vision tower, `model.visual`."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid_size = (32, 48), (PATCH, PATCH), (4, 6)
        self.conv1 = nn.Conv2d(3, DIM, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(DIM))
        self.positional_embedding = nn.Parameter(torch.randn(1 + 24, DIM))
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(DIM), Transformer(), nn.LayerNorm(DIM)
        self.proj = nn.Parameter(torch.randn(DIM, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_post(self.transformer(self.ln_pre(x)))
        return x[:, 0] @ self.proj
