"""Tiny random instances of every supported backbone class, and what is true of each: the oracle of the tests.

The table knows nothing of mgfc. `test_zoo.py` proves each row with plain hooks on the bare model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

Grid = tuple[int, int]
TABLE_OF = {"timm": "1.0.31", "transformers": "5.24"}  # with these or newer ones every row can be built


@dataclass(frozen=True, eq=False)
class Case:
    """One backbone and the truth about its blocks; tuples hold one entry per block, in execution order."""

    name: str
    library: str
    family: str
    architecture: str
    tier: int
    build: Callable[..., nn.Module]
    image_size: Grid
    blocks: tuple[str, ...]
    grids: tuple[Grid | None, ...]
    dims: tuple[int, ...]
    leading: tuple[int, ...]
    trailing: tuple[int, ...]
    layout: str = "NLC"
    item: int | None = None
    kwargs: Mapping[str, Any] | Callable[[Tensor], Mapping[str, Any]] | None = None
    input_name: str = "pixel_values"
    dynamic: bool = False
    checkpointing: bool = True
    raster: bool = True
    features: tuple[str, ...] = ()
    note: str = ""

    @property
    def square_only(self) -> bool:
        return self.image_size[0] == self.image_size[1]

    def images(self, batch: int = 2, seed: int = 0, size: Grid | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, *(size or self.image_size), generator=generator)

    def call(self, model: nn.Module, images: Tensor, **extra: Any) -> Any:
        kwargs = self.kwargs(images) if callable(self.kwargs) else self.kwargs or {}
        if self.library == "timm":
            return model(kwargs.get("images", images), **extra)
        return model(**{self.input_name: images, **kwargs, **extra})

    def tokens(self, output: Any) -> Tensor:
        """The token tensor in what a block returned."""
        return output if self.item is None else output[self.item]


def cases(tier: int | None = None, library: str | None = None) -> tuple[Case, ...]:
    return tuple(c for c in CASES if tier in (None, c.tier) and library in (None, c.library))


def _seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _open_branches(_made(make, *args, **kwargs)).eval()


def _made(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """The model. With a library older than `TABLE_OF`, a test of a class that it does not have yet is skipped."""
    if all(Version(version(name)) >= Version(needed) for name, needed in TABLE_OF.items()):
        return make(*args, **kwargs)
    try:
        model = make(*args, **kwargs)
    except (AttributeError, ImportError, RuntimeError, TypeError) as error:
        pytest.skip(f"needs {TABLE_OF}: {error}")
    if make is _create and not hasattr(model, "forward_intermediates"):
        pytest.skip(f"needs {TABLE_OF} for forward_intermediates")
    if kwargs.get("dynamic_img_size") and getattr(model.patch_embed, "strict_img_size", False):
        pytest.skip(f"needs {TABLE_OF} for dynamic_img_size of this class")
    return model


def _open_branches(model: nn.Module) -> nn.Module:
    """Some classes start with norms of weight 0 at the end of residual branches, which no trained model has."""
    for module in model.modules():
        is_norm = isinstance(module, nn.LayerNorm) or type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
        if is_norm and module.weight is not None and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def _spread(value: Any, depths: tuple[int, ...]) -> tuple[Any, ...]:
    """One value for all blocks, or one for each run of blocks."""
    per_run = isinstance(value, list) or (isinstance(value, tuple) and not isinstance(value[0], int))
    runs = value if per_run else (value,) * len(depths)
    return tuple(v for v, n in zip(runs, depths, strict=True) for _ in range(n))


def _case(
    library: str,
    architecture: str,
    family: str,
    build: Callable[..., nn.Module],
    blocks: str | tuple[str, ...],
    size: Grid,
    grid: Any,
    dim: int | list[int],
    *,
    tag: str = "",
    tier: int = 1,
    depths: tuple[int, ...] = (3,),
    leading: int | list[int] = 0,
    trailing: int | list[int] = 0,
    **fields: Any,
) -> Case:
    """`blocks` is a template: `{s}` is the run (`{t}`, `{u}`: from 1, from 2), `{i}` the index in it, `{n}` overall."""
    places = [(s, i) for s, depth in enumerate(depths) for i in range(depth)]
    if isinstance(blocks, str):
        blocks = tuple(blocks.format(s=s, t=s + 1, u=s + 2, i=i, n=n) for n, (s, i) in enumerate(places))
    return Case(
        name="-".join(filter(None, (library, architecture, tag))),
        library=library,
        family=family,
        architecture=architecture,
        tier=tier,
        build=build,
        image_size=size,
        blocks=blocks,
        grids=_spread(grid, depths),
        dims=_spread(dim, depths),
        leading=_spread(leading, depths),
        trailing=_spread(trailing, depths),
        **fields,
    )


def _create(model_name: str, **kwargs: Any) -> nn.Module:
    """A timm model by name, or by "module.function:name" where the named entry point fixes the sizes."""
    import timm

    if ":" not in model_name:
        return timm.create_model(model_name, **kwargs)
    path, name = model_name.split(":")
    module, function = path.split(".")
    return getattr(import_module(f"timm.models.{module}"), function)(name, **kwargs)


def _timm(architecture: str, family: str, model_name: str, make: Mapping[str, Any], *args: Any, **fields: Any) -> Case:
    blocks = fields.pop("blocks", "blocks.{n}")
    fields = {"features": TIMM_FEATURES, **fields}
    return _case("timm", architecture, family, partial(_seeded, _create, model_name, **make), blocks, *args, **fields)


TIMM_FEATURES = ("forward_intermediates", "features_only")
VIT = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
ENCODER = {k: v for k, v in VIT.items() if k != "num_classes"}
DYNAMIC = VIT | {"dynamic_img_size": True}
S, L, G = (32, 48), (64, 96), (4, 6)


def _vitamin(**kwargs: Any) -> nn.Module:
    from timm.models.vitamin import VitCfg, VitConvCfg

    stem = VitCfg((16, 16, 32), (1, 1, 1), 16, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d")
    sizes = {"img_size": (64, 96), "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return _create("vitamin_small_224", embed_cfg=stem, **sizes, **kwargs)


def _mvit(use_cls_token: bool, **kwargs: Any) -> nn.Module:
    from timm.models import mvitv2

    cfg = mvitv2.MultiScaleVitCfg(depths=(1, 2, 1), embed_dim=16, num_heads=1, use_cls_token=use_cls_token)
    mvitv2.model_cfgs[f"zoo_{use_cls_token}"] = cfg
    return _create("mvitv2_tiny", cfg_variant=f"zoo_{use_cls_token}", img_size=(64, 64), num_classes=5, **kwargs)


def _naflex(images: Tensor) -> dict[str, Any]:
    """Two images of different grids as one padded NaFlex batch: a (3, 4) and a (2, 5) crop, in 12 tokens."""
    patches, coords = torch.zeros(len(images), 12, 8 * 8 * 3), torch.zeros(len(images), 12, 2, dtype=torch.long)
    valid = torch.zeros(len(images), 12, dtype=torch.bool)
    for n, image in enumerate(images):
        h, w = ((3, 4), (2, 5))[n % 2]
        cells = image[:, : 8 * h, : 8 * w].unflatten(1, (h, 8)).unflatten(3, (w, 8)).permute(1, 3, 2, 4, 0)
        patches[n, : h * w] = cells.reshape(h * w, -1)
        coords[n, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[n, : h * w] = True
    return {"images": {"patches": patches, "patch_coord": coords, "patch_valid": valid}}


_VIT = partial(_timm, "VisionTransformer")
_EVA = partial(_timm, "Eva")
# fmt: off
TIMM_TIER_1 = (
    _VIT("ViT", "vit_tiny_patch16_224", VIT, S, G, 32, leading=1, tag="cls"),
    _VIT("ViT", "vit_tiny_patch16_224", DYNAMIC, S, G, 32, leading=1, tag="dynamic", dynamic=True),
    _VIT("ViT", "vit_tiny_patch16_224", DYNAMIC | {"dynamic_img_pad": True}, (30, 48), G, 32, leading=1,
        tag="dynamic-pad", dynamic=True, note="the grid is rounded up"),
    _VIT("ViT (parallel blocks)", "vit_small_patch16_18x2_224", VIT, S, G, 32, leading=1, tag="parallel-things"),
    _VIT("ViT (parallel blocks)", "vit_pwee_patch16_reg1_gap_256", VIT, S, G, 32, leading=1, tag="parallel-scaling"),
    _VIT("ViT (parallel blocks)", "vit_base_patch16_xp_224", VIT, S, G, 32, leading=1, tag="parallel-xp"),
    _VIT("ViT (residual post-norm)", "vit_base_patch16_rpn_224", VIT, S, G, 32, tag="res-post-norm"),
    _VIT("ViT (registers)", "vit_medium_patch16_reg4_gap_256", VIT, S, G, 32, leading=4, tag="reg4"),
    _VIT("DeiT", "deit_tiny_patch16_224", VIT, S, G, 32, leading=1, tag="deit"),
    _VIT("DeiT III", "deit3_small_patch16_224", VIT, S, G, 32, leading=1, tag="deit3"),
    _VIT("FlexiViT", "flexivit_small", VIT, S, G, 32, leading=1, tag="flexivit"),
    _VIT("CLIP", "vit_base_patch16_clip_224", VIT, S, G, 32, leading=1, tag="clip"),
    _VIT("SigLIP", "vit_base_patch16_siglip_224", VIT, S, G, 32, tag="siglip"),
    _VIT("AIMv2", "aimv2_large_patch14_224", VIT, S, G, 32, tag="aimv2"),
    _VIT("BEiT3", "beit3_base_patch16_224", VIT, S, G, 32, leading=1, tag="beit3"),
    _VIT("InternViT", "vit_intern300m_patch14_448", VIT, S, G, 32, leading=1, tag="internvit"),
    _VIT("TIPSv2", "vit_base_patch14_reg1_tipsv2", VIT, S, G, 32, leading=2, tag="tipsv2"),
    _VIT("RADIO", "vit_base_patch16_radio_v3", DYNAMIC, S, G, 32, leading=8, tag="radio", dynamic=True),
    _VIT("DINOv2", "vit_small_patch14_dinov2", DYNAMIC | {"patch_size": 14, "img_size": 56}, (56, 84), G, 32, leading=1,
        tag="dinov2", dynamic=True),
    _VIT("DINOv2 (registers)", "vit_small_patch14_reg4_dinov2", DYNAMIC | {"patch_size": 14, "img_size": 56}, (56, 84),
        G, 32, leading=5, tag="dinov2-reg4", dynamic=True),
    _VIT("ViT (parallel blocks)", "vit_dpwee_patch16_reg1_gap_256", VIT, S, G, 32, leading=1, tag="parallel-diff"),
    _VIT("ViT (ResNet stem)", "vit_tiny_r_s16_p8_224", VIT | {"patch_size": 2}, S, G, 32, leading=1, tag="hybrid-r"),
    _VIT("ViT (ResNet stem)", "vit_small_r26_s32_224", VIT | {"patch_size": 1, "img_size": (64, 96)}, (64, 96), (2, 3),
        32, leading=1, tag="hybrid-r26"),
    _VIT("ViT (ResNet stem)", "vit_small_resnet26d_224", VIT | {"patch_size": 1, "img_size": (64, 96)}, (64, 96), (2,
        3), 32, leading=1, tag="hybrid-26d"),
    _VIT("MobileCLIP ViT", "vit_base_mci_224", VIT | {"patch_size": 1, "embed_dim": 768, "img_size": (64, 96)}, (64,
        96), G, 768, leading=1, tag="hybrid-mci"),
    _case("timm", "VisionTransformer", "ViTamin", partial(_seeded, _vitamin), "blocks.{n}", (64, 96), G, 32,
        tag="vitamin", features=TIMM_FEATURES),
    _timm("VisionTransformerDistilled", "DeiT (distilled)", "deit_tiny_distilled_patch16_224", VIT, S, G, 32,
        leading=2),
    _EVA("EVA", "eva_giant_patch14_224", VIT, S, G, 32, leading=1, tag="eva"),
    _EVA("EVA-02", "eva02_tiny_patch14_224", DYNAMIC, S, G, 32, leading=1, tag="eva02", dynamic=True),
    _EVA("EVA-02 CLIP", "eva02_enormous_patch14_clip_224", VIT, S, G, 32, leading=1, tag="post-norm"),
    _EVA("DINOv3", "vit_small_patch16_dinov3", VIT, S, G, 32, leading=5, tag="dinov3", dynamic=True),
    _EVA("Perception Encoder", "vit_pe_core_tiny_patch16_384", VIT, S, G, 32, leading=1, tag="pe-core"),
    _EVA("Perception Encoder", "vit_pe_spatial_tiny_patch16_512", VIT, S, G, 32, leading=1, tag="pe-spatial"),
    _EVA("RoPE-ViT", "vit_small_patch16_rope_224", VIT, S, G, 32, leading=1, tag="rope"),
    _EVA("RoPE-ViT", "vit_small_patch16_rope_mixed_ape_224", VIT, S, G, 32, leading=1, tag="rope-mixed"),
    _EVA("Sapiens2", "vit_base_patch16_sapiens2", VIT | {"num_kv_heads": (2, 1, 1)}, S, G, 32, leading=9,
        tag="sapiens2", dynamic=True),
    _EVA("LingBot", "vit_small_patch16_lingbot", VIT, S, G, 32, leading=5, tag="lingbot", dynamic=True),
    _timm("Beit", "BEiT", "beit_base_patch16_224", VIT, S, G, 32, leading=1),
    _timm("VisionTransformerRelPos", "ViT (relative position)", "vit_relpos_small_patch16_224", VIT, S, G, 32),
    _timm("VisionTransformerRelPos", "ViT (relative position)", "vit_relpos_base_patch16_cls_224", VIT, S, G, 32,
        leading=1, tag="cls"),
    _timm("VisionTransformerRelPos", "ViT (relative position)", "vit_relpos_small_patch16_rpn_224", VIT, S, G, 32,
        tag="res-post-norm"),
    _timm("NaFlexVit", "NaFlexViT", "naflexvit_base_patch16_gap", VIT, S, G, 32, leading=4, dynamic=True),
    _timm("NaFlexVit", "NaFlexViT", "naflexvit_base_patch16_gap", VIT, S, None, 32, leading=4, tag="packed",
        kwargs=_naflex, note="patches of images of different sizes, padded to one length"),
    _timm("Qwen3VitEncoder", "Qwen3-VL", "qwen3_vit_88m_enc", ENCODER, S, G, 32, dynamic=True),
    _timm("Qwen3VitClassifier", "Qwen3-VL", "qwen3_vit_88m", VIT, S, G, 32, dynamic=True, blocks="encoder.blocks.{n}"),
    _timm("DeepseekVitEncoder", "DeepSeek-VL", "deepseek_vit_412m_enc", ENCODER, S, G, 32, dynamic=True),
    _timm("DeepseekVitClassifier", "DeepSeek-VL", "deepseek_vit_412m", VIT, S, G, 32, dynamic=True,
        blocks="encoder.blocks.{n}"),
    _timm("Gemma4VitEncoder", "Gemma 4", "gemma4_vit_167m_enc", ENCODER | {"head_dim": 16}, (48, 72), (6, 9), 32,
        dynamic=True),
    _timm("Gemma4VitClassifier", "Gemma 4", "gemma4_vit_167m", VIT | {"head_dim": 16}, S, G, 32, dynamic=True,
        blocks="encoder.blocks.{n}"),
)
# fmt: on


def pyramid(size: Grid, *strides: int) -> tuple[Grid, ...]:
    return tuple((math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in strides)


_T2 = partial(_timm, tier=2)
SWIN = {"img_size": S, "embed_dim": 16, "depths": (2, 2, 1), "num_heads": (1, 2, 2), "window_size": 4, "num_classes": 5}
SWIN_CR = {k: v for k, v in SWIN.items() if k != "window_size"}
PVT = {
    "embed_dims": (16, 32, 48),
    "depths": (1, 2, 1),
    "num_heads": (1, 2, 2),
    "sr_ratios": (4, 2, 1),
    "mlp_ratios": (2, 2, 2),
    "num_classes": 5,
}
HIERA = {
    "img_size": S,
    "embed_dim": 16,
    "stages": (1, 2, 1),
    "q_pool": 2,
    "mask_unit_size": (4, 4),
    "mask_unit_attn": (True, True, False),
    "num_classes": 5,
}
SAM2 = {
    "embed_dim": 16,
    "stages": (1, 2, 1, 1),
    "window_spec": (4, 2, 2, 1),
    "global_att_blocks": (2,),
    "num_classes": 5,
}
DAVIT = {"depths": (1, 1, 1), "embed_dims": (16, 32, 48), "num_heads": (1, 2, 2), "window_size": 4, "num_classes": 5}
LEVIT = {
    "img_size": (48, 80),
    "embed_dim": (32, 48),
    "depth": (2, 2),
    "num_heads": (2, 2),
    "key_dim": 8,
    "num_classes": 5,
}
P4, P32 = pyramid(S, 4, 8, 16), pyramid((64, 96), 4, 8, 16, 32)
STAGES = "stages.{s}.blocks.{i}"
DAVIT_NAMED = tuple(f"stages.{s}.blocks.0.{kind}_block" for s in range(3) for kind in ("spatial", "channel"))
VOLO = tuple(f"network.{n}" for n in ("0.0", "2.0", "2.1", "3.0", "4.0"))
# fmt: off
TIMM_TIER_2 = (
    _T2("VisionTransformerSAM", "SAM", "samvit_base_patch16_224", VIT | {"window_size": 3, "global_attn_indexes": (1,)},
        S, G, 32, layout="NHWC", dynamic=True),
    _T2("SwinTransformer", "Swin", "swin_tiny_patch4_window7_224", SWIN, S, P4, [16, 32, 64], depths=(2, 2, 1),
        blocks="layers.{s}.blocks.{i}", layout="NHWC"),
    _T2("SwinTransformerV2", "Swin V2", "swinv2_tiny_window8_256", SWIN, S, P4, [16, 32, 64], depths=(2, 2, 1),
        blocks="layers.{s}.blocks.{i}", layout="NHWC"),
    _T2("SwinTransformer", "Swin", "swin_tiny_patch4_window7_224", SWIN | {"dynamic_img_size": True}, S, P4, [16, 32,
        64], depths=(2, 2, 1), blocks="layers.{s}.blocks.{i}", layout="NHWC", dynamic=True, tag="dynamic"),
    _T2("SwinTransformerV2Cr", "Swin V2", "swinv2_cr_tiny_224", SWIN_CR, S, P4, [16, 32, 64], depths=(2, 2, 1),
        blocks=STAGES, layout="NHWC"),
    _case("timm", "MultiScaleVit", "MViTv2", partial(_seeded, _mvit, False), STAGES, (64, 64),
        pyramid((64, 64), 4, 8, 16), [16, 32, 64], tier=2, depths=(1, 2, 1), item=0, features=TIMM_FEATURES),
    _case("timm", "MultiScaleVit", "MViTv2", partial(_seeded, _mvit, True), STAGES, (64, 64),
        pyramid((64, 64), 4, 8, 16), [16, 32, 64], tier=2, depths=(1, 2, 1), item=0, leading=1, features=TIMM_FEATURES,
        tag="cls"),
    _T2("PyramidVisionTransformerV2", "PVT v2", "pvt_v2_b0", PVT, S, P4, [16, 32, 48], depths=(1, 2, 1), blocks=STAGES,
        dynamic=True),
    _T2("PyramidVisionTransformerV2", "PVT v2", "pvt_v2_b2_li", PVT, S, P4, [16, 32, 48], depths=(1, 2, 1),
        blocks=STAGES, dynamic=True, tag="linear"),
    _T2("Twins", "Twins", "twins_pcpvt_small", PVT | {"img_size": S}, S, P4, [16, 32, 48], depths=(1, 2, 1),
        blocks="blocks.{s}.{i}", checkpointing=False, dynamic=True, tag="pcpvt"),
    _T2("Twins", "Twins", "twins_svt_small", PVT | {"img_size": S, "wss": (4, 4, 4)}, S, P4, [16, 32, 48], depths=(1, 2,
        1), blocks="blocks.{s}.{i}", checkpointing=False, dynamic=True, tag="svt"),
    _T2("Hiera", "Hiera", "hiera_tiny_224", HIERA, S, P4, [16, 32, 64], depths=(1, 2, 1), raster=False,
        note="tokens in mask-unit order"),
    _T2("Hiera", "Hiera", "hiera_small_abswin_256", HIERA | {"global_pos_size": (4, 4)}, S, P4, [16, 32, 64], depths=(1,
        2, 1), raster=False, note="tokens in mask-unit order", tag="abswin"),
    _T2("HieraDet", "SAM 2", "sam2_hiera_tiny", SAM2, (64, 96), P32, [16, 32, 64, 128], depths=(1, 2, 1, 1),
        layout="NHWC", dynamic=True),
    _T2("DaVit", "DaViT", "davit_tiny", DAVIT, S, P4, [16, 32, 48], depths=(2, 2, 2), blocks="stages.{s}.blocks.0.{i}",
        layout="NCHW", dynamic=True),
    _T2("DaVit", "DaViT", "davit_base_fl", DAVIT, S, P4, [16, 32, 48], depths=(2, 2, 2), blocks=DAVIT_NAMED,
        layout="NCHW", dynamic=True, tag="florence"),
    _T2("GlobalContextVit", "GCViT", "gcvit._create_gcvit:gcvit_xxtiny", {"img_size": (64, 96), "embed_dim": 16,
        "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "num_classes": 5}, (64, 96), P32, [16, 32, 64, 128],
        depths=(1, 1, 2, 1), blocks=STAGES, layout="NHWC"),
    _T2("TinyVit", "TinyViT", "tiny_vit_5m_224", {"embed_dims": (16, 32, 48), "depths": (1, 2, 1),
        "num_heads": (1, 2, 2), "window_sizes": (4, 4, 2), "num_classes": 5}, S, P4[1:], [32, 48], depths=(2, 1),
        blocks="stages.{t}.blocks.{i}", layout="NHWC", dynamic=True),
    _T2("Cait", "CaiT", "cait_xxs24_224", VIT, S, G, 32, note="cls only in the class-attention blocks"),
    _T2("Xcit", "XCiT", "xcit_nano_12_p8_224", VIT, S, G, 32, dynamic=True,
        note="cls only in the class-attention blocks"),
    _T2("ConVit", "ConViT", "convit_tiny", VIT | {"img_size": 32, "embed_dim": 16, "local_up_to_layer": 2}, (32, 32),
        (4, 4), 32, depths=(2, 1), leading=[0, 1], checkpointing=False, note="cls joins after the local blocks"),
    _T2("VOLO", "VOLO", "volo._create_volo:volo_d1_224", {"img_size": S, "layers": (1, 2, 1, 1),
        "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2), "stem_hidden_dim": 16, "num_classes": 5}, S, ((4, 6),
        (2, 3), (2, 3), (2, 3)), [16, 32, 32, 32], depths=(1, 2, 1, 1), blocks=VOLO, layout="NHWC"),
    _T2("PoolingVisionTransformer", "PiT", "pit_ti_224", {"img_size": (48, 80), "base_dims": (16, 16, 16),
        "depth": (1, 2, 1), "heads": (1, 2, 4), "num_classes": 5}, (48, 80), ((5, 9), (3, 5), (2, 3)), [16, 32, 64],
        depths=(1, 2, 1), leading=1, blocks="transformers.{s}.blocks.{i}", checkpointing=False),
    _T2("PoolingVisionTransformer", "PiT", "pit_ti_distilled_224", {"img_size": (48, 80), "base_dims": (16, 16, 16),
        "depth": (1, 2, 1), "heads": (1, 2, 4), "num_classes": 5}, (48, 80), ((5, 9), (3, 5), (2, 3)), [16, 32, 64],
        depths=(1, 2, 1), leading=2, blocks="transformers.{s}.blocks.{i}", checkpointing=False, tag="distilled"),
    _T2("LevitDistilled", "LeViT", "levit_128s", LEVIT, (48, 80), ((3, 5), (2, 3)), [32, 48], depths=(2, 2),
        blocks=STAGES),
    _T2("Levit", "LeViT", "levit_128s", LEVIT | {"distilled": False}, (48, 80), ((3, 5), (2, 3)), [32, 48], depths=(2,
        2), blocks=STAGES),
    _T2("LevitDistilled", "LeViT", "levit_conv_128s", LEVIT, (48, 80), ((3, 5), (2, 3)), [32, 48], depths=(2, 2),
        blocks=STAGES, layout="NCHW", tag="conv"),
    _T2("CoaT", "CoaT-Lite", "coat_lite_tiny", {"img_size": (64, 96), "embed_dims": (16, 32, 32, 48),
        "serial_depths": (1, 1, 2, 1), "num_heads": 2, "crpe_window": {3: 1, 5: 1}, "mlp_ratios": (2, 2, 2, 2),
        "num_classes": 5}, (64, 96), P32, [16, 32, 32, 48], depths=(1, 1, 2, 1), leading=1,
        blocks="serial_blocks{t}.{i}", checkpointing=False),
)
# fmt: on


def _pretrained(architecture: str, config: str, /, **kwargs: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**kwargs)
    module = type(made).__module__.replace("configuration_", "modeling_")
    return getattr(import_module(module), architecture)(made)


def _hf(architecture: str, family: str, config: str, make: Mapping[str, Any], *args: Any, **fields: Any) -> Case:
    blocks = fields.pop("blocks", "layers.{n}")
    maps = ("feature_maps",) if architecture.endswith("Backbone") else ()
    fields = {"features": ("hidden_states", *maps), **fields}
    build = partial(_seeded, _pretrained, architecture, f"{config}Config", **make)
    return _case("transformers", architecture, family, build, blocks, *args, **fields)


HF = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
HF_STATIC = HF | {"image_size": S}
RESIZE = {"kwargs": {"interpolate_pos_encoding": True}, "dynamic": True}
LAYER, LAYERS = "encoder.layer.{n}", "encoder.layers.{n}"
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def _words(images: Tensor, **kwargs: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[0, 5, 7, 2]]).repeat(len(images), 1), **kwargs}


TIMM_ARGS = VIT | {"img_size": list(S)}
TIMM_ARGS = {k: v for k, v in TIMM_ARGS.items() if k != "num_classes"}
DEPTH_NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
DINO_4 = HF | {
    "model_type": "dinov2",
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "reshape_hidden_states": False,
}
BEIT_4 = DINO_4 | {"model_type": "beit", "use_relative_position_bias": True}


def _timm_backbone() -> nn.Module:
    from transformers import TimmBackbone, TimmBackboneConfig

    return TimmBackbone(TimmBackboneConfig(backbone="vit_tiny_patch16_224", out_indices=[0, 1, 2]), **TIMM_ARGS)


_WORDS_RESIZE = {"kwargs": partial(_words, interpolate_pos_encoding=True), "dynamic": True, "features": ()}
# fmt: off
HF_TIER_1 = (
    _hf("ViTModel", "ViT", "ViT", HF, S, G, 32, leading=1, **RESIZE),
    _hf("ViTForImageClassification", "ViT", "ViT", HF, S, G, 32, leading=1, blocks="vit.layers.{n}", **RESIZE),
    _hf("ViTMSNModel", "ViT MSN", "ViTMSN", HF, S, G, 32, leading=1, **RESIZE),
    _hf("IJepaModel", "I-JEPA", "IJepa", HF, S, G, 32, **RESIZE),
    _hf("DeiTModel", "DeiT", "DeiT", HF, S, G, 32, leading=2, **RESIZE),
    _hf("BeitModel", "BEiT", "Beit", HF | {"use_relative_position_bias": True}, S, G, 32, leading=1, **RESIZE),
    _hf("BeitBackbone", "BEiT", "Beit", HF_STATIC | {"out_indices": [1, 3]}, S, G, 32, leading=1,
        blocks="beit.layers.{n}", dynamic=True),
    _hf("Data2VecVisionModel", "Data2Vec", "Data2VecVision", HF, S, G, 32, leading=1, blocks=LAYER, item=0, **RESIZE),
    _hf("FlavaImageModel", "FLAVA", "FlavaImage", HF, S, G, 32, leading=1, blocks=LAYER, item=0, **RESIZE),
    _hf("Dinov2Model", "DINOv2", "Dinov2", HF, S, G, 32, leading=1, blocks=LAYER, dynamic=True),
    _hf("Dinov2Backbone", "DINOv2", "Dinov2", HF | {"out_indices": [1, 3]}, S, G, 32, leading=1, blocks=LAYER,
        dynamic=True),
    _hf("Dinov2WithRegistersModel", "DINOv2 (registers)", "Dinov2WithRegisters", HF, S, G, 32, leading=5, blocks=LAYER,
        dynamic=True),
    _hf("Dinov2WithRegistersBackbone", "DINOv2 (registers)", "Dinov2WithRegisters", HF | {"out_indices": [1, 3]}, S, G,
        32, leading=5, blocks=LAYER, dynamic=True),
    _hf("Dinov2Model", "DINOv2", "Dinov2", HF, (35, 53), G, 32, leading=1, blocks=LAYER, tag="odd-size",
        note="the grid is rounded down"),
    _hf("Tipsv2VisionModel", "TIPSv2", "Tipsv2Vision", HF, S, G, 32, leading=2, blocks=LAYER, dynamic=True),
    _hf("Tipsv2VisionBackbone", "TIPSv2", "Tipsv2Vision", HF | {"out_indices": [1, 3]}, S, G, 32, leading=2,
        blocks=LAYER, dynamic=True),
    _hf("DINOv3ViTModel", "DINOv3", "DINOv3ViT", HF | {"num_register_tokens": 4}, S, G, 32, leading=5,
        blocks="model.layer.{n}", dynamic=True),
    _hf("DINOv3ViTBackbone", "DINOv3", "DINOv3ViT", HF | {"num_register_tokens": 4, "out_indices": [1, 3]}, S, G, 32,
        leading=5, blocks="model.layer.{n}", dynamic=True),
    _hf("Sapiens2Model", "Sapiens2", "Sapiens2", HF | {"num_key_value_heads_per_layer": [2, 1, 2]}, S, G, 32, leading=9,
        blocks="model.layer.{n}", dynamic=True),
    _hf("Sapiens2Backbone", "Sapiens2", "Sapiens2", HF | {"num_key_value_heads_per_layer": [2, 1, 2],
        "out_indices": [1, 3]}, S, G, 32, leading=9, blocks="model.layer.{n}", dynamic=True),
    _hf("PixioModel", "Pixio", "Pixio", HF, S, G, 32, leading=8, dynamic=True),
    _hf("PixioBackbone", "Pixio", "Pixio", HF | {"out_indices": [1, 3]}, S, G, 32, leading=8, blocks="pixio.layers.{n}",
        dynamic=True),
    _hf("CLIPVisionModel", "CLIP", "CLIPVision", HF, S, G, 32, leading=1, blocks=LAYERS, **RESIZE),
    _hf("CLIPVisionModelWithProjection", "CLIP", "CLIPVision", HF, S, G, 32, leading=1,
        blocks="vision_model.encoder.layers.{n}", **RESIZE),
    _hf("CLIPModel", "CLIP", "CLIP", {"vision_config": HF, "text_config": TEXT}, S, G, 32, leading=1,
        blocks="vision_model.encoder.layers.{n}", **_WORDS_RESIZE),
    _hf("MetaClip2VisionModel", "MetaCLIP 2", "MetaClip2Vision", HF, S, G, 32, leading=1, blocks=LAYERS, **RESIZE),
    _hf("AltCLIPVisionModel", "AltCLIP", "AltCLIPVision", HF, S, G, 32, leading=1, blocks=LAYERS, **RESIZE),
    _hf("ChineseCLIPVisionModel", "Chinese-CLIP", "ChineseCLIPVision", HF, S, G, 32, leading=1, blocks=LAYERS,
        **RESIZE),
    _hf("CLIPSegVisionModel", "CLIPSeg", "CLIPSegVision", HF, S, G, 32, leading=1, blocks=LAYERS, dynamic=True),
    _hf("BlipVisionModel", "BLIP", "BlipVision", HF, S, G, 32, leading=1, blocks=LAYERS, **RESIZE),
    _hf("Blip2VisionModel", "BLIP-2", "Blip2Vision", HF, S, G, 32, leading=1, blocks=LAYERS, **RESIZE),
    _hf("InstructBlipVisionModel", "InstructBLIP", "InstructBlipVision", HF, S, G, 32, leading=1, blocks=LAYERS,
        **RESIZE),
    _hf("InstructBlipVideoVisionModel", "InstructBLIP", "InstructBlipVideoVision", HF, S, G, 32, leading=1,
        blocks=LAYERS, **RESIZE),
    _hf("GitVisionModel", "GIT", "GitVision", HF, S, G, 32, leading=1, blocks="vision_model.encoder.layers.{n}",
        **RESIZE),
    _hf("OwlViTVisionModel", "OWL-ViT", "OwlViTVision", HF, S, G, 32, leading=1,
        blocks="vision_model.encoder.layers.{n}", **RESIZE),
    _hf("Owlv2VisionModel", "OWLv2", "Owlv2Vision", HF, S, G, 32, leading=1, blocks="vision_model.encoder.layers.{n}",
        **RESIZE),
    _hf("Kosmos2VisionModel", "Kosmos-2", "Kosmos2Vision", HF, S, G, 32, leading=1, blocks="model.encoder.layers.{n}",
        **RESIZE),
    _hf("SiglipVisionModel", "SigLIP", "SiglipVision", HF, S, G, 32, blocks=LAYERS, **RESIZE),
    _hf("SiglipModel", "SigLIP", "Siglip", {"vision_config": HF, "text_config": TEXT}, S, G, 32,
        blocks="vision_model.encoder.layers.{n}", **_WORDS_RESIZE),
    _hf("JanusVisionModel", "Janus", "JanusVision", HF, S, G, 32, blocks=LAYERS, **RESIZE),
    _hf("Idefics2VisionTransformer", "Idefics2", "Idefics2Vision", HF, S, G, 32, blocks=LAYERS, dynamic=True),
    _hf("Idefics3VisionTransformer", "Idefics3", "Idefics3Vision", HF, S, G, 32, blocks=LAYERS, dynamic=True),
    _hf("SmolVLMVisionTransformer", "SmolVLM", "SmolVLMVision", HF, S, G, 32, blocks=LAYERS, dynamic=True),
    _hf("Aimv2VisionModel", "AIMv2", "Aimv2Vision", HF, (32, 32), (4, 4), 32, blocks=LAYERS),
    _hf("Aimv2VisionModel", "AIMv2", "Aimv2Vision", HF | {"is_native": True}, S, G, 32, blocks=LAYERS, dynamic=True,
        tag="native"),
    _hf("MLCDVisionModel", "MLCD", "MLCDVision", HF, S, G, 32, leading=1, blocks=LAYERS, dynamic=True),
    _hf("InternVLVisionModel", "InternVL", "InternVLVision", HF | {"image_size": [32, 32], "patch_size": [8, 8]}, S, G,
        32, leading=1, blocks=LAYER, dynamic=True),
    _hf("QianfanOCRVisionModel", "Qianfan-OCR", "QianfanOCRVision", HF | {"image_size": [32, 32], "patch_size": [8, 8]},
        S, G, 32, leading=1, dynamic=True),
    _hf("RadioModel", "RADIO", "Radio", HF | {"patch_dim": 192}, S, G, 32, leading=10, blocks=LAYER, dynamic=True),
    _hf("VitPoseBackbone", "ViTPose", "VitPoseBackbone", HF_STATIC | {"patch_size": [8, 8]}, S, G, 32, blocks=LAYER),
    _hf("VitPoseBackbone", "ViTPose", "VitPoseBackbone", HF_STATIC | {"patch_size": [8, 8], "num_experts": 2,
        "part_features": 8}, S, G, 32, blocks=LAYER, tag="moe",
        kwargs=lambda images: {"dataset_index": torch.zeros(len(images), dtype=torch.long)}),
    _hf("DPTModel", "DPT", "DPT", HF | {"backbone_out_indices": [0, 1, 1, 2]}, S, G, 32, leading=1, blocks=LAYER,
        dynamic=True),
    _hf("YolosModel", "YOLOS", "Yolos", HF_STATIC | {"num_detection_tokens": 6}, S, G, 32, leading=1, trailing=6,
        blocks=LAYER, dynamic=True),
    _hf("DPTForDepthEstimation", "DPT", "DPT", HF | {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}, (32, 32), (4, 4), 32, depths=(4, ), leading=1,
        blocks="dpt.encoder.layer.{n}"),
    _hf("DepthAnythingForDepthEstimation", "Depth Anything", "DepthAnything", DEPTH_NECK | {"backbone_config": DINO_4,
        "reassemble_hidden_size": 32, "head_hidden_size": 8, "patch_size": 8}, S, G, 32, depths=(4, ), leading=1,
        blocks="backbone.encoder.layer.{n}", dynamic=True),
    _hf("ZoeDepthForDepthEstimation", "ZoeDepth", "ZoeDepth", DEPTH_NECK | {"backbone_config": BEIT_4,
        "bottleneck_features": 8, "bin_embedding_dim": 8}, S, G, 32, depths=(4, ), leading=1,
        blocks="backbone.beit.layers.{n}", dynamic=True),
    _hf("TimmWrapperModel", "timm in Transformers", "TimmWrapper", {"architecture": "vit_tiny_patch16_224",
        "model_args": TIMM_ARGS}, S, G, 32, leading=1, blocks="timm_model.blocks.{n}"),
    _hf("TimmWrapperForImageClassification", "timm in Transformers", "TimmWrapper",
        {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": TIMM_ARGS}, S, G, 32, leading=1,
        blocks="timm_model.blocks.{n}", tag="pe"),
    _case("transformers", "TimmBackbone", "timm in Transformers", partial(_seeded, _timm_backbone),
        "_backbone.model.blocks.{n}", S, G, 32, leading=1, checkpointing=False,
        features=("hidden_states", "feature_maps")),
)
# fmt: on


def _packed(images: Tensor) -> dict[str, Any]:
    batch = _naflex(images)["images"]
    sizes = torch.tensor([((3, 4), (2, 5))[n % 2] for n in range(len(images))])
    mask = batch["patch_valid"].long()
    return {"pixel_values": batch["patches"], "pixel_attention_mask": mask, "spatial_shapes": sizes}


def _stage(images: Tensor) -> dict[str, Any]:
    return {"noise": torch.arange(24.0).flip(0).repeat(len(images), 1)}


_HF2 = partial(_hf, tier=2)
SAM = HF | {"mlp_dim": 64, "output_channels": 16, "window_size": 3, "global_attn_indexes": [1]}
SAM["num_pos_feats"] = 8
VITDET = HF | {"pretrain_image_size": 32, "window_block_indices": [0, 2], "window_size": 3}
HF_SWIN = {
    "image_size": S,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2, 1],
    "num_heads": [1, 2, 2],
    "window_size": 2,
}
SWIN_4 = HF_SWIN | {
    "model_type": "swin",
    "image_size": 64,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 2],
    "out_indices": [1, 2, 3, 4],
}
MASKFORMER = {
    "fpn_feature_size": 32,
    "mask_feature_size": 32,
    "feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 4,
}
DETR = {
    "model_type": "detr",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
}
HF_SAM2 = {
    "hidden_size": 16,
    "image_size": [64, 96],
    "blocks_per_stage": [1, 2, 1, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 2, 2],
    "window_size_per_stage": [8, 4, 2, 1],
    "global_attention_blocks": [2],
}
HF_PVT = {
    "num_encoder_blocks": 4,
    "depths": [1, 1, 2, 1],
    "hidden_sizes": [16, 32, 32, 48],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 16,
}
HF_HIERA = {
    "image_size": [32, 48],
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [1, 1, 1],
    "num_query_pool": 2,
    "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, True, False],
}
QUAD = {"tier": 2, "depths": (1, 1, 2, 1)}
SWIN_BLOCKS = "encoder.layers.{s}.blocks.{i}"
SWIN_TRUE = {"tier": 2, "depths": (2, 2, 1), "item": 0, "dynamic": True}
SWIN_HOST = QUAD | {"item": 0, "dynamic": True}
# fmt: off
HF_TIER_2 = (
    _HF2("EomtForUniversalSegmentation", "EoMT", "Eomt", HF | {"num_blocks": 1, "num_queries": 5,
        "num_upscale_blocks": 1}, (32, 32), (4, 4), 32, depths=(2, 1), leading=[5, 10], checkpointing=False,
        note="queries join before the last block"),
    _HF2("EomtDinov3ForUniversalSegmentation", "EoMT", "EomtDinov3", HF | {"num_blocks": 1, "num_queries": 5,
        "num_upscale_blocks": 1}, (32, 32), (4, 4), 32, depths=(2, 1), leading=[5, 10], checkpointing=False,
        note="queries join before the last block"),
    _HF2("ViTMAEModel", "ViT MAE", "ViTMAE", HF_STATIC | {"mask_ratio": 0.5}, S, None, 32, leading=1, kwargs=_stage,
        note="half of the tokens, shuffled"),
    _HF2("Siglip2VisionModel", "SigLIP 2", "Siglip2Vision", HF | {"num_patches": 16}, S, None, 32, blocks=LAYERS,
        kwargs=_packed, note="patches of images of different sizes, padded to one length"),
    _HF2("Llama4VisionModel", "Llama 4", "Llama4Vision", HF | {"intermediate_size": 128, "projector_input_dim": 32,
        "projector_output_dim": 32}, (32, 32), (4, 4), 32, trailing=1, item=0, blocks="model.layers.{n}",
        note="cls token last"),
    _HF2("SamVisionModel", "SAM", "SamVision", SAM, (32, 32), (4, 4), 32, blocks="vision_encoder.layers.{n}",
        layout="NHWC"),
    _HF2("SamHQVisionModel", "SAM-HQ", "SamHQVision", SAM, (32, 32), (4, 4), 32, blocks="vision_encoder.layers.{n}",
        layout="NHWC"),
    _HF2("GotOcr2VisionEncoder", "GOT-OCR 2", "GotOcr2Vision", SAM, (32, 32), (4, 4), 32, layout="NHWC"),
    _HF2("Sam3ViTModel", "SAM 3", "Sam3ViT", HF | {"pretrain_image_size": 32, "window_size": 2,
        "global_attn_indexes": [1]}, (32, 32), (4, 4), 32, layout="NHWC", checkpointing=False),
    _HF2("Sam2HieraDetModel", "SAM 2", "Sam2HieraDet", HF_SAM2, (64, 96), P32, [16, 32, 64, 128], depths=(1, 2, 1, 1),
        blocks="blocks.{n}", layout="NHWC", dynamic=True, checkpointing=False),
    _HF2("Sam2VisionModel", "SAM 2", "Sam2Vision", {"backbone_config": HF_SAM2 | {"model_type": "sam2_hiera_det_model"},
        "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 16}, (64, 96), P32, [16, 32, 64, 128], depths=(1,
        2, 1, 1), blocks="backbone.blocks.{n}", layout="NHWC", dynamic=True, checkpointing=False),
    _HF2("VitDetModel", "ViTDet", "VitDet", VITDET, S, G, 32, blocks=LAYER, item=0, layout="NCHW", dynamic=True),
    _HF2("VitDetBackbone", "ViTDet", "VitDet", VITDET | {"out_indices": [1, 3]}, S, G, 32, blocks=LAYER, item=0,
        layout="NCHW", dynamic=True),
    _HF2("VitMatteForImageMatting", "ViTMatte", "VitMatte",
        {"backbone_config": VITDET | {"model_type": "vitdet", "num_channels": 4, "patch_size": 16, "out_indices": [3]},
        "hidden_size": 32, "convstream_hidden_sizes": [8, 8, 8], "fusion_hidden_sizes": [8, 8, 8, 8]}, (64, 96), G, 32,
        blocks="backbone.encoder.layer.{n}", item=0, layout="NCHW", dynamic=True,
        kwargs=lambda images: {"pixel_values": torch.cat([images, images[:, :1]], dim=1)}),
    _hf("SwinModel", "Swin", "Swin", HF_SWIN, S, P4, [16, 32, 64], blocks=SWIN_BLOCKS, **SWIN_TRUE),
    _hf("SwinBackbone", "Swin", "Swin", HF_SWIN | {"out_indices": [1, 3]}, S, P4, [16, 32, 64],
        blocks="swin." + SWIN_BLOCKS, **SWIN_TRUE),
    _hf("Swinv2Model", "Swin V2", "Swinv2", HF_SWIN, S, P4, [16, 32, 64], blocks=SWIN_BLOCKS, **SWIN_TRUE),
    _hf("Swinv2Backbone", "Swin V2", "Swinv2", HF_SWIN | {"out_indices": [1, 3]}, S, P4, [16, 32, 64],
        blocks=SWIN_BLOCKS, **SWIN_TRUE),
    _hf("MaskFormerSwinModel", "Swin", "MaskFormerSwin", HF_SWIN, S, P4, [16, 32, 64], blocks=SWIN_BLOCKS, **SWIN_TRUE),
    _hf("MaskFormerSwinBackbone", "Swin", "MaskFormerSwin", HF_SWIN | {"out_indices": [1, 3]}, S, P4, [16, 32, 64],
        blocks="model." + SWIN_BLOCKS, **SWIN_TRUE),
    _hf("DonutSwinModel", "Donut", "DonutSwin", HF_SWIN, S, P4, [16, 32, 64], blocks=SWIN_BLOCKS, **SWIN_TRUE),
    _hf("UperNetForSemanticSegmentation", "UperNet", "UperNet", {"backbone_config": SWIN_4, "hidden_size": 16,
        "auxiliary_channels": 8, "auxiliary_in_channels": 64}, (64, 96), P32, [16, 32, 64, 128],
        blocks="backbone.swin." + SWIN_BLOCKS, checkpointing=False, tag="swin", **SWIN_HOST),
    _hf("Mask2FormerModel", "Mask2Former", "Mask2Former", MASKFORMER | {"backbone_config": SWIN_4}, (64, 96), P32, [16,
        32, 64, 128], blocks="pixel_level_module.encoder.swin." + SWIN_BLOCKS, checkpointing=False, features=(),
        tag="swin", **SWIN_HOST),
    _hf("MaskFormerModel", "MaskFormer", "MaskFormer", MASKFORMER | {"backbone_config": SWIN_4, "decoder_config": DETR},
        (64, 96), P32, [16, 32, 64, 128], blocks="pixel_level_module.encoder.model." + SWIN_BLOCKS, checkpointing=False,
        tag="swin", **SWIN_HOST),
    _hf("GroundingDinoModel", "Grounding DINO", "GroundingDino",
        {"backbone_config": SWIN_4 | {"out_indices": [2, 3, 4]}, "text_config": TEXT | {"model_type": "bert"},
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 4, "max_text_len": 16}, L, P32, [16,
        32, 64, 128], blocks="backbone.conv_encoder.model.swin." + SWIN_BLOCKS, checkpointing=False, features=(),
        tag="swin", **SWIN_HOST | {"kwargs": _words}),
    _HF2("HieraModel", "Hiera", "Hiera", HF_HIERA, S, P4, [16, 32, 64], depths=(1, 2, 1), item=0,
        blocks="encoder.stages.{s}.layers.{i}", raster=False, note="tokens in mask-unit order"),
    _hf("PvtModel", "PVT", "Pvt", HF_PVT | {"image_size": 64}, (64, 64), pyramid((64, 64), 4, 8, 16, 32), [16, 32, 32,
        48], leading=[0, 0, 0, 1], item=0, blocks="encoder.block.{s}.{i}", checkpointing=False,
        note="cls in the last stage", **QUAD),
    _hf("PvtV2Model", "PVT v2", "PvtV2", HF_PVT, (64, 96), P32, [16, 32, 32, 48], blocks=SWIN_BLOCKS, item=0,
        dynamic=True, **QUAD),
    _hf("PvtV2Backbone", "PVT v2", "PvtV2", HF_PVT | {"out_indices": [0, 3]}, (64, 96), P32, [16, 32, 32, 48],
        blocks=SWIN_BLOCKS, item=0, dynamic=True, **QUAD),
    _hf("SegformerModel", "SegFormer", "Segformer", HF_PVT, (64, 96), P32, [16, 32, 32, 48], blocks=STAGES,
        dynamic=True, **QUAD),
    _hf("SegformerForSemanticSegmentation", "SegFormer", "Segformer", HF_PVT, (64, 96), P32, [16, 32, 32, 48],
        blocks="segformer." + STAGES, dynamic=True, **QUAD),
    _hf("GLPNModel", "GLPN", "GLPN", HF_PVT, (64, 96), P32, [16, 32, 32, 48], blocks="encoder.block.{s}.{i}", item=0,
        dynamic=True, checkpointing=False, **QUAD),
    _HF2("CvtModel", "CvT", "Cvt", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, S, P4, [16,
        32, 48], depths=(1, 2, 3), leading=[0, 0, 1], blocks="encoder.stages.{s}.layers.{i}", dynamic=True,
        checkpointing=False, note="cls in the last stage"),
    _HF2("LwDetrViTBackbone", "LW-DETR", "LwDetrViT", HF | {"pretrain_image_size": 32, "num_windows": 4,
        "num_windows_side": 2, "window_block_indices": [0, 2], "out_indices": [1, 3]}, S, G, 32, blocks=LAYER,
        layout="windows", raster=False, dynamic=True, note="2 x 2 windows in the batch"),
    _HF2("RfDetrDinov2Backbone", "RF-DETR", "RfDetrDinov2", HF | {"num_windows": 2, "window_block_indexes": [0, 2],
        "out_indices": [1, 3]}, (32, 32), (4, 4), 32, leading=1, blocks=LAYER, layout="windows", raster=False,
        note="2 x 2 windows in the batch, one cls each"),
)
# fmt: on


def _caformer(**kwargs: Any) -> nn.Module:
    from timm.models import metaformer as mf

    mixers = [mf.SepConv, mf.SepConv, mf.Attention, mf.Attention]
    norms = [mf.LayerNorm2dNoBias] * 2 + [mf.LayerNormNoBias] * 2
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "num_classes": 5}
    return mf._create_metaformer("caformer_s18", token_mixers=mixers, norm_layers=norms, **sizes, **kwargs)


_T3 = partial(_timm, tier=3)
ATTENTION_ONLY = "only the blocks with attention"
# fmt: off
TIMM_TIER_3 = (
    _T3("Nest", "NesT", "nest._create_nest:nest_tiny", {"img_size": 32, "num_levels": 3, "embed_dims": (16, 32, 48),
        "num_heads": (1, 2, 2), "depths": (1, 1, 2), "num_classes": 5}, (32, 32), pyramid((32, 32), 4, 8, 16), [16, 32,
        48], depths=(1, 1, 2), blocks="levels.{s}.transformer_encoder.{i}", layout="BTNC", raster=False,
        note="tokens in image blocks"),
    _T3("TNT", "TNT", "tnt_s_patch16_224", {"img_size": S, "patch_size": 8, "embed_dim": 32, "depth": 3, "inner_dim": 8,
        "num_heads_inner": 2, "num_heads_outer": 2, "num_classes": 5}, S, G, 32, leading=1, item=1,
        note="pixel and patch streams"),
    _T3("CrossVit", "CrossViT", "crossvit_tiny_240", {"img_size": S, "img_scale": (1.0, 1.0), "patch_size": (4, 8),
        "embed_dim": (16, 32), "depth": ((1, 1, 0),) * 3, "num_heads": (2, 2), "num_classes": 5}, S, G, 32, leading=1,
        item=1, checkpointing=False, note="two streams of different grids"),
    _T3("CoaT", "CoaT", "coat_tiny", {"img_size": L, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1),
        "parallel_depth": 2, "num_heads": 2, "crpe_window": {3: 1, 5: 1}, "mlp_ratios": (2, 2, 2, 2), "num_classes": 5},
        L, P32[1], 16, depths=(2, ), leading=1, item=1, blocks="parallel_blocks.{n}", checkpointing=False,
        tag="parallel", note="four streams of different grids; the serial blocks are ordinary"),
    _T3("MaxxVit", "MaxViT", "test_maxvit", {"img_size": L}, L, P32, [32, 64, 96, 128], depths=(1, 1, 1, 1),
        blocks=STAGES, layout="NCHW"),
    _T3("MaxxVit", "CoAtNet", "test_coatnet", {"img_size": L}, L, P32[2:], [96, 128], depths=(2, 1),
        blocks=("stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"), layout="NCHW", tag="coatnet",
        note=ATTENTION_ONLY),
    _case("timm", "MetaFormer", "CAFormer", partial(_seeded, _caformer),
        ("stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"), L, P32[2:], [32, 64], tier=3, depths=(2, 1),
        dynamic=True, features=TIMM_FEATURES, note=ATTENTION_ONLY),
    _T3("EfficientFormer", "EfficientFormer", "efficientformer_l1", {"depths": (1, 1, 1, 4),
        "embed_dims": (8, 16, 16, 32), "num_vit": 3, "num_classes": 5}, (224, 224), (7, 7), 32,
        blocks=("stages.3.blocks.2", "stages.3.blocks.3", "stages.3.blocks.4"), note=ATTENTION_ONLY),
    _T3("EfficientFormerV2", "EfficientFormer", "efficientformerv2_s0", {"img_size": L, "depths": (1, 1, 2, 2),
        "embed_dims": (8, 16, 16, 32), "num_classes": 5}, L, P32[2:], [16, 32], depths=(2, 2),
        blocks=tuple(f"stages.{s}.blocks.{i}" for s in (2, 3) for i in (0, 1)), layout="NCHW", note=ATTENTION_ONLY),
    _T3("EfficientVitMsra", "EfficientViT (MSRA)", "efficientvit_m0", {"img_size": 128, "embed_dim": (16, 32, 32),
        "depth": (1, 1, 1), "num_heads": (2, 2, 2), "num_classes": 5}, (128, 128), ((8, 8), (4, 4), (2, 2)), [16, 32,
        32], depths=(1, 1, 1), blocks=STAGES, layout="NCHW"),
    _T3("FastVit", "FastViT", "fastvit_sa12", {"layers": (1, 1, 1, 3), "embed_dims": (16, 16, 32, 32),
        "num_classes": 5}, (128, 192), G, 32, blocks="stages.3.blocks.{n}", layout="NCHW", dynamic=True,
        note=ATTENTION_ONLY),
    _T3("EdgeNeXt", "EdgeNeXt", "edgenext_xx_small", {"depths": (1, 2, 2, 2), "dims": (8, 16, 24, 32),
        "heads": (2, 2, 2, 2), "num_classes": 5}, L, P32[1:], [16, 24, 32], depths=(1, 1, 1),
        blocks="stages.{t}.blocks.1", layout="NCHW", dynamic=True, note=ATTENTION_ONLY),
    _T3("Visformer", "Visformer", "visformer_tiny", {"img_size": L, "embed_dim": 32, "depth": (1, 2, 1), "num_heads": 2,
        "init_channels": 8, "group": 2, "num_classes": 5}, L, P32[2:], [32, 64], depths=(2, 1), blocks=("stage2.0",
        "stage2.1", "stage3.0"), layout="NCHW", note=ATTENTION_ONLY),
    _T3("SwiftFormer", "SwiftFormer", "swiftformer_xs", {"layers": (1, 1, 2, 1), "embed_dims": (16, 16, 32, 32),
        "num_classes": 5}, L, P32, [16, 16, 32, 32], depths=(1, 1, 1, 1), blocks=("stages.0.blocks.0",
        "stages.1.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"), layout="NCHW", dynamic=True,
        note=ATTENTION_ONLY),
    _T3("ByobNet", "MobileViT", "mobilevit_xxs", {"num_classes": 5}, L, None, [64, 80, 96], depths=(2, 4, 3),
        blocks="stages.{u}.1.transformer.{i}", layout="folded", tag="mobilevit",
        note="tokens folded by patch position"),
)
# fmt: on


def _patches(images: Tensor) -> dict[str, Any]:
    """All patches of all images in one sequence, 2 x 2 neighbours together, each frame doubled in time."""
    cells = images.unflatten(2, (2, 2, 8)).unflatten(5, (3, 2, 8)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    pixels = cells.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(len(images) * 24, -1)
    return {"hidden_states": pixels, "grid_thw": torch.tensor([[1, 4, 6]]).repeat(len(images), 1)}


def _video(images: Tensor, frames: int = 4) -> dict[str, Any]:
    return {"pixel_values": images.unsqueeze(1).repeat(1, frames, 1, 1, 1)}


def _clip(images: Tensor) -> dict[str, Any]:
    return {"pixel_values_videos": _video(images)["pixel_values"]}


def _prompted(images: Tensor) -> dict[str, Any]:
    return {"prompt_pixel_values": images.flip(0), "prompt_masks": images.flip(3)}


def _tiles(images: Tensor) -> dict[str, Any]:
    one = torch.ones(len(images), 1, dtype=torch.long)
    pixels = images[:, None, None].repeat(1, 1, 2, 1, 1, 1)
    return {"pixel_values": pixels, "aspect_ratio_ids": one, "aspect_ratio_mask": one[..., None].repeat(1, 1, 2)}


def _positions(images: Tensor) -> dict[str, Any]:
    cells = images.unflatten(2, (6, 8)).unflatten(4, (6, 8)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)
    xy = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(1)
    return {"pixel_values": cells, "pixel_position_ids": xy.repeat(len(images), 1, 1)}


_HF3 = partial(_hf, tier=3)
QWEN = {"depth": 3, "num_heads": 2, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
PACKED = {"blocks": "blocks.{n}", "layout": "LC", "note": "one sequence for the whole batch, 2 x 2 neighbours together"}
VIDEO = {"layout": "video", "note": "time, height and width"}
# fmt: off
HF_TIER_3 = (
    _HF3("HieraBackbone", "Hiera", "Hiera", HF_HIERA | {"out_indices": [1, 3]}, S, P4, [16, 32, 64], depths=(1, 2, 1),
        item=0, raster=False, blocks="encoder.stages.{s}.layers.{i}",
        note="Transformers 5.23 forgets the mask-unit order: its maps are scrambled"),
    _HF3("SegGptModel", "SegGPT", "SegGpt", HF | {"image_size": [64, 48], "pretrain_image_size": 32, "mlp_dim": 64,
        "merge_index": 0, "intermediate_hidden_state_indices": [0, 1, 2]}, S, None, 32, item=0, layout="NHWC",
        blocks="encoder.layers.{n}", kwargs=_prompted, note="prompt above image; the batch is halved after a block"),
    _HF3("Qwen2VisionTransformerPretrainedModel", "Qwen2-VL", "Qwen2VLVision", QWEN | {"embed_dim": 32}, S, None, 32,
        kwargs=_patches, input_name="hidden_states", **PACKED),
    _HF3("Qwen2_5_VisionTransformerPretrainedModel", "Qwen2.5-VL", "Qwen2_5_VLVision", QWEN | {"window_size": 32,
        "fullatt_block_indexes": [1]}, S, None, 32, kwargs=_patches, input_name="hidden_states", **PACKED),
    _HF3("Qwen3VLVisionModel", "Qwen3-VL", "Qwen3VLVision", QWEN | {"num_position_embeddings": 16,
        "deepstack_visual_indexes": [1]}, S, None, 32, kwargs=_patches, input_name="hidden_states", **PACKED),
    _HF3("Glm4vVisionModel", "GLM-4V", "Glm4vVision", QWEN | {"image_size": 32}, S, None, 32, kwargs=_patches,
        input_name="hidden_states", **PACKED),
    _HF3("PixtralVisionModel", "Pixtral", "PixtralVision", HF | {"head_dim": 16}, S, None, 32,
        blocks="transformer.layers.{n}", layout="1LC", note="one sequence for the whole batch"),
    _HF3("MllamaVisionModel", "Llama 3.2", "MllamaVision", {"hidden_size": 32, "num_hidden_layers": 3,
        "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
        "max_num_tiles": 2, "intermediate_layers_indices": [1], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        (32, 32), None, 32, kwargs=_tiles, blocks=("transformer.layers.0", "transformer.layers.1",
        "transformer.layers.2", "global_transformer.layers.0"), depths=(4, ), layout="tiles",
        note="tiles in one sequence, padded to a multiple of 8"),
    _HF3("Gemma4VisionModel", "Gemma 4", "Gemma4Vision", HF | {"num_key_value_heads": 2, "head_dim": 16,
        "position_embedding_size": 64}, (48, 48), None, 32, blocks=LAYERS, kwargs=_positions,
        note="patches with positions, no image"),
    _HF3("GroupViTVisionModel", "GroupViT", "GroupViTVision", HF | {"depths": [1, 2, 1], "num_group_tokens": [6, 4, 0],
        "num_output_groups": [6, 4, 0]}, (32, 32), ((4, 4), None, None), 32, trailing=[6, 4, 0],
        blocks="vision_model.encoder.stages.{s}.layers.{i}", depths=(1, 2, 1),
        note="group tokens, then groups instead of patches"),
    _HF3("ViltModel", "ViLT", "Vilt", HF | {"vocab_size": 50}, S, None, 32, blocks=LAYER, item=0, kwargs=_words,
        note="text tokens first, then the patches of each image"),
    _HF3("VideoMAEModel", "VideoMAE", "VideoMAE", HF | {"num_frames": 4}, (32, 32), None, 32, blocks=LAYER,
        kwargs=_video, **VIDEO),
    _HF3("VivitModel", "ViViT", "Vivit", HF | {"num_frames": 4, "tubelet_size": [2, 8, 8]}, (32, 32), None, 32,
        kwargs=_video, **VIDEO),
    _HF3("TimesformerModel", "TimeSformer", "Timesformer", HF | {"num_frames": 4}, (32, 32), None, 32, blocks=LAYER,
        kwargs=_video, item=0, **VIDEO),
    _HF3("VJEPA2Model", "V-JEPA 2", "VJEPA2", {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2,
        "patch_size": 8, "crop_size": 32, "frames_per_clip": 4, "pred_hidden_size": 36, "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1}, (32, 32), None, 36, blocks="encoder.layer.{n}", item=0, kwargs=_clip,
        input_name="pixel_values_videos", **VIDEO),
    _HF3("MobileViTModel", "MobileViT", "MobileViT", {"hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_attention_heads": 2}, L, None, [16, 24, 32], depths=(2, 4,
        3), blocks="encoder.layer.{u}.transformer.layer.{i}", layout="folded", note="tokens folded by patch position"),
)
# fmt: on


def _stand_in(name: str) -> nn.Module:
    return getattr(import_module("stand_ins"), name)()


def _own(architecture: str, family: str, name: str, *args: Any, **fields: Any) -> Case:
    """A class in its authors' own code, by a stand-in."""
    build = partial(_seeded, _stand_in, name)
    fields = {"blocks": "blocks.{n}", "input_name": "x", "checkpointing": False, **fields}
    return _case("authors", architecture, family, build, fields.pop("blocks"), *args, **fields)


