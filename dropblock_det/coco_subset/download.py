"""Fetching small files and one large archive: attempts, waits, and checks of what arrived."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from urllib3.exceptions import HTTPError
from urllib3.util.retry import Retry

from dropblock_det.coco_subset.connections import Answer, Connections, FetchError
from dropblock_det.coco_subset.extract import check_url
from dropblock_det.errors import InputError
from dropblock_det.files import sha256_of
from dropblock_det.locks import locked

OFFICIAL = "http://images.cocodataset.org"

_WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}

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


class Downloader:
    """Fetches until it has what it should; close it when done (a context manager).

    ``stop`` may be set from any thread: what is under way ends within a second, and no new attempt begins.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.stop = threading.Event()
        self._connections = Connections(network.connections, network.timeout, self.stop)
        self._hold_until = 0.0  # a Retry-After that one thread gets holds for all

    def __enter__(self) -> "Downloader":
        self._connections.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.__exit__()

    def fetch(self, url: str, accept: Callable[[bytes], None]) -> bytes:
        """Fetches a small file whole.

        Args:
            url: Its http(s) address.
            accept: Raises ValueError with the reason when the bytes are not what they should be.

        Raises:
            FetchError: It could not be had after all attempts.
        """

        def attempt() -> bytes:
            body = bytearray()
            with self._connections.ask(url, {}) as answer:
                _expect(answer, 200)
                for chunk in answer.chunks():
                    body += chunk
                    self._go_on()
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
        partial, lock_file = (target.with_name(target.name + end) for end in (".partial", ".lock"))
        with locked(lock_file, target), partial.open("ab") as file:
            if _is(target, archive):  # another process was faster
                partial.unlink()
                return report(archive.size)

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
        with self._connections.ask(url, {"Range": f"bytes={start}-"} if start else {}) as answer:
            if answer.status == 416:  # it does not have that much: then what we have is not its beginning
                file.truncate(0)
                raise FetchError("the server has less of it than we do")
            if start and answer.status == 206:
                if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                    raise FetchError("it sent another part than asked")
            else:
                _expect(answer, 200)
                start = 0
            # The log-in page of a network on the way comes with status 200 too.
            if answer.headers.get("Content-Type", "").startswith("text/"):
                raise FetchError("the server sent a web page")
            if answer.length not in (None, size - start):
                raise FetchError(f"the server offers {answer.length} bytes where {size - start} are due")
            file.truncate(start)
            for chunk in answer.chunks():
                self._go_on()
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
        self.stop.wait(max(seconds, 0))
        self._go_on()

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise FetchError("stopped", retry=False)


def _expect(answer: Answer, status: int) -> None:
    if answer.status != status:
        raise FetchError(
            f"HTTP {answer.status} {answer.reason}",
            answer.status in _WORTH_RETRYING,
            _retry_after(answer.headers.get("Retry-After")),
        )


def _retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header; 0 when there is none, or nonsense."""
    try:
        return float(Retry().parse_retry_after(value)) if value else 0.0
    except (HTTPError, ValueError, OverflowError):
        return 0.0  # then our own back-off decides


def _is(path: Path, archive: Archive) -> bool:
    return path.is_file() and path.stat().st_size == archive.size and sha256_of(path) == archive.sha256


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
