"""A Hugging Face hub on loopback that holds one model, and that can cut a download in the middle."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of a directory as `someone/tiny`.

    Attributes:
        address: for `HF_ENDPOINT`.
        cuts: while it is set, weights end half-way, and the connection with them.
        sent: names of the files that were asked for, with the first byte asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.cuts = directory, False
        self.sent: list[tuple[str, int]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                name = path.removeprefix("/someone/tiny/resolve/").partition("/")[2]
                file = hub.directory / name
                if path.startswith("/api/models/someone/tiny/tree/"):
                    files = [each for each in sorted(hub.directory.iterdir()) if each.is_file()]
                    listed = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files
                    ]
                    self._send(json.dumps(listed).encode(), with_body)
                elif path.startswith("/api/models/someone/tiny"):
                    names = [{"rfilename": each.name} for each in sorted(hub.directory.iterdir())]
                    self._send(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": names}).encode(), with_body)
                elif path.startswith("/someone/tiny/resolve/") and file.is_file():
                    self._send_file(file, with_body)
                else:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def _send(self, content: bytes, with_body: bool) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if with_body:
                    self.wfile.write(content)

            def _send_file(self, file: Path, with_body: bool) -> None:
                content = file.read_bytes()
                start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(content) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if not with_body:
                    return
                hub.sent.append((file.name, start))
                if hub.cuts and file.suffix == ".safetensors":
                    self.wfile.write(content[start : start + (len(content) - start) // 2])
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.wfile.write(content[start:])

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        """Answer while the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join(5)
