"""Several processes, perhaps on several machines: one that has lost the others ends with a message."""

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from dropblock_det.runs.folder import goes_on

INTERVAL_S, LIMIT_S = 5, 30
ALIVE, DONE = b".", b"!"


class Heartbeat(Callback):
    """Keeps a connection between the first process and every other, on which both send signs of life.

    A backend cannot tell a process that is cut off, or hangs, from one with a long evaluation, and so waits
    for as long as its time limit, ten or thirty minutes. A thread that only listens can tell.

    Args:
        folder: The run's folder, for the message.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._connections: list[socket.socket] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connects, once the processes know each other, and starts to listen."""
        if trainer.world_size == 1:
            return
        server = socket.create_server(("", 0)) if trainer.is_global_zero else None
        port = trainer.strategy.broadcast(server.getsockname()[1] if server else 0)
        if server:
            with server:
                server.settimeout(LIMIT_S)
                self._connections = [server.accept()[0] for _ in range(trainer.world_size - 1)]
        else:
            self._connections = [socket.create_connection((os.environ["MASTER_ADDR"], port), LIMIT_S)]
        for connection in self._connections:
            connection.settimeout(INTERVAL_S)
            listener = threading.Thread(
                target=self._listen, args=(connection, trainer.global_rank), daemon=True
            )
            listener.start()

    def _listen(self, connection: socket.socket, rank: int) -> None:
        silent_s = 0
        while silent_s < LIMIT_S:
            try:
                with contextlib.suppress(ConnectionError):  # it may have said goodbye before it went
                    connection.sendall(ALIVE)
                heard = connection.recv(4096)
            except TimeoutError:
                silent_s += INTERVAL_S
                continue
            except OSError:
                heard = b""
            if DONE in heard:
                return
            time.sleep(INTERVAL_S)
            if not heard:  # it has died, and most backends have ended this process by now
                break
            silent_s = 0
        print(
            f"error: process {rank} lost another, which has died or is cut off; " + goes_on(self.folder),
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the others that this process is done: they may take longer."""
        self._goodbye()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the others: this process ends with a message of its own."""
        self._goodbye()

    def _goodbye(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(DONE)
        self._connections = []
