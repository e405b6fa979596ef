"""A hub on the loopback device that breaks and holds connections on request."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator

CONTENT = bytes(range(256)) * 4096 * 12  # 12 MiB: several pieces of huggingface_hub's 10 MiB reads
COMMIT = "0123456789" * 4


class Hub(http.server.BaseHTTPRequestHandler):
    """`/owner/name/resolve/main/model.safetensors` with the headers huggingface_hub reads."""

    protocol_version = "HTTP/1.1"
    content, etag = CONTENT, ""
    break_after: list[int] = []  # noqa: RUF012 - one entry per GET that is to be cut after so many bytes
    ranges: list[str | None] = []  # noqa: RUF012 - the Range header of every GET
    hold_after: int | None = None  # bytes after which the next GET waits for `go_on`
    go_on = threading.Event()

    def reply(self, body: bool) -> None:
        if not self.path.endswith("/resolve/main/model.safetensors"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        for name, value in {
            "ETag": f'"{self.etag}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(self.content)),
            "X-Linked-Etag": f'"{self.etag}"',
            "Content-Length": str(len(self.content) - start),
            "Content-Range": f"bytes {start}-{len(self.content) - 1}/{len(self.content)}",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        Hub.ranges.append(asked)
        stop = start + Hub.break_after.pop(0) if Hub.break_after else len(self.content)
        if Hub.hold_after is not None:
            self.wfile.write(self.content[start : Hub.hold_after])
            start, Hub.hold_after = Hub.hold_after, None
            Hub.go_on.wait()
        with contextlib.suppress(ConnectionError):  # who cancels does not read to the end
            self.wfile.write(self.content[start:stop])
        if stop < len(self.content):
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(content: bytes = CONTENT) -> Iterator[str]:
    """Serve `content` as `model.safetensors` of every repository; gives the address for HF_ENDPOINT."""
    Hub.break_after, Hub.ranges, Hub.hold_after = [], [], None
    Hub.content, Hub.etag = content, hashlib.sha256(content).hexdigest()
    Hub.go_on.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        Hub.go_on.set()
        server.shutdown()
        server.server_close()
