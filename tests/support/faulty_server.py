"""An HTTP server on 127.0.0.1 that plays images.cocodataset.org and misbehaves by plan."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "FaultyServer"

    def do_GET(self) -> None:
        server = self.server
        if server.credentials is not None:  # it is a proxy, and asked by whole addresses
            self.path = "/" + self.path.split("/", 3)[3]
            if self.headers.get("Proxy-Authorization") != server.credentials:
                return self.answer(407, b"who are you?", Proxy_Authenticate="Basic")
        with server.lock:
            server.asked[self.path] += 1
            server.headers_seen[self.path].append(dict(self.headers))
            plan = server.plan.get(self.path, [])
            fault = plan.pop(0) if plan else None
        body = server.files.get(self.path)
        if server.delay:
            time.sleep(server.delay)
        if fault is not None:
            fault(self, body or b"")
        elif body is None:
            self.answer(404, b"gone")
        else:
            self.answer_file(body)

    def do_CONNECT(self) -> None:
        """A proxy that leads nowhere; it wants credentials first."""
        self.server.asked[self.path] += 1
        right = self.headers.get("Proxy-Authorization") == self.server.credentials
        self.answer(502 if right else 407, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, body: bytes) -> None:
        given = self.headers.get("Range")
        if given is None:
            return self.answer(200, body)
        start = int(given.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return self.answer(416, b"")
        span = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206, body[start:], Content_Range=span)

    def log_message(self, *args: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    """``files`` by path are served; ``plan[path]`` is a list of faults, one for each of the next requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plan: dict[str, list[Fault]] = {}
        self.asked: Counter[str] = Counter()
        self.headers_seen: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
        self.delay = 0.0
        self.credentials: str | None = None
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FaultyServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are what these tests are about


Fault = Callable[[Handler, bytes], None]


def drop_after(share: float) -> Fault:
    """Announces all, sends the first ``share`` of it, hangs up. Obeys Range."""

    def fault(handler: Handler, body: bytes) -> None:
        given = handler.headers.get("Range")
        start = int(given.removeprefix("bytes=").removesuffix("-")) if given else 0
        rest = body[start:]
        handler.send_response(206 if given else 200)
        if given:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        handler.send_header("Content-Length", str(len(rest)))
        handler.end_headers()
        handler.wfile.write(rest[: int(len(rest) * share)])
        handler.close_connection = True

    return fault


def drop_at_once(handler: Handler, body: bytes) -> None:
    """Hangs up without a word."""
    handler.close_connection = True


def ignore_range(handler: Handler, body: bytes) -> None:
    handler.answer(200, body)


def wrong_range(handler: Handler, body: bytes) -> None:
    """A part, but from the beginning."""
    handler.answer(206, body, Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")


def status(code: int, **headers: str) -> Fault:
    return lambda handler, body: handler.answer(code, b"no", **headers)


def short(handler: Handler, body: bytes) -> None:
    """Too few bytes, with a length that agrees."""
    handler.answer(200, body[: len(body) // 2])


def html(handler: Handler, body: bytes) -> None:
    handler.answer(200, b"<!doctype html><title>Log in to this network</title>", Content_Type="text/html")


def stall(handler: Handler, body: bytes) -> None:
    """Sends a little, then nothing, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:10])
    handler.server.ended.wait(60)
    handler.close_connection = True


def stall_at_once(handler: Handler, body: bytes) -> None:
    """Takes the request and never answers."""
    handler.server.ended.wait(60)
    handler.close_connection = True


def trickle(handler: Handler, body: bytes) -> None:
    """A byte now and then: never silent long enough for a socket's timeout."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    for byte in body:
        handler.wfile.write(bytes([byte]))
        if handler.server.ended.wait(0.05):
            break
    handler.close_connection = True


def drip_headers(handler: Handler, body: bytes) -> None:
    """Header after header, each well within a socket's timeout, and never a body."""
    handler.send_response(200)
    handler.flush_headers()
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(b"X")
    handler.close_connection = True


def continue_without_end(handler: Handler, body: bytes) -> None:
    while not handler.server.ended.wait(0.02):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    handler.close_connection = True


def drip_chunk_size(handler: Handler, body: bytes) -> None:
    """Says how long the next piece is, digit by digit."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while not handler.server.ended.wait(0.05):
        handler.wfile.write(b"0")
    handler.close_connection = True


def endless(handler: Handler, body: bytes) -> None:
    """Sends without end and without a length."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while not handler.server.ended.is_set():
        handler.wfile.write(b"\xff\xd8" + bytes(1 << 16))


def redirect(target: str, code: int = 302) -> Fault:
    return lambda handler, body: handler.answer(code, b"", Location=target)
