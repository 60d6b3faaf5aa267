"""A server that speaks enough of the hub's protocol for one data set, `user/set`, with two revisions and two splits."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def _rows(revision: str, split: str) -> bytes:
    rows = ({"prompt": f"{revision} {split} {i}", "completion": f" {i}"} for i in range(3))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {rev: {f"{split}.jsonl": _rows(rev, split) for split in ("train", "test")} for rev in ("main", "v1")}
COMMITS = {revision: hashlib.sha1(revision.encode()).hexdigest() for revision in FILES}
REVISIONS = {**{commit: revision for revision, commit in COMMITS.items()}, **{revision: revision for revision in FILES}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *parts: object) -> None:
        pass

    def _send(self, code: int, content: bytes = b"{}", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match self.path.partition("?")[0].strip("/").split("/"):
            case [""]:
                self._send(200)
            case ["api", "datasets", "user", "set", *rest]:
                self._about(rest, asked)
            case ["datasets", "user", "set", "resolve", revision, *name]:
                content = FILES.get(REVISIONS.get(revision, ""), {}).get("/".join(name))
                if content is None:
                    self._send(404, X_Error_Code="EntryNotFound")
                    return
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                commit = COMMITS[REVISIONS[revision]]
                self._send(200, content, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes")
            case _:
                self._send(404, X_Error_Code="RepoNotFound")

    def _about(self, rest: list[str], asked: bytes) -> None:
        revision = REVISIONS.get(rest[1] if len(rest) > 1 else "main")
        if revision is None:
            self._send(404, X_Error_Code="RevisionNotFound")
            return
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in FILES[revision].items()
        ]
        if rest[:1] in ([], ["revision"]):
            names = [{"rfilename": file["path"]} for file in files]
            about = {"id": "user/set", "sha": COMMITS[revision], "private": False, "tags": [], "siblings": names}
            self._send(200, json.dumps({**about, "gated": False, "disabled": False}).encode())
        elif rest[0] == "tree" and len(rest) == 2:
            self._send(200, json.dumps(files).encode())
        elif rest[0] == "paths-info":
            self._send(200, json.dumps([file for file in files if str(file["path"]) in asked.decode()]).encode())
        else:
            self._send(404, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = _answer  # noqa: N815  (names of the base class)


def start() -> str:
    """Start the server in a thread. Returns its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"
