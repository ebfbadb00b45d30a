"""A web server on 127.0.0.1 that serves bytes, ranges of them, and every fault a test asks for."""

import hashlib
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock


@dataclass(frozen=True)
class Answer:
    """How one request is answered; the default serves the file, or the range that is asked for.

    ``status`` other than 200 is sent without a body, and 0 closes the connection without a word.
    ``cut`` closes it after that many bytes of the body. ``announce`` is another Content-Length than
    the true one. ``framing`` says how the end is told: "length", "chunked", or "close" for not at
    all. ``hang`` stays silent after the ``cut``, from the start without one, and does not close.
    """

    status: int = 200
    headers: dict = field(default_factory=dict)
    cut: int | None = None
    announce: int | None = None
    framing: str = "length"
    ranges: bool = True
    if_range: bool = True
    hang: bool = False


@dataclass
class Asked:
    """A request that arrived; ``sent`` counts the body's bytes in its answer."""

    path: str
    headers: dict
    sent: int = 0

    @property
    def range(self):
        return self.headers.get("Range")


class FileServer:
    """Serves ``files``, which may change between requests, while its ``with`` block runs.

    ``answers`` are used up one per request, then ``default`` holds. ``etag`` is a pattern for the
    digest of the content, or None; ``last_modified`` a date, or None.
    """

    def __init__(self, files, *, answers=(), default=None):
        self.files = dict(files)
        self.answers = list(answers)
        self.default = default or Answer()
        self.etag = '"{}"'
        self.last_modified = None
        self.requests = []
        self.stopping = threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"files": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        # The machine's proxy must not be asked for 127.0.0.1.
        self._environment = mock.patch.dict(os.environ, {"no_proxy": "*", "NO_PROXY": "*"})
        self._environment.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self._environment.stop()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url(self, path):
        return f"http://127.0.0.1:{self._server.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def do_GET(self):
        server = self.files
        self.asked = Asked(self.path, dict(self.headers))
        server.requests.append(self.asked)
        answer = server.answers.pop(0) if server.answers else server.default
        self.close_connection = True
        if answer.hang and answer.cut is None:
            server.stopping.wait()
        elif answer.status == 200 and self.path in server.files:
            self.serve(answer, server.files[self.path])
        elif answer.status:
            self.head(404 if answer.status == 200 else answer.status, {"Content-Length": 0}, answer)

    def head(self, status, headers, answer):
        self.send_response(status)
        for name, value in ({"Connection": "close"} | headers | answer.headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def serve(self, answer, content):
        server = self.files
        etag = server.etag and server.etag.format(hashlib.sha256(content).hexdigest()[:8])
        headers = {"ETag": etag, "Last-Modified": server.last_modified}
        current = self.headers["If-Range"] in (None, etag, server.last_modified)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        status, start = 200, 0
        if asked and answer.ranges and (current or not answer.if_range):
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                headers |= {"Content-Range": f"bytes */{len(content)}", "Content-Length": 0}
                return self.head(416, headers, answer)
        body = content[start:]
        if answer.framing == "length":
            headers["Content-Length"] = len(body) if answer.announce is None else answer.announce
        elif answer.framing == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        self.head(status, headers, answer)
        return self.body(answer, body)

    def body(self, answer, body):
        part = body[: answer.cut]
        self.asked.sent = len(part)
        if answer.framing == "chunked":
            half = len(part) // 2
            for chunk in filter(None, (part[:half], part[half:])):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            if answer.cut is None:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(part)
        if answer.hang:
            self.files.stopping.wait()

    def log_message(self, *_):
        pass
