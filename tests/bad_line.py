"""A real web server on 127.0.0.1 that does what a bad line, a bad server or a bad mirror does, on request."""

import hashlib
import http.server
import socket
import ssl
import struct
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

DATE = "Thu, 01 Jan 2015 00:00:00 GMT"


@dataclass(frozen=True)
class Answer:
    """How one GET is answered; as it stands, as a good server does."""

    status: int = 0  # 0: what fits the request
    headers: dict[str, str | None] = field(default_factory=dict)  # in place of its own; None leaves one out
    cut: int | None = None  # bytes of the body after which the connection ends
    ending: str = "close"  # how: close, reset, or not at all: stall without a byte, drip some bytes for ever
    ranges: bool = True  # False: Range is not known
    if_range: bool = True  # False: If-Range is not known
    longer: int = 0  # how many bytes more are announced than there are
    flip: bool = False  # one bit of the body is another
    chunked: bool = False  # no length is announced


class Site:
    """Serves `files` by path. The answers of a path in `plans` are used up one by one, the last one is kept.

    `asked` lists (method, path, Range) of every request, and `headers` those of the last one.
    """

    def __init__(self, **files: bytes) -> None:
        self.files = {f"/{name}": data for name, data in files.items()}
        self.plans: dict[str, list[Answer]] = defaultdict(list)
        self.head = 200
        self.asked: list[tuple[str, str, str | None]] = []
        self.headers: dict[str, str] = {}
        self.going_on = threading.Event()  # ends every stall
        self.base = ""

    def plan(self, path: str, *answers: Answer) -> str:
        """Plans the answers of a path; its URL."""
        self.plans[path] = list(answers)
        return f"{self.base}{path}"

    def next(self, path: str) -> Answer:
        plan = self.plans[path] or [Answer()]
        return plan.pop(0) if len(plan) > 1 else plan[0]

    def ranges(self, path: str) -> list[str | None]:
        """The Range of every GET of a path."""
        return [asked for method, name, asked in self.asked if (method, name) == ("GET", path)]


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_HEAD(self) -> None:
        self.note()
        found = self.path in self.site.files
        self.send_response(self.site.head if found else 404)
        length = len(self.site.files[self.path]) if found and self.site.head == 200 else 7  # of an error's page
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def do_GET(self) -> None:
        self.note()
        answer = self.site.next(self.path)
        data = self.site.files.get(self.path)
        if data is None and not answer.status:
            self.send_error(404)
            return
        data = data or b""
        status, headers, body = self.judge(answer, data)
        self.send_response(status)
        for name, value in (headers | answer.headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if answer.flip and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if answer.chunked:
            self.send_chunks(body[: answer.cut], whole=answer.cut is None)
        else:
            self.wfile.write(body[: answer.cut])
        if answer.cut is not None:
            self.end(answer.ending)

    def judge(self, answer: Answer, data: bytes) -> tuple[int, dict[str, str | None], bytes]:
        headers: dict[str, str | None] = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:9]}"', "Last-Modified": DATE}
        status, start = 200, 0
        known = {(headers | answer.headers).get(name) for name in ("ETag", "Last-Modified")}
        condition = self.headers.get("If-Range")
        agreed = condition is None or not answer.if_range or condition in known
        if "Range" in self.headers and answer.ranges and agreed:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            status = 206 if start < len(data) else 416
        if answer.status:
            return answer.status, {}, b""
        if status == 416:
            return status, headers | {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}, b""
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        length = {"Transfer-Encoding": "chunked"} if answer.chunked else {}
        if not answer.chunked:
            length = {"Content-Length": str(len(data) - start + answer.longer)}
        return status, headers | length, data[start : len(data) + min(answer.longer, 0)]

    def send_chunks(self, body: bytes, whole: bool) -> None:
        for start in range(0, len(body), 1000):
            chunk = body[start : start + 1000]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n" if whole else b"")

    def end(self, ending: str) -> None:
        if ending == "stall":
            self.wfile.flush()
            self.site.going_on.wait(600)
        while ending == "drip" and not self.site.going_on.wait(0.01):
            self.wfile.write(bytes(100))
        if ending == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def note(self) -> None:
        self.site.asked.append((self.command, self.path, self.headers.get("Range")))
        self.site.headers = dict(self.headers)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that goes away is what the tests are about."""


@contextmanager
def serving(site: Site, tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """The site, open at `site.base` for the length of the block."""
    with Server(("127.0.0.1", 0), type("SiteHandler", (Handler,), {"site": site})) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        site.base = f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield site
        finally:
            site.going_on.set()
            server.shutdown()
            thread.join()
