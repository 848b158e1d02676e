"""A model hub on loopback, as far as huggingface_hub's client asks one: repositories are folders, a commit each."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories by name, `OWNER/NAME` -> revision -> folder; a revision is a commit, and `main` the last one.

    asked: the paths of all requests that were made. `owner/gated` is there, and refuses who has no licence.
    """

    def __init__(self, repos: Mapping[str, Mapping[str, Path]]) -> None:
        self.repos, self.asked, self.url = repos, list[str](), ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if is_api else parts[:2])
        if repo == "owner/gated":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted"}, b""
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": f"no repository {repo}"}, b""
        revisions, rest = self.repos[repo], parts[4:] if is_api else parts[2:]
        revision = rest[1] if rest else "main"
        commit = [*revisions][-1] if revision == "main" else revision
        if commit not in revisions:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"no revision {revision}"}, b""
        folder = revisions[commit]
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if is_api and rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": _etag(folder / name)}
                for name in files
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if is_api:
            info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        file = folder / "/".join(rest[2:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_etag(file)}"'}, file.read_bytes()


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def fake_hub(repos: Mapping[str, Mapping[str, Path]]) -> Iterator[FakeHub]:
    """A hub of these repositories while the block runs; `HF_ENDPOINT` of a process leads to its `url`."""
    hub = FakeHub(repos)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(urlsplit(self.path).path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
