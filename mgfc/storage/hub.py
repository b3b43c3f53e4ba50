"""An adapter's directory up to the Hugging Face Hub and down from it, through the Hub's own client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgfc.errors import AdapterFileError, AdapterNotFoundError, MGFCError
from mgfc.storage.card import is_edited_card
from mgfc.storage.format import CARD, CONFIG, HEAD
from mgfc.storage.ownership import refuse_foreign
from mgfc.storage.tuner import NO_FILES

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubFiles:
    """Those of a Hub repository: all of one commit, downloaded once, cached, and usable offline.

    Args:
        repo_id: organisation/name.
        revision: branch, tag or commit.
        local_files_only: never use the network.
        **options: `token` and `cache_dir`, as in `wrap_backbone`.
    """

    def __init__(self, repo_id: str, *, revision: str | None = None, local_files_only: bool = False, **options: Any) -> None:
        self._repo_id, self._revision, self._local_files_only, self._options = repo_id, revision, local_files_only, options
        self._again: set[str] | None = None

    def __call__(self, name: str) -> Path:
        """Downloads a file, if it is not in the cache.

        Raises:
            AdapterNotFoundError: if it cannot be reached.
        """
        path = self._fetch(name)
        # A branch may move between two files: the rest comes from the commit of the first.
        self._revision = path.parent.name
        return path

    def _fetch(self, name: str) -> Path:
        options = {**self._options, "revision": self._revision, "local_files_only": self._local_files_only}
        if self._again is not None and name not in self._again:
            self._again.add(name)
            try:
                return _download(self._repo_id, name, force_download=True, **options)
            except AdapterNotFoundError:
                pass  # what the damaged file says tells more
        return _download(self._repo_id, name, **options)

    def begin(self) -> None:
        """Nothing to note: a commit never changes."""

    def is_stale(self, error: MGFCError | None) -> bool:
        """Whether a file was damaged, perhaps by its download: the next read fetches all of them again, once."""
        if not isinstance(error, AdapterFileError) or self._again is not None or self._local_files_only:
            return False
        self._again = set()
        return True


def _download(repo_id: str, name: str, *, local_files_only: bool = False, **options: Any) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, name, local_files_only=local_files_only, library_name="mgfc", **options))
    except (OSError, connection_error(), ValueError) as error:
        if not local_files_only and _is_interruption(error):
            options.pop("force_download", None)
            try:
                return Path(hf_hub_download(repo_id, name, local_files_only=True, **options))
            except errors.LocalEntryNotFoundError:
                pass
        raise AdapterNotFoundError(_explain(error, repo_id, name, options.get("revision"))) from error


def _is_interruption(error: Exception) -> bool:
    """Whether the network broke off, as opposed to an answer of the Hub or of the local cache."""
    from huggingface_hub import errors

    return isinstance(error, connection_error()) and not isinstance(error, errors.HfHubHTTPError)


def connection_error() -> type[Exception]:
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
        AdapterFileError: if the repository holds a model that is no adapter of this library; it stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="mgfc")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        names = api.list_repo_files(repo_id, revision=revision)
        refuse_foreign(repo_id, names, lambda: _download(repo_id, CONFIG, revision=revision, token=token))
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            ignore_patterns=[CARD] if _has_edited_card(api, repo_id, revision) else None,
            delete_patterns=[name for name in (HEAD, *NO_FILES) if not (directory / name).exists()] or None,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    except AdapterFileError:
        raise
    except (OSError, connection_error(), ValueError) as error:
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
