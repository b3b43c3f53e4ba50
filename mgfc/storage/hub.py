"""An adapter's directory up to the Hugging Face Hub and down from it, through the Hub's own client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgfc.errors import AdapterNotFoundError
from mgfc.storage.card import is_edited_card
from mgfc.storage.format import CARD, HEAD

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def locate(repo_id: str, *, revision: str | None = None, **options: Any) -> Callable[[str], Path]:
    """How to reach the files of a Hub repository: all of one commit, downloaded once, cached, and usable offline.

    Args:
        repo_id: organisation/name.
        revision: branch, tag or commit.
        **options: `token`, `cache_dir` and `local_files_only`, as in `wrap_backbone`.

    Raises:
        AdapterNotFoundError: from the returned function, if a file cannot be reached.
    """
    pinned: list[str] = []

    def find(name: str) -> Path:
        path = _download(repo_id, name, revision=pinned[0] if pinned else revision, **options)
        # A branch may move between two files: the rest comes from the commit of the first.
        pinned.append(path.parent.name)
        return path

    return find


def _download(repo_id: str, name: str, *, local_files_only: bool = False, **options: Any) -> Path:
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


def upload(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload mgfc adapter",
    create_pr: bool = False,
) -> str:
    """Uploads an adapter's directory, making the repository if it is missing.

    Other files in the repository stay; so does a model card that was edited. A head of before goes if there is no new one.

    Args:
        directory: what `mgfc.storage.directory.save` wrote.
        repo_id: organisation/name.
        private: of a new repository; None for the organisation's default.
        token: Hub access token with write permission; None or True for the stored one.
        revision: branch to commit to; None for the main one.
        commit_message: of the commit.
        create_pr: open a pull request instead of committing.

    Returns:
        Address of the commit.

    Raises:
        AdapterNotFoundError: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="mgfc")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            ignore_patterns=[CARD] if _has_edited_card(api, repo_id, revision) else None,
            delete_patterns=None if (directory / HEAD).exists() else [HEAD],
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

    try:
        return is_edited_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except errors.RemoteEntryNotFoundError:
        return False
