"""A Hugging Face Hub on 127.0.0.1, small but stateful: pushing and pulling are tested with the real clients.

    with loopback_hub() as hub:
        subprocess.run([sys.executable, "train.py", "--push_to_hub"], env=hub.environment(), check=True)
        assert hub.files("tester/model") == [".gitattributes", "README.md", "model_index.json"]
        assert len(hub.pushes("tester/model")) == 1

A client runs in a subprocess, as huggingface_hub reads HF_ENDPOINT and its companions once, when imported; or in this
process with `here(hub, monkeypatch)`.

What it answers: whoami, the checks of rights and of a card's metadata, creating and deleting repositories, branches and
tags, repository info, tree, paths-info, refs, commits, preupload, commit (NDJSON), the Git LFS batch and upload, and
resolve with ETag and Range. Writes need the token and an own repository; reads of a private repository need the token.
What it leaves out: Xet storage, pull requests, gated repositories, listing and searching, pagination. An unknown
address gets a 501 that names it: a gap shows instead of looking like a missing file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

STAGES = ("create", "upload", "commit")
USER = "tester"
TOKEN = "hf_loopback_token_for_tests"

# What the Hub's default .gitattributes sends to LFS, as far as this project writes such files.
LFS_SUFFIXES = {".arrow", ".bin", ".ckpt", ".gz", ".npz", ".parquet", ".pt", ".safetensors", ".tar", ".zip"}
LFS_FROM_BYTES = 10 * 1024 * 1024

# A user's own settings that would send a client elsewhere, or let it answer from a warm cache.
_FOREIGN_SETTINGS = (
    "HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_CACHE HUGGINGFACE_HUB_CACHE "
    "HF_DATASETS_CACHE HF_MODULES_CACHE HF_ASSETS_CACHE HF_TOKEN_PATH TRANSFORMERS_CACHE "
    "HUGGING_FACE_HUB_TOKEN HF_HUB_DISABLE_IMPLICIT_TOKEN "
    "http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY"
).split()


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is what git would call the blob, `sha256` names the stored bytes."""

    size: int
    sha256: str
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """One commit: the whole tree after it, and what it changed (`added` lists changed files too)."""

    oid: str
    title: str
    message: str
    date: str
    parent: str | None
    tree: dict[str, Entry]
    added: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass
class Repository:
    kind: str  # "model", "dataset" or "space"
    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)


