"""The HTTP side of fetching COCO: small files and one large archive from a server that may misbehave.

Standard library only. Each thread keeps its connections open: with 160 kB images most of the time would
otherwise go into opening new ones.
"""

import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urljoin, urlsplit

from dropblock_det.coco_subset.choose import check_url
from dropblock_det.errors import InputError

OFFICIAL = "http://images.cocodataset.org"

_CHUNK = 1 << 16
_MOST_REDIRECTS = 5
_SLOWEST = 1024  # bytes per second; below that a server is as good as silent
_WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
_HEADERS = {"User-Agent": "dropblock_det", "Accept-Encoding": "identity"}

Item = TypeVar("Item")


@dataclass(frozen=True)
class Archive:
    """A file whose size in bytes and SHA-256 are known beforehand."""

    path: str
    size: int
    sha256: str


# COCO publishes no checksum. The size is in the log of keras-io's RetinaNet example, its MD5,
# f4bbac642086de4f52a3fdda2de5fa2c, in mlcommons/ck (get-dataset-coco); several public data records state this
# SHA-256, some of them beside that MD5 and size.
ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip",
    252_907_541,
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
)


@dataclass(frozen=True)
class Network:
    """How to talk to the server.

    Attributes:
        mirror: Address that stands in for ``http://images.cocodataset.org``, None for the official one.
        annotations: The annotation archive that the server holds.
        connections: Images fetched at the same time.
        attempts: How often something is tried before it counts as failed.
        timeout: Seconds without a byte after which an attempt is given up.
        backoff: Seconds before the second attempt; doubles each time; a random half or more is waited.
        patience: The longest wait, in seconds, that a server may ask for with Retry-After.
        largest_image: Bytes; the largest in COCO 2017 have under 1 MB.
    """

    mirror: str | None = None
    annotations: Archive = ANNOTATIONS
    connections: int = 16
    attempts: int = 5
    timeout: float = 20.0
    backoff: float = 0.5
    patience: float = 120.0
    largest_image: int = 8 << 20

    def __post_init__(self) -> None:
        if self.mirror is not None:
            try:
                check_url(self.mirror)
            except ValueError as error:
                raise InputError(f"mirror: {error}") from error

    def address(self, url: str) -> str:
        """``url``, on the mirror if there is one and the official server would be asked."""
        if self.mirror and url.startswith(OFFICIAL + "/"):
            return self.mirror.rstrip("/") + url.removeprefix(OFFICIAL)
        return url


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


