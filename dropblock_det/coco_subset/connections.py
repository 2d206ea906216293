"""Connections to a server that may misbehave: kept open, through proxies, each answer under a wall clock."""

import contextlib
import re
import socket
import ssl
import threading
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError
from urllib3.exceptions import TimeoutError as NetworkTimeout
from urllib3.util import parse_url

from dropblock_det.coco_subset.extract import check_url
from dropblock_det.errors import InputError

_CHUNK = 1 << 16
_MOST_REDIRECTS = 5
_SLOWEST = 1024  # bytes per second; below that a server is as good as silent
_HEADERS = {"User-Agent": "dropblock_det", "Accept-Encoding": "identity"}


class FetchError(Exception):
    """The server did not deliver.

    Attributes:
        retry: Whether another attempt may help.
        wait: Seconds that the server asked to wait, 0 when it did not.
    """

    def __init__(self, reason: str, retry: bool = True, wait: float = 0.0) -> None:
        # Some reasons quote the server: one printable line, whatever it sent.
        super().__init__("".join(c if c.isprintable() else " " for c in reason)[:200])
        self.retry, self.wait = retry, wait


class _Wait:
    """How long one thread waits for the next part of an answer, all its bytes together.

    A socket's own timeout begins anew with every byte: headers that drip, or ``100 Continue`` without end,
    would hold a thread for ever.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self.socket: Callable[[], socket.socket | None] = lambda: None
        self.begin()

    def begin(self) -> None:
        """Starts the clock for the next part."""
        self.deadline = time.monotonic() + self.seconds

    def check(self, stop: bool) -> None:
        """Hangs up when the time is over, which ends the thread's reading; called by another thread."""
        if stop or time.monotonic() > self.deadline:
            self.over = True
            if (open_one := self.socket()) is not None:
                with contextlib.suppress(OSError):
                    open_one.shutdown(socket.SHUT_RDWR)


_waiting: ContextVar[_Wait] = ContextVar("_waiting")


class _HTTPConnection(HTTPConnection):
    """Shows its socket to the wait that its thread is in."""

    def connect(self) -> None:
        _waiting.get().socket = lambda: self.sock
        super().connect()

    def getresponse(self) -> Any:
        wait, sock = _waiting.get(), self.sock
        wait.socket = lambda: sock  # the response keeps it, also where the connection gives it up
        wait.begin()
        return super().getresponse()


class _HTTPSConnection(_HTTPConnection, HTTPSConnection):
    """The same; its handshake is waited for in :meth:`connect`."""


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


class Answer:
    """What a server sends: its status, its headers, its body as it comes in."""

    def __init__(self, response: urllib3.BaseHTTPResponse, wait: _Wait) -> None:
        self.status, self.headers, self.length = response.status, response.headers, response.length_remaining
        self.reason = response.reason or ""
        self._response, self._wait = response, wait

    def chunks(self) -> Iterator[bytes]:
        """The body; its length is checked, its pace watched.

        Raises:
            FetchError: It broke off, or the server is as good as silent.
        """
        received, begun = 0, time.monotonic()
        while True:
            self._wait.begin()
            try:
                chunk = self._response.read1(_CHUNK, decode_content=False)
            except (HTTPError, ValueError) as error:
                if self._wait.over or isinstance(error, NetworkTimeout) or self.length is None:
                    raise _fetch_error(error, self._wait) from error
                raise FetchError(
                    f"the connection broke off after {received} of {self.length} bytes"
                ) from error
            if not chunk:
                break
            yield chunk
            received += len(chunk)
            seconds = time.monotonic() - begun
            if seconds > self._wait.seconds and received < _SLOWEST * seconds:
                raise FetchError(f"the server sent {received} bytes in {seconds:.0f} s")
        if self._wait.over:  # without a length, a connection that we shut looks like its end
            raise FetchError("the server went silent")