class Answer(Exception):
    """Raised by a handler to answer with something other than its result."""

    def __init__(self, status: int, message: str, code: str | None = None, headers=None, body=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers: dict[str, str] = headers or {}
        self.body: dict = body or {}


class LoopbackHub:
    """The state of the server and what a test asks of it. Made by `loopback_hub`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.url = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, status, in order of answering
        self.lock = threading.RLock()
        self._failing: dict[str, list[int]] = {}  # stage -> status, how often still
        self._open = {stage: threading.Event() for stage in STAGES}
        self.recover()

    # What tests use.

    def environment(self, **extra: str) -> dict[str, str]:
        """The environment for a client's process: os.environ, foreign Hub settings removed, pointed here."""
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN_SETTINGS}
        environment.update(
            HF_ENDPOINT=self.url,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            HF_HOME=str(self.folder / "hf_home"),
            HF_TOKEN=TOKEN,
            NO_PROXY="127.0.0.1",
        )
        environment.update(extra)
        return environment

    def fail(self, stage: str, status: int = 403, times: int = 10**9) -> None:
        """Make pushes fail from now on, so many `times`, at one of STAGES: "create" is that of the repository, "upload"
        of the LFS bytes. Status 0 breaks off the connection."""
        assert stage in STAGES, stage
        self._failing[stage] = [status, times]

    def hold(self, stage: str) -> None:
        """Let requests of a stage wait until `recover`: a Hub that is slow."""
        self._open[stage].clear()

    def recover(self) -> None:
        """Undo every `fail` and `hold`."""
        self._failing.clear()
        for stage in self._open.values():
            stage.set()

    def add(self, repo_id: str, kind: str = "model", private: bool = False) -> Repository:
        """A new repository, of any owner."""
        repository = Repository(kind, repo_id, private)
        self.repositories[kind, repo_id] = repository
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))
        tree = {".gitattributes": self._store(attributes.encode())}
        self._record(repository, "main", "initial commit", "", None, tree, tree, [])
        return repository

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> list[str]:
        """Sorted paths in a repository, with the .gitattributes that every new repository starts with."""
        return sorted(self._commit(repo_id, kind, revision).tree)

    def read(self, repo_id: str, path: str, kind: str = "model", revision: str = "main") -> bytes:
        """The bytes of one stored file; KeyError where there is none."""
        return self._blob(self._commit(repo_id, kind, revision).tree[path].sha256).read_bytes()

    def pushes(self, repo_id: str, kind: str = "model", branch: str = "main") -> list[Commit]:
        """The commits that clients made on a branch, oldest first (without the one that made it)."""
        with self.lock:
            return self._history(self.repositories[kind, repo_id], self._commit(repo_id, kind, branch))[::-1][1:]

    def exists(self, repo_id: str, kind: str = "model") -> bool:
        return (kind, repo_id) in self.repositories

    # What the handler uses.

    def _commit(self, repo_id: str, kind: str, revision: str) -> Commit:
        with self.lock:
            commit = self.repositories[kind, repo_id].find(revision)
            if commit is None:
                raise KeyError(f"{repo_id} has no revision {revision}")
            return commit

    @staticmethod
    def _history(repository: Repository, commit: Commit) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        history = [commit]
        while history[-1].parent is not None:
            history.append(repository.commits[history[-1].parent])
        return history

    def _blob(self, sha256: str) -> Path:
        assert re.fullmatch(r"[0-9a-f]{64}", sha256), sha256
        return self.blobs / sha256

    def _store(self, content: bytes) -> Entry:
        sha256 = hashlib.sha256(content).hexdigest()
        self._blob(sha256).write_bytes(content)
        return Entry(len(content), sha256, _git_blob_oid(content), lfs=False)

    def _stored_lfs(self, sha256: str, claimed_size: int | None) -> Entry:
        path = self._blob(sha256)
        if not path.exists() or claimed_size not in (None, path.stat().st_size):
            raise Answer(400, f"LFS object {sha256} was not uploaded, or not with the size the commit says")
        size = path.stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return Entry(size, sha256, _git_blob_oid(pointer.encode()), lfs=True)

    def _record(self, repository, branch, title, message, parent, tree, added, deleted) -> Commit:
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        content = json.dumps([parent, title, message, date, sorted((k, v.oid) for k, v in tree.items())])
        oid = hashlib.sha1(f"{len(repository.commits)}{content}".encode()).hexdigest()
        commit = Commit(oid, title, message, date, parent, dict(tree), tuple(added), tuple(deleted))
        repository.commits[oid] = commit
        repository.branches[branch] = oid
        return commit

    def _check_stage(self, stage: str) -> None:
        status, times = self._failing.get(stage, (0, 0))
        if times > 0:
            self._failing[stage] = [status, times - 1]
            raise Answer(status, f"the loopback Hub was told to fail at the {stage} stage")