class Downloader:
    """Fetches over connections that each thread keeps open; close it when done (a context manager).

    ``stop`` may be set from any thread: waits end at once and no new attempt begins.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.stop = threading.Event()
        self._own = threading.local()
        self._all: list[http.client.HTTPConnection] = []
        self._hold_until = 0.0  # what one thread was told by Retry-After holds for all

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._all:
            connection.close()

    def fetch(self, url: str, accept: Callable[[bytes], None]) -> bytes:
        """Fetches a small file whole.

        Args:
            url: Its http(s) address.
            accept: Raises ValueError with the reason when the bytes are not what they should be.

        Raises:
            FetchError: It could not be had after all attempts.
        """

        def attempt() -> bytes:
            with self._response(url, {}) as response:
                _expect(response, 200)
                body = bytearray()
                for chunk in self._chunks(response):
                    body += chunk
                    if len(body) > self.network.largest_image:
                        raise FetchError(f"it has more than {self.network.largest_image} bytes", retry=False)
            try:
                accept(bytes(body))
            except ValueError as error:
                page = body.lstrip()[:1] == b"<"
                raise FetchError("the server sent a web page" if page else str(error)) from error
            return bytes(body)

        return self._persist(attempt, lambda: 0)

    def fetch_archive(self, archive: Archive, target: Path, report: Callable[[int], None]) -> None:
        """Fetches a large file of known size and checksum; goes on where an earlier, killed one stopped.

        ``target`` appears only when it is whole and right; until then there is ``target`` + ".partial".

        Args:
            archive: What to fetch.
            target: Where to put it; left alone when it is there and right.
            report: Called with the number of bytes at hand.

        Raises:
            InputError: It could not be had, or another process is fetching it.
            OSError: The disk.
        """
        if _is(target, archive):
            return report(archive.size)
        url = self.network.address(f"{OFFICIAL}/{archive.path}")
        partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"{target}: another process is fetching it; start again after it") from error

            def attempt() -> None:
                if file.seek(0, 2) > archive.size:
                    file.truncate(0)
                if file.tell() < archive.size:
                    self._append(url, file, archive.size, report)
                file.flush()
                if not _is(partial, archive):
                    file.truncate(0)
                    raise FetchError("its checksum is wrong")

            try:
                self._persist(attempt, lambda: file.seek(0, 2))
            except FetchError as error:
                raise InputError(f"{target.name}: {error} ({url}); start again to go on") from error
            partial.replace(target)

    def _append(self, url: str, file: IO[bytes], size: int, report: Callable[[int], None]) -> None:
        """Adds to ``file`` what it lacks; starts over when the server can't send a part."""
        start = file.tell()
        with self._response(url, {"Range": f"bytes={start}-"} if start else {}) as response:
            if response.status == 416:  # it does not have that much: then what we have is not its beginning
                file.truncate(0)
                raise FetchError("the server has less of it than we do")
            if start and response.status == 206:
                if not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
                    raise FetchError("it sent another part than asked")
            else:
                _expect(response, 200)
                start = 0
            # The log-in page of a network on the way comes with status 200 too.
            if response.headers.get("Content-Type", "").startswith("text/"):
                raise FetchError("the server sent a web page")
            if response.length not in (None, size - start):
                raise FetchError(f"the server offers {response.length} bytes where {size - start} are due")
            file.truncate(start)
            for chunk in self._chunks(response):
                if file.seek(0, 2) + len(chunk) > size:
                    file.truncate(0)
                    raise FetchError(f"it has more than {size} bytes")
                file.write(chunk)
                report(file.tell())
        if file.tell() < size:
            raise FetchError(f"it ended after {file.tell()} of {size} bytes")

    def _persist(self, attempt: Callable[[], Item], progress: Callable[[], int]) -> Item:
        """Attempts until it works; an attempt that gets further than any before does not count as failed."""
        failed, furthest = 0, progress()
        while True:
            self._wait(self._hold_until - time.monotonic())
            try:
                return attempt()
            except FetchError as error:
                failed = 1 if progress() > furthest else failed + 1
                furthest = max(furthest, progress())
                if error.wait > self.network.patience:
                    raise FetchError(f"{error}; it asks to wait {error.wait:.0f} s", retry=False) from error
                if not error.retry or failed >= self.network.attempts:
                    raise
                if error.wait:
                    self._hold_until = max(self._hold_until, time.monotonic() + error.wait)
                # Jitter, so that the threads that failed together do not come back together.
                self._wait(self.network.backoff * 2 ** (failed - 1) * random.uniform(0.5, 1))

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(max(seconds, 0)):
            raise FetchError("stopped", retry=False)

    def _connection(self, url: str) -> tuple[http.client.HTTPConnection, str]:
        """This thread's connection for ``url``, through a proxy where one is set, and the target to ask."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = urllib.request.getproxies().get(parts.scheme)
        via = urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else None
        if via is not None and urllib.request.proxy_bypass(f"{host}:{port}"):
            via = None
        if via is not None and parts.scheme == "http":
            target = url
        open_ones = self._own.__dict__.setdefault("connections", {})
        key = (parts.scheme, host, port) if via is None or parts.scheme == "https" else via.netloc
        if key not in open_ones:
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            peer, peer_port = (host, port) if via is None else (via.hostname or "", via.port or 80)
            connection = kind(peer, peer_port, timeout=self.network.timeout)
            if via is not None and parts.scheme == "https":
                connection.set_tunnel(host, port)
            open_ones[key] = connection
            self._all.append(connection)
        return open_ones[key], target

    @contextlib.contextmanager
    def _response(self, url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The answer after redirects. A connection whose answer was not read to its end is closed."""
        response = None
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                try:
                    check_url(url)
                except ValueError as error:
                    raise FetchError(f"redirected: {error}", retry=False) from error
                connection, target = self._connection(url)
                response = self._ask(connection, target, headers)
                location = response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or not location:
                    break
                url = urljoin(url, location)
                self._settle(connection, response)
            else:
                raise FetchError(f"more than {_MOST_REDIRECTS} redirects", retry=False)
            yield response
        finally:
            if response is not None:
                self._settle(connection, response)

    def _ask(
        self, connection: http.client.HTTPConnection, target: str, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        kept = connection.sock is not None
        try:
            connection.request("GET", target, headers=_HEADERS | headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            # A server may close a connection that it had kept for us at any time: no fault, ask on a new one.
            if kept and isinstance(error, ConnectionError):
                return self._ask(connection, target, headers)
            raise FetchError(_reason(error)) from error

    def _settle(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        if not response.isclosed() and response.length != 0:
            connection.close()
        response.close()

    def _chunks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """The body as it comes in; its length is checked, its pace watched."""
        declared = response.length
        received, begun = 0, time.monotonic()
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise FetchError(_reason(error)) from error
            if not chunk:
                break
            yield chunk
            received += len(chunk)
            seconds = time.monotonic() - begun
            if seconds > self.network.timeout and received < _SLOWEST * seconds:
                raise FetchError(f"the server sent {received} bytes in {seconds:.0f} s")
            if self.stop.is_set():
                raise FetchError("stopped", retry=False)
        if declared is not None and received < declared:
            raise FetchError(f"the connection broke off after {received} of {declared} bytes")


def _expect(response: http.client.HTTPResponse, status: int) -> None:
    if response.status != status:
        wait = _retry_after(response.headers.get("Retry-After"))
        raise FetchError(
            f"HTTP {response.status} {response.reason}", response.status in _WORTH_RETRYING, wait
        )


def _retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 when there is none."""
    if value is None:
        return 0.0
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0  # neither; then our own back-off decides


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the server went silent"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is(path: Path, archive: Archive) -> bool:
    if not path.is_file() or path.stat().st_size != archive.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == archive.sha256


def for_each(
    items: Sequence[Item], work: Callable[[Item], None], threads: int, stop: threading.Event
) -> None:
    """Calls ``work`` for every item in ``threads`` threads, at most one item per thread under way.

    Ends early when ``stop`` is set. The first exception sets it and is raised.
    """
    source, lock = iter(items), threading.Lock()

    def worker() -> None:
        try:
            while not stop.is_set():
                with lock:
                    item = next(source, None)
                if item is None:
                    return
                work(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(worker) for _ in range(threads)]:
                future.result()
        except BaseException:  # Ctrl-C arrives here
            stop.set()
            raise
