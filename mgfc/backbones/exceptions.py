"""The few models that the generic rules cannot tell, by class name."""

from __future__ import annotations

_STREAMS = "its blocks carry several token streams"
_FOLDED = "its transformers run on folded patches: places of one patch lie along the batch axis"
_TILES = "its tokens span several images of a batch item"
_PACKED = "its patches are packed: images of different grids share one sequence"

UNSUPPORTED = {
    "CrossVit": _STREAMS,
    "TNT": _STREAMS,
    "ParallelBlock": _STREAMS,
    "Nest": "its tokens are split into image blocks",
    "MobileVitBlock": _FOLDED,
    "MobileVitV2Block": _FOLDED,
    "MobileViTTransformer": _FOLDED,
    "MobileViTV2Transformer": _FOLDED,
    "SegGptModel": _TILES,
    "MllamaVisionModel": _TILES,
    "TimesformerModel": _TILES,
    "GroupViTVisionModel": "its tokens are merged into groups",
    "HieraBackbone": "this class forgets to unroll its patches, so that its feature maps are scrambled; use HieraModel",
    "PixtralVisionModel": _PACKED,
}
"""Class name -> why its tokens cannot be calibrated."""

TRAILING = {"YolosModel": "detection_tokens", "Llama4VisionModel": "class_embedding"}
"""Class name -> the learnt tokens that stand after the patches instead of before them."""

MASKED = ("ViTMAEModel",)
"""Classes that shuffle or drop patches inside their embeddings, so that no patch has a known place."""

HOSTS = ("TimmWrapperModel", "TimmWrapperForImageClassification")
"""Transformers classes that rename the keys of their state dict, so that the timm model inside is the backbone."""