class Connections:
    """Asks servers from many threads at once; close it when done (a context manager).

    With images of 160 kB most of the time would go into opening connections, so they are kept.

    Args:
        count: How many are kept for each server.
        timeout: Seconds without anything after which a server counts as silent.
        stop: When it is set, all that is under way ends within a second.
    """

    def __init__(self, count: int, timeout: float, stop: threading.Event) -> None:
        self._timeout, self._stop = timeout, stop
        self._options: dict[str, Any] = {"maxsize": count, "timeout": timeout, "retries": False}
        self._proxies = urllib.request.getproxies()
        self._managers: dict[str | None, urllib3.PoolManager] = {}
        self._waits: set[_Wait] = set()
        self._closed = threading.Event()

    def __enter__(self) -> "Connections":
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for manager in self._managers.values():
            manager.clear()

    def _watch(self) -> None:
        while not self._closed.wait(min(self._timeout / 10, 1)):
            for wait in self._waits.copy():
                wait.check(self._stop.is_set())

    @contextlib.contextmanager
    def ask(self, url: str, headers: dict[str, str]) -> Iterator[Answer]:
        """Sends a request and follows redirects.

        Raises:
            FetchError: There is no answer.
            InputError: The environment names a proxy by an address that is none.
        """
        wait = _Wait(self._timeout)
        _waiting.set(wait)
        self._waits.add(wait)
        response = None
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                response = self._request(url, headers, wait)
                location = response.get_redirect_location()
                if not location:
                    break
                _settle(response)
                url = _redirected(url, location)
            else:
                raise FetchError(f"more than {_MOST_REDIRECTS} redirects", retry=False)
            yield Answer(response, wait)
        finally:
            self._waits.discard(wait)
            if response is not None:
                _settle(response)

    def _request(self, url: str, headers: dict[str, str], wait: _Wait) -> urllib3.BaseHTTPResponse:
        manager = self._manager(url)
        wait.begin()
        try:
            return manager.request(
                "GET", url, headers={**_HEADERS, **headers}, redirect=False, preload_content=False
            )
        except (HTTPError, ValueError) as error:  # ValueError: a host that can't be encoded
            raise _fetch_error(error, wait) from error

    def _manager(self, url: str) -> urllib3.PoolManager:
        """Returns the pools for an address: direct, or those of the proxy that the environment names."""
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(parts.netloc):
            proxy = None
        if proxy not in self._managers:
            try:
                manager = self._proxy(proxy) if proxy else urllib3.PoolManager(**self._options)
            except (HTTPError, ValueError):  # the address may hold a password, and is not shown
                raise InputError(
                    f"{parts.scheme}_proxy: not the address of a proxy; set it to http://HOST:PORT"
                ) from None
            manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
            self._managers.setdefault(proxy, manager)
        return self._managers[proxy]

    def _proxy(self, proxy: str) -> urllib3.ProxyManager:
        address = parse_url(proxy if "//" in proxy else f"http://{proxy}")
        if not address.host:
            raise ValueError
        headers = {}
        if address.auth:
            headers["Proxy-Authorization"] = "Basic " + b64encode(unquote_to_bytes(address.auth)).decode()
        return urllib3.ProxyManager(address._replace(auth=None).url, proxy_headers=headers, **self._options)


def _redirected(url: str, location: str) -> str:
    try:
        return check_url(urljoin(url, location))
    except ValueError as error:
        raise FetchError(f"redirected: {error}", retry=False) from error


def _settle(response: urllib3.BaseHTTPResponse) -> None:
    """Gives the connection back, or closes it where the answer was not read to its end."""
    if response.length_remaining == 0:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()


def _fetch_error(error: Exception, wait: _Wait) -> FetchError:
    timed_out = isinstance(error, NetworkTimeout) and not isinstance(error, NewConnectionError)
    if wait.over or timed_out:
        return FetchError("the server went silent")
    certificate = isinstance(error, SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError)
    refused = "Tunnel connection failed: 4" in str(error)  # by a proxy, for example with 407
    reason = re.sub(r"^\w+\(host=[^)]*\): ", "", str(error))  # a connection, as Python writes it
    return FetchError(f"{type(error).__name__}: {reason}", retry=not certificate and not refused)