def _git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# Routes: method, pattern of the raw path, the handler's method. A repository is "name" or "owner/name".
_REPO = r"(?P<kinds>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("DELETE", r"/api/repos/delete", "delete_repo"),
    ("GET", rf"/api/{_REPO}/revision/(?P<revision>.+)", "repo_info"),
    ("GET", rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
    ("POST", rf"/api/{_REPO}/paths-info/(?P<revision>.+)", "paths_info"),
    ("POST", rf"/api/{_REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/api/{_REPO}/commit/(?P<revision>.+)", "commit"),
    ("GET", rf"/api/{_REPO}/commits/(?P<revision>.+)", "commits"),
    ("POST", rf"/api/{_REPO}/branch/(?P<name>.+)", "create_branch"),
    ("DELETE", rf"/api/{_REPO}/branch/(?P<name>.+)", "delete_branch"),
    ("POST", rf"/api/{_REPO}/tag/(?P<revision>.+)", "create_tag"),
    ("GET", rf"/api/{_REPO}/refs", "refs"),
    ("GET", rf"/api/{_REPO}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"/api/{_REPO}", "repo_info"),
    (
        "POST",
        r"/(?P<prefix>datasets/|spaces/)?(?P<repo>[^/]+(?:/[^/]+)?)\.git/info/lfs/objects/batch",
        "lfs_batch",
    ),
    ("PUT", r"/lfs-objects/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    (
        "GET",
        r"/(?P<prefix>datasets/|spaces/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "resolve",
    ),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub  # set on the subclass that `loopback_hub` makes

    # Plumbing.

    def log_message(self, *_):  # a quiet server; hub.requests keeps the record
        pass

    def handle_any(self) -> None:
        # The raw path is matched: %2F inside a revision or a file name must not act as a slash.
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        method = "GET" if self.command == "HEAD" else self.command
        self.body: Path | None = None
        try:
            self.body = self.receive_body()
            for route_method, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and route_method == method:
                    if name in ("lfs_upload", "commit"):
                        self.hub._open[name.removeprefix("lfs_")].wait()
                    arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    with self.hub.lock:
                        result = getattr(self, name)(**arguments)
                    if result is not None:
                        self.send_json(200, result)
                    return
            raise Answer(501, f"the loopback Hub does not implement {self.command} {parts.path}")
        except Answer as answer:
            if not answer.status:
                self.close_connection = True
                return
            headers = {"X-Error-Message": answer.message, **answer.headers}
            if answer.code:
                headers["X-Error-Code"] = answer.code
            self.send_json(answer.status, {"error": answer.message} | answer.body, headers)
        finally:
            if self.body is not None:
                self.body.unlink(missing_ok=True)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def receive_body(self) -> Path | None:
        """The request's body as a temporary file (it may be large, and it may arrive chunked), or None."""
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "").lower()
        length = int(self.headers.get("Content-Length") or 0)
        if not chunked and not length:
            return None
        descriptor, name = tempfile.mkstemp(dir=self.hub.folder, prefix="body-")
        with os.fdopen(descriptor, "wb") as file:
            if not chunked:
                self.copy_exactly(length, file)
            else:
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    self.copy_exactly(size, file)
                    self.rfile.readline()
                while self.rfile.readline() not in (b"\r\n", b"\n", b""):  # trailers
                    pass
        return Path(name)

    def copy_exactly(self, length: int, file) -> None:
        while length:
            chunk = self.rfile.read(min(length, 1 << 20))
            if not chunk:
                raise Answer(400, "the request's body ended early")
            file.write(chunk)
            length -= len(chunk)

    def body_json(self) -> dict:
        return json.loads(self.body.read_bytes()) if self.body else {}

    def send_json(self, status: int, value, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.start(status, len(content), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(content)

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, urlsplit(self.path).path, status))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # Looking things up.

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.authorized():
            raise Answer(401, "Invalid username or password.")

    def require_owner(self, repository: Repository) -> None:
        self.require_token()
        if not repository.repo_id.startswith(f"{USER}/"):
            raise Answer(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")

    def repository(self, repo: str, kinds: str = "models") -> Repository:
        kind = kinds.removesuffix("s")
        found = self.hub.repositories.get((kind, repo))
        # A private repository looks like a missing one to a stranger.
        if found is None or (found.private and not self.authorized()):
            raise Answer(404, "Repository not found", "RepoNotFound")
        return found

    def revision_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The Hub's API, one method a route. A returned value becomes a JSON answer.

    def whoami(self):
        self.require_token()
        token = {"displayName": "loopback", "role": "write"}
        return {
            "type": "user",
            "id": USER,
            "name": USER,
            "fullname": USER,
            "orgs": [],
            "auth": {"accessToken": token},
        }

    def validate_yaml(self):
        """What the Hub refuses of a card's metadata, as far as this project writes such fields."""
        content = self.body_json()["content"]
        front = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = (yaml.safe_load(front.group(1)) if front else None) or {}
        licences = data.get("license", "other")
        errors = [
            f'"license" {name!r} is none of the known'
            for name in (licences if isinstance(licences, list) else [licences])
            if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(name))
        ]
        for entry in data.get("model-index", []):
            for result in entry["results"] if isinstance(entry.get("name"), str) else [{}]:
                kinds = [result.get("task"), result.get("dataset"), *result.get("metrics", [None])]
                typed = all(isinstance(kind, dict) and isinstance(kind.get("type"), str) for kind in kinds)
                if not typed or not all(isinstance(m.get("value"), float) for m in result["metrics"]):
                    errors.append('"model-index" is not valid')
        if errors:
            body = {"errors": [{"message": message} for message in errors], "warnings": []}
            raise Answer(400, "; ".join(errors), body=body)
        return {"errors": [], "warnings": []}

    def auth_check(self, kinds, repo, write=None):
        repository = self.repository(repo, kinds)
        if write:
            self.require_owner(repository)
        return {}

    def create_repo(self):
        self.require_token()
        self.hub._check_stage("create")
        request = self.body_json()
        kind = request.get("type") or "model"
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        if not repo_id.startswith(f"{USER}/"):
            raise Answer(403, "You don't have the rights to create a model under this namespace")
        if (kind, repo_id) in self.hub.repositories:
            raise Answer(409, "You already created this repository", body=answer)
        self.hub.add(repo_id, kind, private=request.get("visibility") == "private")
        return answer

    def delete_repo(self):
        self.require_token()
        request = self.body_json()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        kind = request.get("type") or "model"
        self.repository(repo_id, f"{kind}s")
        del self.hub.repositories[kind, repo_id]
        return {}

    def repo_info(self, kinds, repo, revision="main"):
        repository = self.repository(repo, kinds)
        commit = self.revision_of(repository, revision)
        first = self.hub._history(repository, commit)[-1]
        info = {"_id": first.oid[:24], "id": repo, "author": repo.split("/")[0], "sha": commit.oid}
        info |= {"lastModified": commit.date, "createdAt": first.date, "private": repository.private}
        info |= {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        siblings = []
        for path, entry in sorted(commit.tree.items()):
            sibling = {"rfilename": path}
            if self.query.get("blobs"):
                sibling |= self.describe(path, entry)
            siblings.append(sibling)
        return info | {"siblings": siblings}

    @staticmethod
    def describe(path: str, entry: Entry) -> dict:
        described = {"type": "file", "oid": entry.oid, "blobId": entry.oid, "size": entry.size, "path": path}
        if entry.lfs:
            described["lfs"] = {
                "oid": entry.sha256,
                "sha256": entry.sha256,
                "size": entry.size,
                "pointerSize": 134,
            }
        return described

    def list_paths(self, commit: Commit, expand: bool) -> dict[str, dict]:
        """Every file and folder of a commit by its path, as tree and paths-info describe them."""
        described = {path: self.describe(path, entry) for path, entry in commit.tree.items()}
        for path in commit.tree:
            for parent in list(PurePosixPath(path).parents)[:-1]:
                below = sorted((p, e.oid) for p, e in commit.tree.items() if p.startswith(f"{parent}/"))
                oid = hashlib.sha1(json.dumps(below).encode()).hexdigest()
                described[str(parent)] = {"type": "directory", "oid": oid, "size": 0, "path": str(parent)}
        if expand:
            last = {"id": commit.oid, "title": commit.title, "date": commit.date}
            described = {path: entry | {"lastCommit": last} for path, entry in described.items()}
        return described

    def expands(self, values: list[str] | None) -> bool:
        return bool(values) and str(values[0]).lower() in ("true", "1")

    def tree(self, kinds, repo, revision, path=""):
        commit = self.revision_of(self.repository(repo, kinds), revision)
        path = path.strip("/")
        paths = self.list_paths(commit, self.expands(self.query.get("expand")))
        if path and paths.get(path, {}).get("type") != "directory":
            raise Answer(404, f"{path} does not exist on {revision}", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        below = {name: entry for name, entry in paths.items() if not path or name.startswith(f"{path}/")}
        if not self.expands(self.query.get("recursive")):
            depth = len(PurePosixPath(path).parts) + 1
            below = {name: entry for name, entry in below.items() if len(PurePosixPath(name).parts) == depth}
        return [below[name] for name in sorted(below)]

    def paths_info(self, kinds, repo, revision):
        commit = self.revision_of(self.repository(repo, kinds), revision)
        if "json" in self.headers.get("Content-Type", ""):
            form = self.body_json()
            form["expand"] = [form.get("expand", False)]
        else:
            form = parse_qs(self.body.read_text() if self.body else "")
        paths = self.list_paths(commit, self.expands(form.get("expand")))
        return [paths[path.strip("/")] for path in form.get("paths", []) if path.strip("/") in paths]

    def preupload(self, kinds, repo, revision):
        self.require_token()
        commit = self.revision_of(self.repository(repo, kinds), revision)
        files = []
        for file in self.body_json()["files"]:
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            lfs = binary or PurePosixPath(file["path"]).suffix in LFS_SUFFIXES or file["size"] >= LFS_FROM_BYTES
            present = commit.tree.get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            # The client leaves out of the commit what it finds unchanged.
            files.append(answer | ({"oid": present.etag} if present else {}))
        return {"files": files}

    def commit(self, kinds, repo, revision):
        self.require_token()
        self.hub._check_stage("commit")
        repository = self.repository(repo, kinds)
        self.require_owner(repository)
        if revision not in repository.branches:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        parent = self.revision_of(repository, revision)
        tree, added, deleted, header = dict(parent.tree), [], [], {}
        for line in self.body.read_bytes().splitlines():
            if not line.strip():
                continue
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
                if value.get("parentCommit") not in (None, parent.oid):
                    raise Answer(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = self.hub._store(base64.b64decode(value["content"]))
                added.append(value["path"])
            elif key == "lfsFile":
                tree[value["path"]] = self.hub._stored_lfs(value["oid"], value.get("size"))
                added.append(value["path"])
            elif key in ("deletedFile", "deletedFolder"):
                gone = [p for p in tree if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise Answer(404, f"{value['path']} does not exist", "EntryNotFound")
                for path in gone:
                    del tree[path]
                deleted += gone
            else:
                raise Answer(400, f"unknown operation {key} in a commit")
        title, message = header.get("summary", ""), header.get("description", "")
        made = self.hub._record(repository, revision, title, message, parent.oid, tree, added, deleted)
        prefix = "" if kinds == "models" else f"{kinds}/"
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{self.hub.url}/{prefix}{repo}/commit/{made.oid}",
        }

    def commits(self, kinds, repo, revision):
        repository = self.repository(repo, kinds)
        history = self.hub._history(repository, self.revision_of(repository, revision))
        authors = [{"user": USER}]
        return [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": authors} for c in history
        ]

    def create_branch(self, kinds, repo, name):
        self.require_token()
        repository = self.repository(repo, kinds)
        if name in repository.branches:
            raise Answer(409, f"Reference already exists: {name}")
        start = self.body_json().get("startingPoint") or "main"
        repository.branches[name] = self.revision_of(repository, start).oid
        return {}

    def delete_branch(self, kinds, repo, name):
        self.require_token()
        repository = self.repository(repo, kinds)
        if repository.branches.pop(name, None) is None:
            raise Answer(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    def create_tag(self, kinds, repo, revision):
        self.require_token()
        repository = self.repository(repo, kinds)
        name = self.body_json()["tag"]
        if name in repository.tags:
            raise Answer(409, f"Tag already exists: {name}")
        repository.tags[name] = self.revision_of(repository, revision).oid
        return {}

    def refs(self, kinds, repo):
        repository = self.repository(repo, kinds)

        def listed(references: dict[str, str], where: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": o} for n, o in references.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        return {"branches": branches, "converts": [], "tags": tags, "pullRequests": []}

    def lfs_batch(self, repo, prefix="models/"):
        self.require_token()
        self.repository(repo, prefix.rstrip("/"))
        objects = []
        for wanted in self.body_json()["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub._blob(wanted["oid"]).exists():
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-objects/{wanted['oid']}"}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid):
        self.hub._check_stage("upload")
        content = self.body.read_bytes() if self.body else b""
        if hashlib.sha256(content).hexdigest() != oid:
            raise Answer(400, f"the uploaded bytes do not hash to {oid}")
        self.hub._blob(oid).write_bytes(content)
        return {}

    def resolve(self, repo, revision, path, prefix="models/"):
        commit = self.revision_of(self.repository(repo, prefix.rstrip("/")), revision)
        entry = commit.tree.get(path)
        if entry is None:
            raise Answer(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        content = self.hub._blob(entry.sha256).read_bytes()
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if entry.lfs:
            headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        status = 200
        # "bytes=a-b", "bytes=a-" and "bytes=-n", as in RFC 9110, section 14.1.2.
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(0, len(content) - int(last or 0))
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= stop:
                raise Answer(
                    416,
                    "Requested range not satisfiable",
                    headers={"Content-Range": f"bytes */{len(content)}"},
                )
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.start(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def loopback_hub(folder: str | os.PathLike | None = None) -> Iterator[LoopbackHub]:
    """Serve a Hub on a free port of 127.0.0.1 until the block ends.

    `folder` keeps what is stored (for instance pytest's tmp_path / "hub"; it must not exist yet). Without it
    a temporary folder is made and removed.
    """
    root = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="loopback-hub-")) / "hub"
    hub = LoopbackHub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.recover()
        server.shutdown()
        server.server_close()
        thread.join()
        if folder is None:
            shutil.rmtree(root.parent, ignore_errors=True)


def here(hub: LoopbackHub, monkeypatch) -> None:
    """Let this process's client speak to `hub`, for one test."""
    from huggingface_hub import constants, hf_api

    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(hub.folder / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
