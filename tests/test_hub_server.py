"""The loopback Hub against the real client, so that the tests of `mgfc.storage.hub` may trust it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer, run_python
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    create_repo,
    get_token,
    hf_hub_download,
    snapshot_download,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

try:
    import httpx2 as httpx
except ImportError:  # huggingface_hub before 2.0
    import httpx

REPO = "org/adapter"
WEIGHTS = bytes(range(256)) * 200
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": b"---\nlicense: mit\n---\n# Card\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def pull(filename: str = "config.json", repo_id: str = REPO, **options: object) -> bytes:
    return Path(hf_hub_download(repo_id, filename, **options)).read_bytes()


def ranges(hub: HubServer) -> list[str | None]:
    return [request.headers["Range"] for request in hub.requests if request.method == "GET"]


# Push


def test_environment_is_the_loopback_servers(hub: HubServer) -> None:
    assert hub.endpoint == constants.ENDPOINT and constants.HF_HUB_DISABLE_XET and constants.HF_HUB_DISABLE_TELEMETRY
    assert get_token() is None and not hub.requests


def test_upload_folder_sends_regular_and_lfs_files(logged_in: HubServer, folder: Path) -> None:
    assert create_repo(REPO, private=True).repo_id == REPO
    commit = upload_folder(repo_id=REPO, folder_path=folder)
    assert logged_in.files(REPO, commit.oid).items() > FILES.items() and logged_in.repos[REPO].private
    assert [r.method for r in logged_in.requests if r.path.startswith("/cdn/")] == ["PUT"]
    assert all((Path(snapshot_download(REPO)) / name).read_bytes() == data for name, data in FILES.items())


def test_unchanged_files_make_no_commit(logged_in: HubServer, folder: Path) -> None:
    create_repo(REPO)
    first = upload_folder(repo_id=REPO, folder_path=folder)
    assert upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert len(logged_in.repos[REPO].commits) == 2


def test_create_repo_twice(logged_in: HubServer) -> None:
    create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo(REPO)
    assert create_repo(REPO, exist_ok=True).repo_id == REPO
    assert create_repo("adapter").repo_id == f"{whoami()['name']}/adapter"


def test_branches_tags_and_pull_requests(logged_in: HubServer) -> None:
    api, first = HfApi(), logged_in.put(REPO, FILES)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="dev/a")
    operations = [CommitOperationAdd("config.json", b"new"), CommitOperationDelete("README.md")]
    on_branch = api.create_commit(REPO, operations, commit_message="m", revision="dev/a", parent_commit=first)
    opened = api.create_commit(REPO, [CommitOperationAdd("x", b"1")], commit_message="m", create_pr=True)
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    assert branches == {"main": first, "dev/a": on_branch.oid, "refs/pr/1": opened.oid}
    assert opened.pr_revision == "refs/pr/1" and pull("x", revision="refs/pr/1") == b"1"
    assert logged_in.files(REPO, "dev/a") == {"config.json": b"new", "model.safetensors": WEIGHTS}
    assert [pull(revision=revision) for revision in ("main", "v1", "dev/a")] == [b"{}", b"{}", b"new"]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, operations[1:], commit_message="m", revision="dev/a", parent_commit=first)


def test_pushing_without_the_right_to(hub: HubServer, folder: Path) -> None:
    hub.put(REPO, FILES)
    for token, status in ((None, "401"), (hub.stranger_token, "403"), ("hf_unknown", "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            create_repo("org/other", token=token)
        with pytest.raises(HfHubHTTPError, match=status):
            upload_folder(repo_id=REPO, folder_path=folder, token=token)
    with pytest.raises(RepositoryNotFoundError):
        upload_folder(repo_id="org/missing", folder_path=folder, token=hub.token)
    with pytest.raises(RevisionNotFoundError):
        upload_folder(repo_id=REPO, folder_path=folder, token=hub.token, revision="missing")


def test_a_broken_card_is_refused(logged_in: HubServer, folder: Path) -> None:
    sha = logged_in.put(REPO, {})
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        upload_folder(repo_id=REPO, folder_path=folder)
    assert logged_in.repos[REPO].at("main").sha == sha


def test_an_upload_that_fails_once(logged_in: HubServer, folder: Path) -> None:
    logged_in.put(REPO, {})
    logged_in.fail(match="/cdn/")
    upload_folder(repo_id=REPO, folder_path=folder)
    assert logged_in.files(REPO) == FILES and logged_in.sleeps == [1]
    (folder / "config.json").write_text("[]")
    logged_in.fail(match="/commit/")
    with pytest.raises(HfHubHTTPError, match="503"):
        upload_folder(repo_id=REPO, folder_path=folder)


# Pull


def test_pull_by_branch_tag_and_sha(hub: HubServer) -> None:
    first = hub.put(REPO, {"config.json": b"1"})
    hub.tag(REPO, "v1")
    second = hub.put(REPO, {"config.json": b"2"})
    hub.put(REPO, {"config.json": b"3"}, revision="dev")
    pulled = {revision: pull(revision=revision) for revision in (None, "main", "v1", "dev", first, second)}
    assert pulled == {None: b"2", "main": b"2", "v1": b"1", "dev": b"3", first: b"1", second: b"2"}


def test_a_cached_sha_needs_no_request(hub: HubServer) -> None:
    sha = hub.put(REPO, FILES)
    folder = snapshot_download(REPO, revision=sha)
    hub.requests.clear()
    assert pull(revision=sha) == b"{}" and snapshot_download(REPO, revision=sha) == folder
    assert not hub.requests


def test_snapshot_patterns_and_folders(hub: HubServer) -> None:
    hub.put(REPO, {**FILES, "sub/a/b.json": b"1", "sub/c.json": b"2"})
    folder = Path(snapshot_download(REPO, allow_patterns="sub/*"))
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.json")} == {"sub/a/b.json", "sub/c.json"}
    assert {entry.path for entry in HfApi().list_repo_tree(REPO)} == {*FILES, "sub"}
    assert {entry.path for entry in HfApi().list_repo_tree(REPO, "sub")} == {"sub/a", "sub/c.json"}
    assert HfApi().file_exists(REPO, "config.json") and not HfApi().file_exists(REPO, "nope")


def test_a_token_does_not_reach_the_cdn(logged_in: HubServer) -> None:
    logged_in.put(REPO, FILES, private=True)
    assert pull("model.safetensors") == WEIGHTS
    assert [("Authorization" in request.headers) for request in logged_in.requests] == [True, False]


# What is refused


@pytest.mark.parametrize("download", [pull, lambda **options: snapshot_download(REPO, **options)])
def test_private_gated_and_missing(hub: HubServer, download) -> None:
    with pytest.raises(RepositoryNotFoundError, match="401"):
        download()
    hub.put(REPO, FILES, private=True)
    for token, status in ((None, "401"), (hub.stranger_token, "404")):
        with pytest.raises(RepositoryNotFoundError, match=status) as caught:
            download(token=token)
        assert not isinstance(caught.value, GatedRepoError)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as caught:
        download(token="hf_unknown")
    assert not isinstance(caught.value, RepositoryNotFoundError)
    hub.put(REPO, {}, private=False, gated=True)
    for token, status in ((None, "401"), (hub.stranger_token, "403")):
        with pytest.raises(GatedRepoError, match=status):
            download(token=token)
    assert download(token=hub.token)
    for revision in ("missing", "a" * 40):
        with pytest.raises(RevisionNotFoundError):
            download(token=hub.token, revision=revision)


def test_missing_file(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with pytest.raises(RemoteEntryNotFoundError):
        pull("nope.json")


@pytest.mark.parametrize("repo_id", ["./x/y", "a/b/c", "/tmp/x", "a--b", "org/", "", "org/name@v1"])
def test_malformed_repo_id(hub: HubServer, repo_id: str) -> None:
    with pytest.raises(HFValidationError):
        pull(repo_id=repo_id)
    assert not hub.requests


# What breaks


def test_connection_refused(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    with hub.offline():
        with pytest.raises(LocalEntryNotFoundError) as caught:
            pull()
        assert isinstance(caught.value.__cause__, httpx.ConnectError) and hub.sleeps == [1, 2, 4, 8, 8]
        with pytest.raises(LocalEntryNotFoundError):
            snapshot_download(REPO)
        with pytest.raises(httpx.ConnectError):
            create_repo(REPO, token=hub.token)
    assert not hub.requests
    folder = snapshot_download(REPO)
    hub.sleeps.clear()
    with hub.offline():
        assert pull() == b"{}" and snapshot_download(REPO) == folder
    assert not hub.sleeps


def test_offline_mode(hub: HubServer, request: pytest.FixtureRequest) -> None:
    hub.put(REPO, FILES)
    pull()
    hub.requests.clear()
    request.getfixturevalue("offline_mode")
    assert pull() == b"{}"
    with pytest.raises(LocalEntryNotFoundError) as caught:
        pull("model.safetensors")
    assert isinstance(caught.value.__cause__, OfflineModeIsEnabled)
    with pytest.raises(OfflineModeIsEnabled):
        create_repo(REPO, token=hub.token)
    assert not hub.requests and not hub.sleeps


def test_offline_variable_in_a_new_process(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    pull()
    hub.requests.clear()
    code = f"from huggingface_hub import hf_hub_download as get; print(open(get({REPO!r}, 'config.json')).read())"
    assert run_python(code, HF_HUB_OFFLINE="1").stdout == "{}\n" and not hub.requests
    assert run_python(code).stdout == "{}\n" and len(hub.requests) == 1
    cold = run_python(code.replace("config.json", "model.safetensors"), HF_HUB_OFFLINE="1")
    assert "LocalEntryNotFoundError" in cold.stderr and len(hub.requests) == 1


def test_an_interrupted_download_resumes(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(REPO, FILES)
    hub.cut(times=2, after=1000)
    assert pull("model.safetensors") == WEIGHTS and hub.sleeps == [1, 1]
    assert ranges(hub) == [None, None, None]  # within the client's chunk of 10 MB it starts again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut(times=2, after=1000)
    hub.requests.clear()
    assert pull("model.safetensors", force_download=True) == WEIGHTS
    assert ranges(hub) == [None, "bytes=1000-", "bytes=2000-"]


@pytest.mark.parametrize(("reset", "error", "attempts"), [(False, httpx.RemoteProtocolError, 6), (True, httpx.ReadError, 1)])
def test_a_download_that_never_ends_leaves_no_file(hub: HubServer, reset: bool, error: type[Exception], attempts: int) -> None:
    hub.put(REPO, FILES)
    hub.cut(times=99, reset=reset)
    with pytest.raises(error):
        pull("model.safetensors")
    assert len(ranges(hub)) == attempts
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def test_server_errors(hub: HubServer) -> None:
    hub.put(REPO, FILES)
    hub.fail(times=7)
    with pytest.raises(LocalEntryNotFoundError) as caught:
        pull()
    assert isinstance(caught.value.__cause__, HfHubHTTPError) and hub.sleeps == [1, 2, 4, 8, 8]
    assert pull() == b"{}"
    hub.fail()
    assert pull() == b"{}" and len(hub.sleeps) == 5  # cached: no retry
    hub.fail(status=None)
    with pytest.raises(httpx.RemoteProtocolError):  # hung up on: raised although cached
        pull()


def test_a_bug_of_the_server_is_reported(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="501"):
        HfApi().list_repo_commits(REPO)
    assert "no route for GET" in hub.bugs.pop()
