"""A stand-in for the Hugging Face hub: the part of its HTTP interface that pushing and fetching a model uses."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_right"


class Hub:
    """Repositories by name: branches to commits, commits to files. `requests`: what was asked, method and path."""

    def __init__(self):
        self.repos, self.branches, self.objects, self.private, self.requests = {}, {}, {}, set(), []

    def files(self, repo, revision="main"):
        return self.repos[repo][self.branches[repo].get(revision, revision)]

    def commit(self, repo, branch, files):
        sha = hashlib.sha1(f"{repo}{branch}{len(self.repos[repo])}".encode()).hexdigest()
        self.repos[repo][sha] = files
        self.branches[repo][branch] = sha
        return sha


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def body(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(length)

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_one(self):
        path, hub, body = unquote(urlparse(self.path).path), self.hub, self.body()
        hub.requests.append((self.command, path))
        if (
            self.command in ("POST", "PUT")
            and not path.startswith("/objects")
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.answer({"error": "no"}, 401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.repos:
                return self.answer({"error": "there is one", "url": f"http://{self.headers['Host']}/{name}"}, 409)
            hub.repos[name], hub.branches[name] = {}, {}
            hub.commit(name, "main", {})
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            return self.model(match[1], match[2], match[3], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"http://{self.headers['Host']}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/objects/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            hub.objects[path.rpartition("/")[2]] = body
            return self.answer()
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            content = hub.files(name, revision).get(file)
            if content is None:
                return self.answer(status=404, X_Error_Code="EntryNotFound")
            sha = hub.branches[name].get(revision, revision)
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(content, ETag=etag, X_Repo_Commit=sha, X_Linked_Size=str(len(content)))
        return self.answer({"error": path}, 404)

    def model(self, name, verb, rest, body):
        hub = self.hub
        if name not in hub.repos:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if verb == "branch":
            hub.branches[name].setdefault(rest, hub.branches[name]["main"])
            return self.answer({})
        if verb == "preupload":
            large = [one["path"] for one in json.loads(body)["files"] if one["path"].endswith(".safetensors")]
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"] in large else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if verb == "commit":
            files = dict(hub.files(name, rest))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            sha = hub.commit(name, rest, files)
            return self.answer({"commitOid": sha, "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{sha}"})
        if verb == "tree":
            found = hub.files(name, rest.split("/")[0])
            return self.answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in found.items()
                ]
            )
        revision = rest or "main"
        if revision not in hub.branches[name] and revision not in hub.repos[name]:
            return self.answer({"error": "no such revision"}, 404, X_Error_Code="RevisionNotFound")
        sha = hub.branches[name].get(revision, revision)
        siblings = [{"rfilename": path} for path in hub.repos[name][sha]]
        return self.answer(
            {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False, "tags": []}
        )

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815


@contextmanager
def running():
    """A hub on a free port: the hub, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
