"""An HTTP server of files for tests, which plays the hub and can be told to fail."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.files`; `server.faults` are what the next GETs do wrong, one each."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(only_head=True)

    def do_GET(self) -> None:
        self.server.seen[self.path] += 1
        fault = next(self.server.faults, None)
        if fault is None:
            self.answer()
        else:
            fault(self)

    def answer(self, only_head: bool = False, ranges: bool = True) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        begin = int((self.headers["Range"] or "bytes=0-")[6:-1]) if ranges else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if not only_head:
            self.wfile.write(content[begin:])

    def content(self) -> bytes:
        begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
        return self.server.files[self.path][begin:]


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[ThreadingHTTPServer]:
    """Serve these contents by their paths."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.faults, server.seen = files, iter([]), Counter()
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def address(server: ThreadingHTTPServer, path: str) -> str:
    """Where it serves a path."""
    return f"http://127.0.0.1:{server.server_address[1]}{path}"
