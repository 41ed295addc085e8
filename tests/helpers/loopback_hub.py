"""A Hugging Face hub with one model on loopback, and a cache as after a download from the hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(folder: Path, name: str, home: Path) -> None:
    """Copy the files of a folder to where `HF_HOME=home` stores a downloaded hub model."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@contextlib.contextmanager
def hub_of(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder; yields the address (HF_ENDPOINT) and the files downloaded so far."""
    fetched: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            about, _, path = self.path.partition("/resolve/")
            file = folder / path.partition("/")[2]
            if about == f"/{name}" and file.is_file():
                content = file.read_bytes()
                if self.command == "GET":
                    fetched.append(file.name)
                self._answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')
            elif self.path.startswith(f"/api/models/{name}"):
                files = [
                    {
                        "type": "file",
                        "path": f.name,
                        "rfilename": f.name,
                        "size": f.stat().st_size,
                        "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                    }
                    for f in sorted(folder.iterdir())
                ]
                tree = "/tree/" in self.path
                answer = files if tree else {"id": name, "sha": COMMIT, "siblings": files}
                self._answer(200, json.dumps(answer).encode())
            else:
                known = about == f"/{name}"
                self._answer(404, b"", **{"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

        def _answer(self, code: int, content: bytes, **headers: str) -> None:
            self.send_response(code)
            for key, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
