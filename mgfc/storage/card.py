"""The model card of an adapter, by `huggingface_hub`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgfc.storage.format import CARD

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD_MARK = "<!-- Written by mgfc and written anew with each save. Remove this line to keep your own edits. -->"
TASK = "image-segmentation"
_SOMEWHERE = "organisation/name"
_MIOU = re.compile(r"\bm(?:ean )?_?iou\b", re.IGNORECASE)


def is_edited_card(card: Path) -> bool:
    """Whether somebody made a model card their own, by removing the mark of a generated one."""
    return CARD_MARK not in card.read_text(encoding="utf-8", errors="replace")


def model_card(content: Mapping[str, Any], num_parameters: int, statistics: str | None) -> str:
    """The model card of an adapter.

    Args:
        content: of its `config.json`.
        num_parameters: that can be trained.
        statistics: of what they are and when they were gathered, in words; None if there are none.
    """
    from huggingface_hub import ModelCard, ModelCardData

    backbone, training = content["backbone"], content["training"]
    base_model = backbone["base_model"] or None
    name = f"mgfc adapter for {base_model or backbone['architecture']}"
    data = ModelCardData(
        library_name="mgfc",
        pipeline_tag=TASK,
        license=content["license"],
        base_model=base_model,
        base_model_relation=base_model and "adapter",
        datasets=list(training.get("datasets") or []) or None,
        tags=["mgfc", "domain-generalization", "semantic-segmentation"],
        model_name=name,
        eval_results=_results(training) or None,
    )
    return str(
        ModelCard(f"---\n{data.to_yaml()}\n---\n{CARD_MARK}\n\n# {name}\n\n{_text(content, num_parameters, statistics)}")
    )


def name_repository(directory: Path, repo_id: str) -> None:
    """Puts the name of a Hub repository into the code of a directory's card, which was generated before there was one."""
    card = directory / CARD
    if card.exists() and not is_edited_card(card):
        card.write_text(card.read_text(encoding="utf-8").replace(_SOMEWHERE, repo_id), encoding="utf-8")


def loading_code(source: str, head: Mapping[str, Any] | None, revision: str | None = None) -> list[str]:
    """The lines of Python that load an adapter, and the head beside it.

    Args:
        source: its directory or Hub repository.
        head: what `config.json` says of the head, whose module the user has to build if it is not a `SegmentationHead`.
        revision: branch, tag or commit of the repository.
    """
    options = "" if revision is None else f", revision={json.dumps(revision)}"
    lines = [f"backbone = wrap_backbone(backbone, {json.dumps(source)}{options})"]
    if not head:
        return lines
    module = "" if head.get("class") == "SegmentationHead" else ", head"
    return [*lines, f"head = load_head({json.dumps(source)}{module}{options})"]


def _results(training: Mapping[str, Any]) -> list[EvalResult]:
    """The figures that the Hub shows as results: numbers, named after the data that they were measured on."""
    from huggingface_hub import EvalResult

    found = []
    for key, value in (training.get("metrics") or {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        is_miou = _MIOU.search(str(key)) is not None
        dataset = _MIOU.sub("", str(key)).strip(" ,:;-") if is_miou else ""
        dataset = dataset or ", ".join(training.get("datasets") or []) or "unknown"
        found.append(
            EvalResult(
                task_type=TASK,
                dataset_type=_identifier(dataset),
                dataset_name=dataset,
                metric_type="mean_iou" if is_miou else _identifier(str(key)),
                metric_name=str(key),
                metric_value=value,
            )
        )
    return found


def _identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9_/.-]+", "-", text.lower()).strip("-") or "unknown"


def _text(content: Mapping[str, Any], num_parameters: int, statistics: str | None) -> str:
    """What a reader sees below the title."""
    backbone, training = content["backbone"], content["training"]
    lines = [
        f"{_what(content)} for a frozen "
        f"{backbone['architecture']} of {backbone['depth']} blocks and width {backbone['embed_dim']}: "
        f"{num_parameters:,} parameters. "
        "Made with mgfc, an implementation of the published description of Multi-Granularity Feature Calibration "
        "(arXiv 2508.03007).",
        "",
        "## Use",
        "",
        "```python",
        "from mgfc import load_head, wrap_backbone" if content["head"] else "from mgfc import wrap_backbone",
        "",
        *loading_code(_SOMEWHERE, content["head"]),
        "```",
        "",
    ]
    if training.get("metrics"):
        lines += ["## Figures", "", "| measured | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in training["metrics"].items()] + [""]
    notes = {key: value for key, value in training.items() if key not in ("metrics", "datasets")}
    listed = [*(f"{_cell(key)}: {_cell(value)}" for key, value in notes.items()), *([statistics] if statistics else [])]
    if listed:
        lines += ["## Training", "", *(f"- {line}" for line in listed), ""]
    return "\n".join(lines)


def _what(content: Mapping[str, Any]) -> str:
    values = content["calibration"]
    if content["method"] == "rein":
        return f"Rein's refinement (arXiv 2312.04265) with {values['num_tokens']} tokens a block"
    stages = [name for name in ("coarse", "medium", "fine") if values[name] is not None]
    if values["rank"] is None:
        return f"Calibrators ({', '.join(stages) or 'none'}) without low-rank adapters"
    return f"Calibrators ({', '.join(stages) or 'low-rank adapter only'}) of rank {values['rank']}"


def _cell(value: object) -> str:
    """What a cell of a Markdown table holds."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
