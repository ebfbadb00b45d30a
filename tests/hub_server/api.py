"""The endpoints of the Hub's HTTP API that huggingface_hub asks for models and data sets.

A data set is a repo of the id ``datasets/NAMESPACE/NAME``; it has a model's endpoints, elsewhere.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote

from hub_server.server import Blob, RefusedError, Reply, is_lfs

ROUTES = []
DATASETS = "datasets/"
DATE = "2026-01-01T00:00:00.000Z"


def route(methods, pattern):
    """Registers the method that answers requests for a path."""
    for name, group in {
        "{repo}": "(?P<repo>[^/]+(?:/[^/]+)?)",
        "{rev}": "(?P<rev>[^/]+)",
        "{path}": "(?P<path>.+)",
    }.items():
        pattern = pattern.replace(name, group)

    def register(function):
        ROUTES.append((methods.split("|"), re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def dispatch(self):
        path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        fault = self.hub.arrived(self.command, unquote(path))
        length = int(self.headers["Content-Length"] or 0)
        self.body = self.rfile.read(length // 2 if fault.drop == "request" else length)
        if fault.drop == "request":
            self.close_connection = True
            return
        try:
            if fault.status:
                raise RefusedError(fault.status, f"Fault {fault.status}")
            with self.hub.lock:
                reply = self.routed(path)
        except RefusedError as refused:
            reply = refused.reply
        if fault.drop == "answer":
            self.close_connection = True
            return
        self.send(reply if isinstance(reply, Reply) else Reply(reply), fault)

    def routed(self, path):
        # A data set has a model's endpoints, elsewhere.
        plain = re.sub("^/(api/)?datasets/", lambda m: "/api/models/" if m[1] else "/", path)
        self.prefix = DATASETS if plain != path else ""
        for methods, pattern, function in ROUTES:
            found = pattern.fullmatch(plain)
            if found and self.command in methods:
                groups = {name: unquote(value or "") for name, value in found.groupdict().items()}
                return function(self, **groups)
        raise RefusedError(404, f"Loopback hub: no endpoint for {self.command} {path}")

    def send(self, reply, fault):
        body, status, headers = reply.body, reply.status, dict(reply.headers)
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json; charset=utf-8"
        if self.command != "HEAD":
            body = fault.alter(body)
        if reply.path and self.command == "GET":
            body, status, headers = self.ranged(body, status, headers)
        headers |= {"Content-Length": len(body)} | fault.headers
        part = b"" if self.command == "HEAD" else body[: fault.cut]
        if reply.path and self.command == "GET" and (part or not body):
            self.hub.fetched.append(reply.path)
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(part)
        self.close_connection |= len(part) < len(body) and self.command != "HEAD"

    def ranged(self, body, status, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not asked:
            return body, status, headers
        start, end = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        content_range = {"Content-Range": f"bytes {start}-{end}/{len(body)}"}
        return body[start : end + 1], 206, headers | content_range

    def log_message(self, *_):
        pass

    # Who asks, and for what.

    def user(self, *, write=False, code=None):
        """The user's name, None without a token."""
        scheme, _, token = (self.headers["Authorization"] or "").partition(" ")
        if scheme and token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        name, can_write = self.hub.tokens[token] if scheme else (None, False)
        if write and name is None:
            raise RefusedError(401, "Invalid username or password.", code)
        if write and not can_write:
            raise RefusedError(403, "Forbidden: you must use a write token for this repository.")
        return name

    def repo(self, repo_id, *, write=False):
        """The repo, if the request may read or write it.

        The client takes any 401 from https://HOST/api/models for a missing repo; here, where it
        is http, the code makes it do the same.
        """
        user, repo = self.user(), self.hub.repos.get(self.prefix + repo_id)
        owner = user == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.user(write=True, code="RepoNotFound")
        if write and not owner:
            raise RefusedError(403, "Forbidden: pass `create_pr=1` to create a Pull Request")
        return repo

    def json(self):
        return json.loads(self.body)

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user = self.user()
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        role = "write" if self.hub.tokens[self.headers["Authorization"].split()[1]][1] else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return {"type": "user", "id": user, "name": user, "orgs": [], "auth": access}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self):
        user, asked = self.user(write=True), self.json()
        namespace = asked.get("organization") or user
        repo_id = f"{namespace}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if namespace != user:
            raise RefusedError(403, "You don't have the rights to create a model")
        if repo_id in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", url=url)
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        return {"url": url, "name": repo_id, "id": repo_id}

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo, rev):
        commit, files = self.repo(repo, write=True).find(rev), []
        for file in self.json()["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, base64.b64decode(file["sample"])) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in commit.blobs:
                answer["oid"] = commit.blobs[path].etag
            files.append(answer)
        return {"commitOid": commit.id, "files": files}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo):
        repo, objects = self.repo(repo, write=True), []
        for asked in self.json()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.objects:
                href = f"{self.hub.endpoint}/lfs/{repo.id}/{asked['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{repo}/(?P<oid>[0-9a-f]{64})")
    def lfs_put(self, repo, oid):
        self.hub.put.append(oid)
        self.hub.repos[repo].objects[oid] = self.body
        return Reply(b"")

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, repo, rev):
        repo = self.repo(repo, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        head, asked = repo.find(rev), header["value"]
        if asked.get("parentCommit", head.id) != head.id:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(head.blobs)
        for operation in operations:
            self.apply(repo, blobs, operation["key"], operation["value"])
        made = self.hub.record(repo, rev, blobs, asked["summary"])
        url = f"{self.hub.endpoint}/{repo.id}/commit/{made.id}"
        return {"success": True, "commitOid": made.id, "commitUrl": url, "hookOutput": ""}

    def apply(self, repo, blobs, key, value):
        path = value["path"]
        if key == "file":
            self.hub.inline.append(path)
            blobs[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            oid = value["oid"]
            self.hub.lfs_paths.setdefault(oid, path)
            blobs[path] = Blob(repo.objects[oid], lfs=True)
        else:
            assert key == "deletedFile", key
            del blobs[path]

    @route("POST", "/api/models/{repo}/branch/(?P<name>[^/]+)")
    def branch(self, repo, name):
        repo = self.repo(repo, write=True)
        if name in repo.branches:
            raise RefusedError(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.find(self.json().get("startingPoint", "main"))
        return {}

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def tag(self, repo, rev):
        repo = self.repo(repo, write=True)
        repo.tags[self.json()["tag"]] = repo.find(rev)
        return {}

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def commits(self, repo, rev):
        return [
            {"id": commit.id, "title": commit.message, "message": "", "authors": [], "date": DATE}
            for commit in self.repo(repo).find(rev).history()
        ]

    @staticmethod
    def entry(path, blob):
        if blob is None:
            oid = hashlib.sha1(path.encode()).hexdigest()
            return {"type": "directory", "path": path, "oid": oid, "size": 0}
        size = len(blob.content)
        file = {"type": "file", "path": path, "oid": blob.git_oid, "size": size}
        return file | blob.lfs_info("oid")

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{path})?")
    def tree(self, repo, rev, path):
        folder, found = f"{path}/" if path else "", {}
        for name, blob in sorted(self.repo(repo).find(rev).blobs.items()):
            if name.startswith(folder):
                parts = name.removeprefix(folder).split("/")
                depth = len(parts) if self.query.get("recursive", "").lower() == "true" else 1
                for i in range(1, depth + 1):
                    found[folder + "/".join(parts[:i])] = blob if i == len(parts) else None
        if not found:
            raise RefusedError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        return [self.entry(name, blob) for name, blob in found.items()]

    @route("GET|HEAD", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo, rev, path):
        repo = self.repo(repo)
        name = repo.id.removeprefix(DATASETS)
        if repo.gated and self.user() != name.split("/")[0]:
            status = 403 if self.user() else 401
            raise RefusedError(status, f"Access to {name} is restricted", "GatedRepo")
        commit = repo.find(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.blobs:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers=headers)
        blob = commit.blobs[path]
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": len(blob.content)}
        return Reply(blob.content, headers=headers, path=path)

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def info(self, repo, rev):
        repo = self.repo(repo)
        commit = repo.find(rev or "main")
        siblings = []
        for path, blob in sorted(commit.blobs.items()):
            more = {"size": len(blob.content), "blobId": blob.git_oid} | blob.lfs_info("sha256")
            siblings.append({"rfilename": path} | (more if "blobs" in self.query else {}))
        return {
            "id": repo.id.removeprefix(DATASETS),
            "sha": commit.id,
            "lastModified": DATE,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }


for _method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
    setattr(Handler, f"do_{_method}", Handler.dispatch)
