"""Adapters on the Hugging Face Hub, through its own client, and the model card."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mgfc.adapter import GRANULARITIES
from mgfc.distributed import process
from mgfc.errors import AdapterNotFoundError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from mgfc.calibration import Calibration
    from mgfc.checkpoint import Locate

CARD_MARK = "<!-- Written by mgfc and written anew with each save. Remove this line to keep your own edits. -->"


def locate(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Locate:
    """How to reach the files of a Hub repository: all of one commit, downloaded once, cached, and usable offline.

    Raises:
        AdapterNotFoundError: from the returned function, if a file cannot be reached.
    """
    pinned: list[str] = []

    def find(name: str) -> Path:
        at = pinned[0] if pinned else revision
        path = _download(repo_id, name, revision=at, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        # A branch may move between two files: the rest comes from the commit of the first.
        pinned.append(path.parent.name)
        return path

    return find


def _download(repo_id: str, name: str, *, local_files_only: bool, **options: Any) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, name, local_files_only=local_files_only, library_name="mgfc", **options))
    except (OSError, _connection_error(), ValueError) as error:
        if not local_files_only and _is_interruption(error):
            try:
                return Path(hf_hub_download(repo_id, name, local_files_only=True, **options))
            except errors.LocalEntryNotFoundError:
                pass
        raise AdapterNotFoundError(_explain(error, repo_id, name, options.get("revision"))) from error


def _is_interruption(error: Exception) -> bool:
    """Whether the network broke off, as opposed to an answer of the Hub or of the local cache."""
    from huggingface_hub import errors

    return isinstance(error, _connection_error()) and not isinstance(error, errors.HfHubHTTPError)


def _connection_error() -> type[Exception]:
    """The HTTP library's base error, which the client lets through where a connection breaks."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def _explain(error: Exception, repo_id: str, name: str, revision: str | None) -> str:
    from huggingface_hub import errors

    at = f"{repo_id} at {revision or 'main'}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r}: expected an existing directory or a Hub repository (organisation/name), found neither. {error}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its terms on its page, then log in (`hf auth login`) or pass token=."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo_id}: expected a repository on the Hub or a local directory, found neither. If the repository is private, "
            "log in (`hf auth login`) or pass token=."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id}: expected a branch, tag or commit {revision!r}, found none. Leave revision= out for the newest."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{at}: {name} is not in the local cache, and the Hub could not be asked (no network, offline mode or "
            "local_files_only). Load it once with a network, or give a local directory."
        )
    if isinstance(error, errors.EntryNotFoundError):
        return f"{at}: expected a file {name}, found none. It is no mgfc adapter, or its upload is incomplete."
    return f"{at}: {name} could not be downloaded ({type(error).__name__}: {error}). Try again."


def push_to_hub(
    calibration: Calibration,
    repo_id: str,
    *,
    head: nn.Module | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload mgfc adapter",
    create_pr: bool = False,
    **card: Any,
) -> str:
    """Uploads an adapter to the Hugging Face Hub, making the repository if it is missing.

    Other files in the repository stay; so does a model card that was edited. A head of before goes if there is no new one.
    Under `torch.distributed` the first process uploads, and all have to call this where parameters are sharded.

    Args:
        calibration: of a wrapped backbone.
        repo_id: organisation/name.
        head: a segmentation head to keep beside the adapter.
        private: of a new repository; None for the organisation's default.
        token: Hub access token with write permission; None or True for the stored one.
        revision: branch to commit to; None for the main one.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing.
        **card: `training`, `base_model` and `license`, as in `mgfc.checkpoint.save_pretrained`.

    Returns:
        Address of the commit; empty in other processes than the first.

    Raises:
        AdapterNotFoundError: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    from mgfc.checkpoint import CARD, HEAD, save_pretrained

    api = HfApi(token=token, library_name="mgfc")
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(calibration, directory, head=head, **card)
        if process()[0] != 0:
            return ""
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                ignore_patterns=[CARD] if _has_edited_card(api, repo_id, revision) else None,
                delete_patterns=[HEAD] if head is None else None,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        except (OSError, _connection_error(), ValueError) as error:
            raise AdapterNotFoundError(
                f"{repo_id} could not be uploaded ({type(error).__name__}: {error}). Check the name, log in with a token that "
                "may write (`hf auth login`), and try again; nothing was lost locally."
            ) from error
    return str(commit.commit_url)


def _has_edited_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    from huggingface_hub import errors

    from mgfc.checkpoint import CARD

    try:
        return is_edited_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except errors.RemoteEntryNotFoundError:
        return False


def is_edited_card(card: Path) -> bool:
    """Whether somebody made a model card their own, by removing the mark of a generated one."""
    return CARD_MARK not in card.read_text(encoding="utf-8", errors="replace")


def model_card(content: Mapping[str, Any], num_parameters: int) -> str:
    """The model card of an adapter, from the content of its `config.json`."""
    backbone, training = content["backbone"], content["training"]
    header = ["library_name: mgfc", "pipeline_tag: image-segmentation", f"license: {_yaml(content['license'])}"]
    if backbone["base_model"]:
        header += [f"base_model: {_yaml(backbone['base_model'])}", "base_model_relation: adapter"]
    if training.get("datasets"):
        header += ["datasets:", *(f"- {_yaml(name)}" for name in training["datasets"])]
    header += ["tags:", "- mgfc", "- domain-generalization", "- semantic-segmentation"]
    name = backbone["base_model"] or backbone["architecture"]
    lines = ["---", *header, "---", CARD_MARK, "", f"# mgfc adapter for {name}", ""]
    lines += [
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
        'backbone = wrap_backbone(backbone, "organisation/name")  # or a local directory',
        *(['head = load_head("organisation/name")'] if content["head"] else []),
        "```",
        "",
    ]
    if training.get("metrics"):
        lines += ["## Figures", "", "| measured | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in training["metrics"].items()] + [""]
    notes = {key: value for key, value in training.items() if key not in ("metrics", "datasets")}
    if notes:
        lines += ["## Training", "", *(f"- {key}: {value}" for key, value in notes.items()), ""]
    return "\n".join(lines)


def _what(content: Mapping[str, Any]) -> str:
    values = content["calibration"]
    if content["method"] == "rein":
        return f"Rein's refinement (arXiv 2312.04265) with {values['num_tokens']} tokens a block"
    stages = [name for name in GRANULARITIES if values[name] is not None]
    return f"Calibrators ({', '.join(stages) or 'bottleneck only'}) of rank {values['rank']}"


def _yaml(text: str) -> str:
    """A string as a YAML scalar; quoted, as in JSON, unless it is a plain name."""
    return text if re.fullmatch(r"[A-Za-z][\w.-]*[/-][\w./-]*\w|mit", text) else json.dumps(text, ensure_ascii=False)


def _cell(value: object) -> str:
    """What a cell of a Markdown table holds."""
    return " ".join(str(value).split()).replace("|", "\\|")
