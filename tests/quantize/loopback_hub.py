"""A hub on the loopback device that breaks and holds connections, and sends its clients to a second server."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator

CONTENT = bytes(range(256)) * 4096 * 12  # 12 MiB: several pieces for the client
COMMIT = "0123456789" * 4
FILES = ("model.safetensors", "config.json", "run.py")


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for a file of any repository: its description, its folder, and ranges of it."""

    protocol_version = "HTTP/1.1"
    content, etag = CONTENT, ""
    redirect_to: str | None = None  # an address: the content is there, under the same path ...
    signed = ""  # ... and with this behind it
    break_after: list[int] = []  # noqa: RUF012 - one entry per GET of content that is to be cut after so many bytes
    ranges: list[str | None] = []  # noqa: RUF012 - the Range header of every GET of content
    lost_from: int | None = None  # GETs from this byte on are answered: there is no such file
    hold_at: int | None = None  # a byte of the content: the GET that reaches it waits there for `go_on`
    go_on = threading.Event()

    def file(self) -> str | None:
        """The file of a /resolve/ path."""
        name = self.path.rpartition("/")[2]
        return name if "/resolve/" in self.path and name in FILES else None

    def reply(self, body: bool) -> None:
        if "/api/" in self.path:
            self.api()
        elif self.file() is None:
            self.not_found()
        elif self.redirect_to is not None:
            self.send_response(302)
            self.say({"Location": self.redirect_to + self.path + self.signed, "Content-Length": "0"} | self.linked())
        else:
            self.send_content(body)

    def api(self) -> None:
        """The repository, and what is in its folder."""
        found: object = {"_id": "1", "id": "owner/name", "sha": COMMIT, "private": False, "siblings": [], "tags": []}
        if "/tree/" in self.path or "/paths-info/" in self.path:
            found = [{"type": "file", "path": name, "size": len(self.content), "oid": "a" * 40} for name in FILES]
        data = json.dumps(found).encode()
        self.send_response(200)
        self.say({"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def not_found(self) -> None:
        self.send_response(404)
        self.say({"X-Error-Code": "EntryNotFound", "Content-Length": "0"})

    def linked(self) -> dict[str, str]:
        return {
            "ETag": f'"{self.etag}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(self.content)),
            "X-Linked-Etag": f'"{self.etag}"',
        }

    def say(self, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_content(self, body: bool) -> None:
        asked = self.headers.get("Range")
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(self.content)
        if body and self.lost_from is not None and start >= self.lost_from:
            self.not_found()
            return
        self.send_response(206 if asked else 200)
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(self.content)}"} if asked else {}
        self.say(self.linked() | {"Content-Length": str(stop - start)} | span)
        if not body:
            return
        Hub.ranges.append(asked)
        end = min(stop, start + Hub.break_after.pop(0)) if Hub.break_after else stop
        with contextlib.suppress(ConnectionError):  # who cancels does not read to the end
            if Hub.hold_at is not None and start <= Hub.hold_at < end:
                self.wfile.write(self.content[start : Hub.hold_at])
                start, Hub.hold_at = Hub.hold_at, None
                Hub.go_on.wait()
            self.wfile.write(self.content[start:end])
        if end < stop:
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.reply(body=False)

    def do_GET(self) -> None:
        self.reply(body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.reply(body=True)

    def log_message(self, *arguments: object) -> None:
        pass


class Store(Hub):
    """A server that a hub redirects to: holds the content, or sends on, and remembers what it was told."""

    redirect_to = None
    onward: dict[int, str] = {}  # noqa: RUF012 - port of a server that sends on -> the address where it sends
    tokens: list[str | None] = []  # noqa: RUF012 - the Authorization header of every request
    asked: list[int] = []  # noqa: RUF012 - the port of every request
    refuses: int | None = None  # the status of every answer

    def reply(self, body: bool) -> None:
        port = self.server.server_address[1]
        Store.tokens.append(self.headers.get("Authorization"))
        Store.asked.append(port)
        if Store.refuses is not None:
            self.send_response(Store.refuses)
            self.say({"Content-Length": "0"})
            return
        if port not in Store.onward:
            self.send_content(body)
            return
        self.send_response(302)
        self.say({"Location": Store.onward[port] + self.path, "Content-Length": "0"})


@contextlib.contextmanager
def _running(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        Hub.go_on.set()
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serving(content: bytes = CONTENT) -> Iterator[str]:
    """Serve `content` as the FILES of every repository; gives the address for HF_ENDPOINT."""
    Hub.break_after, Hub.ranges, Hub.hold_at, Hub.redirect_to, Hub.lost_from, Hub.signed = [], [], None, None, None, ""
    Hub.content, Hub.etag = content, hashlib.sha256(content).hexdigest()
    Hub.go_on.clear()
    with _running(Hub) as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def redirecting(*hosts: str) -> Iterator[None]:
    """Inside `serving`: the hub sends every client to a second server, that one to a third, and so on; the last one has
    the content. `hosts` is what each is called by the one before it, one server at 127.0.0.1 without any.
    """
    Store.tokens, Store.asked, Store.onward, Store.refuses = [], [], {}, None
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(_running(Store)) for _ in hosts or ("127.0.0.1",)]
        addresses = [f"http://{host}:{port}" for host, port in zip(hosts or ("127.0.0.1",), ports, strict=True)]
        Store.onward = dict(zip(ports, addresses[1:], strict=False))
        Hub.redirect_to = addresses[0]
        yield
        Hub.redirect_to = None
