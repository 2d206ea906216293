"""The thread that watches another process; two real ones are in tests/slow."""

import os
import socket
import time
from pathlib import Path

from dropblock_det.training import heartbeat


def test_a_goodbye_is_heard_also_where_sending_to_the_other_fails(monkeypatch):
    """It closed with a byte unread, so that the system answers the next one with a reset."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there = server.accept()[0]
    with here:
        here.settimeout(1)
        here.sendall(heartbeat.ALIVE)
        there.sendall(heartbeat.DONE)
        time.sleep(0.1)
        there.close()
        time.sleep(0.1)
        heartbeat.Heartbeat(Path("run"))._listen(here, 0)
    assert not ended
