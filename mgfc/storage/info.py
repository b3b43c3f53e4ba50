"""What the files of an adapter say about it, without a backbone: read, and told in words."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgfc.adapter import GRANULARITIES
from mgfc.calibrators.running import statistics_in_words
from mgfc.storage.card import loading_code
from mgfc.storage.format import CONFIG, HEAD, WEIGHTS, calibration_of, read_config
from mgfc.storage.loading import locate
from mgfc.storage.parsing import printable
from mgfc.storage.snapshot import Files, consistently
from mgfc.storage.tensors import read_header, read_tensors


def read_info(source: str, revision: str | None = None) -> dict[str, Any]:
    """The content of an adapter's `config.json`, with what its other files add.

    Args:
        source: directory or Hub repository of an adapter.
        revision: branch, tag or commit of the repository.

    Returns:
        That content, and "files" (values and bytes by name), "statistics" (batches, and whether they were gathered after
        training; None if there are none) and "load" (lines of Python).

    Raises:
        AdapterNotFoundError: if a file cannot be reached.
        AdapterFileError: if one is damaged.
    """
    content = consistently(locate(source, revision=revision), _read)
    return content | {"load": loading_code(source, content.get("head"), revision)}


def _read(find: Files) -> dict[str, Any]:
    content = read_config(find(CONFIG))
    calibration_of(content, find(CONFIG))
    names = [WEIGHTS, *([HEAD] if content.get("head") else [])]
    headers = {name: read_header(find(name)) for name in names}
    content["files"] = {
        name: {"values": sum(math.prod(entry.shape) for entry in header.values()), "bytes": os.path.getsize(find(name))}
        for name, header in headers.items()
    }
    content["statistics"] = _statistics(find(WEIGHTS))
    return content


def _statistics(weights: Path) -> dict[str, Any] | None:
    """Of the running means in a file, which `mgfc.calibrators.running.RunningMean` describes."""
    found = read_tensors(weights, only=lambda name: name.endswith((".source.count", ".source.observed")))
    single = {name: float(value) for name, value in found.items() if value.numel() == 1 and value.isfinite()}
    counts = [value for name, value in single.items() if name.endswith(".count")]
    observed = [value for name, value in single.items() if name.endswith(".observed")]
    if not counts or len(counts) != len(observed):
        return None
    return {"batches": math.ceil(min(counts)), "gathered_after_training": min(observed) >= 1}


def describe(content: Mapping[str, Any]) -> str:
    """What `read_info` found, in words."""
    backbone, calibration, training = content["backbone"], content["calibration"], content.get("training") or {}
    patch = " x ".join(map(str, backbone["patch_size"] or ["unknown size"]))
    weights = backbone.get("base_model") or "weights of unknown name"
    lines = [
        f"mgfc adapter, format {content['format_version']}, written by mgfc {content.get('mgfc_version')}",
        f"backbone     {backbone.get('architecture')} ({backbone.get('library')}), {weights}",
        f"             {backbone['depth']} blocks of width {backbone['embed_dim']}, patches of {patch}, "
        f"{backbone['num_prefix_tokens']} prefix tokens",
    ]
    plain = {key: value for key, value in calibration.items() if key not in GRANULARITIES}
    lines.append(f"calibrators  {content.get('method', 'mgfc')}: {_list(plain)}")
    lines += [f"  {stage:<10} {_list(calibration[stage] or {})}" for stage in GRANULARITIES if stage in calibration]
    if content["statistics"]:
        batches, afterwards = content["statistics"]["batches"], content["statistics"]["gathered_after_training"]
        lines.append(statistics_in_words(batches, afterwards) or "")
    if content.get("peft"):
        lines.append("beside them  an adapter of PEFT's")
    for name, file in content["files"].items():
        lines.append(f"{name:<20} {file['values']:,} values, {file['bytes']:,} bytes")
    lines += [f"{key}: {_list(value)}" for key, value in training.items()]
    lines += [f"licence: {content.get('license')}", "", "Load it with", *(f"    {line}" for line in content["load"])]
    return "\n".join(map(printable, lines))


def _list(value: object) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