OWN = (
    _own("DinoVisionTransformer", "DINOv2", "DinoVisionTransformer", S, G, 32, leading=5, dynamic=True, tag="dinov2"),
    _own("DinoVisionTransformer", "DINOv3", "DinoV3VisionTransformer", S, G, 32, leading=5, dynamic=True, tag="dinov3"),
    _own("ReinsDinoVisionTransformer", "Rein", "ReinsDinoVisionTransformer", S, G, 32, leading=1, dynamic=True),
    _own("ImageEncoderViT", "SAM", "ImageEncoderViT", (32, 32), (4, 4), 32, layout="NHWC", tier=2),
    _own(
        "Hiera",
        "SAM 2",
        "Hiera",
        S,
        ((8, 12), (4, 6), (4, 6)),
        [16, 32, 32],
        depths=(1, 1, 1),
        layout="NHWC",
        blocks="blocks.{n}",
        tier=2,
        dynamic=True,
    ),
    _own("VisionTransformer", "OpenCLIP", "VisionTransformer", S, G, 32, leading=1, blocks="transformer.resblocks.{n}"),
)

CASES: tuple[Case, ...] = OWN + TIMM_TIER_1 + TIMM_TIER_2 + HF_TIER_1 + HF_TIER_2 + TIMM_TIER_3 + HF_TIER_3
