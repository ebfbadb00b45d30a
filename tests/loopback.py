"""A web server on 127.0.0.1 that serves bytes and logs the requests."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock


class FileServer:
    """Serves ``files``, path -> bytes, while its ``with`` block runs.

    ``requests`` lists the requested paths. ``status`` other than 200 is sent without a body, and
    ``cut`` closes the connection after that many bytes of a body.
    """

    def __init__(self, files):
        self.files = dict(files)
        self.requests = []
        self.status, self.cut = 200, None

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
        self._environment.stop()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def url(self, path):
        return f"http://127.0.0.1:{self._server.server_port}{path}"


class _Handler(BaseHTTPRequestHandler):
    files: FileServer

    def do_GET(self):
        server = self.files
        server.requests.append(self.path)
        content = server.files.get(self.path)
        self.send_response(404 if content is None else server.status)
        content = content if content is not None and server.status == 200 else b""
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: server.cut])

    def log_message(self, *_):
        pass
