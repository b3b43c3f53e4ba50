"""A Hugging Face Hub in memory, behind a loopback HTTP server, for the real `huggingface_hub` client.

It speaks the routes that model repositories need: create, upload (regular and LFS files), commit, branches, tags,
listing and download, with the Hub's rules for private and gated repositories. `HF_ENDPOINT` must name its `endpoint`
before huggingface_hub is imported; `conftest.py` does that and offers a `hub` fixture.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

# What a listing may be asked to show of each model.
SHOWN = ("cardData", "downloads", "gated", "library_name", "likes", "model-index", "pipeline_tag", "private", "sha", "tags")
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz")
OWNER, STRANGER = "owner", "stranger"


class Request(NamedTuple):
    method: str
    path: str
    query: str
    headers: Message


@dataclass(frozen=True)
class Blob:
    """One version of one file; `oid` is what git or LFS would call it, and the client's ETag."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    downloads: int = 0
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> Commit:
        tree = "".join(f"{path}\0{blob.oid}\n" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)} {branch} {title}\n{tree}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, files)
        self.branches.setdefault(branch, []).append(self.commits[sha])
        return self.commits[sha]

    def at(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        commit = self.tags.get(revision) or self.commits.get(revision)
        return commit or refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def shown(self) -> dict[str, Any]:
        """What a listing shows of a model, with the tags that the Hub derives from the card's header."""
        card = self.at("main").files.get("README.md", Blob(b"", False)).data.decode()
        header = front_matter(card) or {}
        index = header.pop("model-index", None)
        base_models, relation = _as_list(header.get("base_model")), header.get("base_model_relation", "finetune")
        tags = [*_as_list(header.get("tags")), *_as_list(header.get("library_name"))]
        tags += [f"dataset:{name}" for name in _as_list(header.get("datasets"))]
        tags += [f"base_model:{name}" for name in base_models]
        tags += [f"base_model:{relation}:{name}" for name in base_models]
        tags += [f"license:{name}" for name in _as_list(header.get("license"))] + ["region:us"]
        shown = {
            "cardData": header,
            "downloads": self.downloads,
            "gated": "manual" if self.gated else False,
            "library_name": header.get("library_name"),
            "likes": 0,
            "model-index": index,
            "pipeline_tag": header.get("pipeline_tag"),
            "private": self.private,
            "sha": self.at("main").sha,
            "tags": list(dict.fromkeys(tags)),
        }
        return {key: value for key, value in shown.items() if value is not None}


def _as_list(value: Any) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def front_matter(card: str) -> dict[str, Any] | None:
    """The header of a card; None if it has none.

    Raises:
        ValueError: if it is no YAML mapping.
    """
    found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    if not found:
        return None
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(header, dict):
        raise ValueError("the metadata is not a mapping")
    return header


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    is_file: bool = False


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `match`."""

    times: int
    match: str = ""
    status: int | None = None
    is_cut: bool = False
    after: int | None = None
    reset: bool = False


class Refusal(Exception):
    def __init__(self, reply: Reply):
        super().__init__(reply.body["error"])
        self.reply = reply


def refuse(status: int, message: str, code: str | None = None, **headers: str) -> Any:
    codes = {"X-Error-Code": code} if code else {}
    raise Refusal(Reply(status, {"error": message}, {"X-Error-Message": message, **codes, **headers}))


Action = Callable[..., Reply]
ROUTES: list[tuple[str, re.Pattern[str], Action]] = []


def route(method: str, pattern: str) -> Callable[[Action], Action]:
    """Serve a method of HubServer; `{repo}`, `{rev}`, ... in the pattern become its keyword arguments."""
    shapes = {"repo": "[^/]+(?:/[^/]+)?", "rev": "[^/]+", "path": ".*", "oid": "[0-9a-f]{64}"}
    regex = re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{shapes[m[1]]})", pattern)

    def register(action: Action) -> Action:
        ROUTES.append((method, re.compile(regex), action))
        return action

    return register


class HubServer:
    """The Hub: its repositories, its users, and what tests want to know or to break.

    `token` belongs to a user who may read and write everything, `stranger_token` to one with no access to private or
    gated repositories. The "CDN" of LFS files is this server under the name `localhost`: for the client, another host.
    """

    token, stranger_token = "hf_owner", "hf_stranger"
    page = 1000  # models in one answer of a listing

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listener = _Listener(self, port=0)
        self._thread: threading.Thread | None = None
        self.port: int = self._listener.server_address[1]
        self.endpoint, self.cdn = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        self.reset()

    def reset(self) -> None:
        """An empty Hub that is up and has seen nothing."""
        with self._lock:
            self.repos: dict[str, Repo] = {}
            self.lfs: dict[str, bytes] = {}
            self.requests: list[Request] = []
            self.sleeps: list[float] = []
            self.bugs: list[str] = []
            self._faults: list[Fault] = []
            self.page = type(self).page
        self.start()

    # What tests use

    def put(
        self,
        repo_id: str,
        files: dict[str, bytes],
        revision: str = "main",
        private: bool | None = None,
        gated: bool | None = None,
    ) -> str:
        """Commit `files` on top of a branch, creating repository and branch where missing; the sha of the commit."""
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo())
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else gated
            head = repo.branches.get(revision) or repo.branches.get("main")
            blobs = {path: Blob(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
            self.lfs.update({blob.oid: blob.data for blob in blobs.values() if blob.lfs})
            return repo.commit(revision, {**(head[-1].files if head else {}), **blobs}, "put").sha

    def tag(self, repo_id: str, tag: str, revision: str = "main") -> None:
        self.repos[repo_id].tags[tag] = self.repos[repo_id].at(revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.repos[repo_id].at(revision).files.items()}

    def fail(self, times: int = 1, status: int | None = 503, match: str = "") -> None:
        """Answer the next requests with `status`, or hang up without an answer where it is None."""
        self._faults.append(Fault(times, match, status))

    def cut(self, times: int = 1, after: int | None = None, reset: bool = False) -> None:
        """Break the next file downloads off after so many bytes of the body (default: half), by FIN or by RST."""
        self._faults.append(Fault(times, is_cut=True, after=after, reset=reset))

    @contextmanager
    def offline(self) -> Iterator[None]:
        """Connections are refused."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def start(self) -> None:
        if self._thread is None:
            self._listener.server_activate()
            self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._thread.join()
            self._thread = None
            # Bound but not listening: the port refuses connections and nobody else can take it.
            self._listener = _Listener(self, self.port)

    # How a request is answered

    def answer(self, request: Request, body: bytes) -> tuple[Reply, Fault | None]:
        with self._lock:
            self.requests.append(request)
            if fault := self._fault(request.path, is_cut=False):
                return Reply(fault.status or 0, {"error": "injected"}), fault
            try:
                reply = self._dispatch(request, body)
            except Refusal as refusal:
                reply = refusal.reply
            except Exception:
                # The client may fall back to its cache and hide it: the `hub` fixture looks at `bugs`.
                self.bugs.append(traceback.format_exc())
                reply = Reply(501, {"error": self.bugs[-1]})
            cut = self._fault(request.path, is_cut=True) if reply.is_file and request.method == "GET" else None
            return reply, cut

    def _dispatch(self, request: Request, body: bytes) -> Reply:
        for method, pattern, action in ROUTES:
            names = pattern.fullmatch(request.path)
            if names and method in (request.method, {"HEAD": "GET"}.get(request.method)):
                return action(self, request, body, **{k: unquote(v) for k, v in names.groupdict().items() if v})
        raise NotImplementedError(f"hub_server.py has no route for {request.method} {request.path}")

    def _fault(self, path: str, is_cut: bool) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and fault.is_cut == is_cut and fault.match in path:
                fault.times -= 1
                return fault
        return None

    def _user(self, request: Request) -> str | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        users = {self.token: OWNER, self.stranger_token: STRANGER}
        return users.get(token) or refuse(401, "Invalid credentials in Authorization header")

    def _repo(self, request: Request, repo_id: str, write: bool = False, content: bool = False) -> Repo:
        user, repo = self._user(request), self.repos.get(repo_id)
        if repo is None or (repo.private and user != OWNER):
            # As on the Hub, a stranger cannot tell a private repository from a missing one.
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            return refuse(status, message, "RepoNotFound")
        if write and user != OWNER:
            refuse(403 if user else 401, "You don't have the rights to write to this repository")
        if content and repo.gated and user != OWNER:
            refuse(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repo

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request, body: bytes) -> Reply:
        user = self._user(request) or refuse(401, "Invalid username or password.")
        return Reply(body={"type": "user", "name": user, "orgs": [{"name": "org"}] if user == OWNER else []})

    @route("POST", "/api/repos/create")
    def _create(self, request: Request, body: bytes) -> Reply:
        wish = json.loads(body)
        user = self._user(request) or refuse(401, "Invalid username or password.")
        repo_id = f"{wish.get('organization') or user}/{wish['name']}"
        if user != OWNER and wish.get("organization") not in (None, user):
            refuse(403, f"You don't have the rights to create a model under the namespace {wish['organization']}")
        if repo_id in self.repos:
            return Reply(409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{repo_id}"})
        self.repos[repo_id] = Repo(private=wish.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.repos[repo_id].commit("main", {".gitattributes": Blob(attributes.encode(), False)}, "initial commit")
        return Reply(body={"url": f"{self.endpoint}/{repo_id}"})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request, body: bytes) -> Reply:
        try:
            header = front_matter(json.loads(body)["content"])
        except ValueError as error:
            return Reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        missing = [{"message": "empty or missing yaml metadata in repo card"}] if header is None else []
        return Reply(body={"errors": [], "warnings": missing})

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def _preupload(self, request: Request, body: bytes, repo: str, rev: str) -> Reply:
        present = self._repo(request, repo, write=True).at(rev).files

        def plan(path: str) -> dict[str, Any]:
            oid = {"oid": present[path].oid} if path in present else {}
            return {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                **oid,
            }

        return Reply(body={"files": [plan(item["path"]) for item in json.loads(body)["files"]]})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, body: bytes, repo: str) -> Reply:
        self._repo(request, repo, write=True)
        verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"}
        objects = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(body)["objects"]]
        for item in objects:
            if item["oid"] not in self.lfs:
                item["actions"] = {"upload": {"href": f"{self.cdn}/cdn/{item['oid']}"}, "verify": verify}
        return Reply(body={"transfer": "basic", "objects": objects})

    @route("PUT", "/cdn/{oid}")
    def _lfs_upload(self, request: Request, body: bytes, oid: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != oid:
            refuse(400, "The content does not match its sha256")
        self.lfs[oid] = body
        return Reply()

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify")
    def _lfs_verify(self, request: Request, body: bytes, repo: str) -> Reply:
        self._repo(request, repo, write=True)
        item = json.loads(body)
        return Reply() if len(self.lfs.get(item["oid"], b"")) == item["size"] else refuse(404, "Object not found")

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def _commit(self, request: Request, body: bytes, repo: str, rev: str) -> Reply:
        target = self._repo(request, repo, write=True)
        if rev not in target.branches:
            refuse(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        lines = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
        header = next(value for key, value in lines if key == "header")
        if header.get("parentCommit", head := target.at(rev).sha) != head:
            refuse(412, "The branch has moved on since parentCommit")
        files = self._edited(target.at(rev).files, lines)
        pull_request = None
        if "create_pr=1" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in target.branches)
            rev, pull_request = f"refs/pr/{number}", f"{self.endpoint}/{repo}/discussions/{number}"
        sha = target.commit(rev, files, header["summary"]).sha
        url = f"{self.endpoint}/{repo}/commit/{sha}"
        return Reply(body={"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": pull_request})

    def _edited(self, files: dict[str, Blob], lines: list[tuple[str, dict[str, Any]]]) -> dict[str, Blob]:
        files = dict(files)
        for key, value in lines:
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    refuse(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Blob(self.lfs[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(f"{value['path']}/")}
        return files

    @route("POST", "/api/models/{repo}/branch/{rev}")
    def _create_branch(self, request: Request, body: bytes, repo: str, rev: str) -> Reply:
        target = self._repo(request, repo, write=True)
        if rev in target.branches:
            refuse(409, f"Reference already exists: {rev}")
        target.branches[rev] = [target.at(json.loads(body).get("startingPoint", "main"))]
        return Reply()

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def _create_tag(self, request: Request, body: bytes, repo: str, rev: str) -> Reply:
        target, tag = self._repo(request, repo, write=True), json.loads(body)["tag"]
        if tag in target.tags:
            refuse(409, f"Tag reference exists already: {tag}")
        target.tags[tag] = target.at(rev)
        return Reply()

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, request: Request, body: bytes, repo: str) -> Reply:
        target = self._repo(request, repo)
        heads = {name: commits[-1].sha for name, commits in target.branches.items()}

        def listed(kind: str, shas: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in shas.items()]

        tags = listed("tags", {name: commit.sha for name, commit in target.tags.items()})
        return Reply(body={"branches": listed("heads", heads), "tags": tags, "converts": [], "pullRequests": []})

    @route("GET", "/api/models")
    def _models(self, request: Request, body: bytes) -> Reply:
        """Those that have all tags and words that were asked for, page by page."""
        user, query = self._user(request), parse_qs(request.query)
        if unknown := set(query) - {"filter", "search", "sort", "limit", "expand", "cursor"}:
            raise NotImplementedError(f"hub_server.py lists no models by {unknown}")
        shown = query.get("expand") or [name for name in SHOWN if name not in ("cardData", "model-index")]
        if unknown := set(shown) - set(SHOWN):
            refuse(400, f"Invalid expand: {unknown}")
        visible = {name: repo.shown() for name, repo in self.repos.items() if not repo.private or user == OWNER}
        words = query.get("search", [""])[0].lower().split()
        found = [
            (name, item)
            for name, item in visible.items()
            if set(query.get("filter", [])) <= set(item["tags"]) and all(word in name.lower() for word in words)
        ]
        for key in query.get("sort", []):
            found.sort(key=lambda pair: pair[1][key], reverse=True)
        start = int(query.get("cursor", ["0"])[0])
        stop = start + min(int(query.get("limit", [self.page])[0]), self.page)
        following = {**{key: values for key, values in query.items() if key != "cursor"}, "cursor": [stop]}
        link = f'<{self.endpoint}/api/models?{urlencode(following, doseq=True)}>; rel="next"'
        page = [{"id": name, **{key: item[key] for key in shown if key in item}} for name, item in found[start:stop]]
        return Reply(body=page, headers={"Link": link} if stop < len(found) else {})

    @route("GET", "/api/models/{repo}/revision/{rev}")
    @route("GET", "/api/models/{repo}")
    def _info(self, request: Request, body: bytes, repo: str, rev: str = "main") -> Reply:
        target = self._repo(request, repo)
        commit, flags = target.at(rev), {"private": target.private, "gated": "manual" if target.gated else False}
        return Reply(body={"id": repo, "sha": commit.sha, **flags, "siblings": [{"rfilename": path} for path in commit.files]})

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
    def _tree(self, request: Request, body: bytes, repo: str, rev: str, path: str = "") -> Reply:
        recursive = parse_qs(request.query).get("recursive") == ["true"]
        prefix, entries = f"{path}/" if path else "", {}
        for name, blob in self._repo(request, repo).at(rev).files.items():
            if not name.startswith(prefix):
                continue
            folders = [name[:at] for at in range(len(prefix), len(name)) if name[at] == "/"]
            for folder in folders if recursive else folders[:1]:
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or not folders:
                pointer = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
                oid = hashlib.sha1(blob.data).hexdigest() if blob.lfs else blob.oid
                entries[name] = {"type": "file", "path": name, "size": len(blob.data), "oid": oid}
                entries[name] |= {"lfs": pointer} if blob.lfs else {}
        if path and not entries:
            refuse(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return Reply(body=list(entries.values()))

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def _resolve(self, request: Request, body: bytes, repo: str, rev: str, path: str) -> Reply:
        commit = self._repo(request, repo, content=True).at(rev)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path) or refuse(404, "Entry not found", "EntryNotFound", **headers)
        if blob.lfs:
            linked = {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
            return Reply(302, headers={**headers, **linked, "Location": f"{self.cdn}/cdn/{quote(blob.oid)}"})
        return self._content(request, blob.data, {**headers, "ETag": f'"{blob.oid}"'})

    @route("GET", "/cdn/{oid}")
    def _cdn(self, request: Request, body: bytes, oid: str) -> Reply:
        if "Authorization" in request.headers:
            refuse(400, "The CDN's addresses are signed: a token must not leak to it")
        return self._content(request, self.lfs[oid], {"ETag": f'"{oid}"'})

    def _content(self, request: Request, data: bytes, headers: dict[str, str]) -> Reply:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not span:
            return Reply(200, data, headers, is_file=True)
        start, stop = int(span[1]), min(int(span[2] or len(data)) + 1, len(data))
        if start >= len(data):
            refuse(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        return Reply(206, data[start:stop], headers, is_file=True)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, one request a connection: no connection outlives `HubServer.stop`."""

    server: _Listener

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = Request(self.command, url.path, url.query, self.headers)
        reply, fault = self.server.hub.answer(request, self._body())
        data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        if fault and fault.is_cut:
            data, size = data[: len(data) // 2 if fault.after is None else fault.after], len(data)
        elif fault and fault.status is None:
            return
        else:
            size = len(data)
        with suppress(ConnectionError):
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(size)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data if self.command != "HEAD" else b"")
        if fault and fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer, port: int):
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.hub = hub
        self.server_bind()


def hub_environment(endpoint: str, home: str) -> dict[str, str]:
    """This process's environment, less the user's own Hub settings and token, with the client pointed at `endpoint`."""
    ours = re.compile(r"HF_|HUGGING_?FACE|(TRANSFORMERS|HF_DATASETS)_(OFFLINE|CACHE)")
    return {name: value for name, value in os.environ.items() if not ours.match(name)} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, for settings that the client reads once, at import (HF_HUB_OFFLINE)."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
