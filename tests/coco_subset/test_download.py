"""Fetching from a server that misbehaves by plan: the right bytes or one clear line, never a half file."""

import os
import re
import ssl
import subprocess
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from threading import Timer

import pytest
from support.coco_like import jpeg
from support.faulty_server import (
    continue_without_end,
    drip_chunk_size,
    drip_headers,
    drop_after,
    drop_at_once,
    endless,
    html,
    redirect,
    short,
    stall,
    stall_at_once,
    status,
    trickle,
)
from support.local_coco import ARCHIVE, OPTIONS, archive_of, network, tree

from dropblock_det.coco_subset.choose import Options
from dropblock_det.coco_subset.connections import FetchError
from dropblock_det.coco_subset.download import Downloader, Network
from dropblock_det.coco_subset.prepare import prepare
from dropblock_det.errors import InputError

TRANSIENT = {
    "drops in mid-file": [drop_after(0.5)],
    "drops without a word": [drop_at_once],
    "drops twice": [drop_after(0.1), drop_after(0.9)],
    "too few bytes": [short],
    "nothing": [drop_after(0)],
    "web page": [html],
    "stalls": [stall],
    "never answers": [stall_at_once],
    "500": [status(500)],
    "503 with a date": [status(503, Retry_After=formatdate(time.time() - 60, usegmt=True))],
    "429": [status(429)],
    "429 with nonsense": [status(429, Retry_After="soon")],
    "500, then a web page": [status(500), html],
    "no bytes, a length that agrees": [lambda handler, body: handler.answer(200, b"")],
}


@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("what", ["image", "archive"])
def test_transient_fault_ends_in_the_right_bytes(tmp_path, server, right, image, fault, what):
    path = image if what == "image" else ARCHIVE
    server.plan[path] = list(TRANSIENT[fault])
    prepare(tmp_path / "coco", OPTIONS, network=network(server, timeout=timeout_for(fault)))
    assert tree(tmp_path) == right
    assert server.asked[path] == 1 + len(TRANSIENT[fault])
    assert not server.plan[path]


def timeout_for(fault: str) -> float:
    """Short where silence is the fault; else a machine busy with other things must not look like one."""
    return 1.0 if fault in ("stalls", "never answers") else 10.0


LASTING = {
    "404": ([status(404)] * 9, "HTTP 404", 1),
    "403": ([status(403)] * 9, "HTTP 403", 1),
    "500": ([status(500)] * 9, "HTTP 500", 3),
    "web page": ([html] * 9, "the server sent a web page", 3),
    "short": ([short] * 9, "does not decode|truncated", 3),
    "drops": ([drop_after(0.5)] * 9, r"broke off after \d+ of \d+ bytes", 3),
    "hangs up": ([drop_at_once] * 9, "RemoteDisconnected", 3),
    "endless": ([endless] * 9, "more than 100000 bytes", 1),
    "redirected in a circle": ([redirect("")] * 99, "more than 5 redirects", 6),
    "redirected to a file": ([redirect("file:///etc/passwd")] * 9, "no plain http", 1),
    "redirected to nowhere": ([redirect("http://[::1/x.jpg")] * 9, "redirected: Invalid IPv6 URL", 1),
    "redirected to a port": ([redirect("http://h:port/x.jpg")] * 9, "redirected: ", 1),
    "redirected to no name": ([redirect("http://" + "x" * 80 + "/x.jpg")] * 9, "label|resolve", 3),
    "redirected to ftp": ([redirect("ftp://127.0.0.1/x.jpg")] * 9, "no plain http", 1),
    "asks to wait long": ([status(429, Retry_After="3600")] * 9, "HTTP 429 .*asks to wait 3600 s", 1),
    "no HTTP": ([lambda handler, body: handler.wfile.write(b"SSH-2.0\r\n")] * 9, "BadStatusLine", 3),
}


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_fault_ends_in_one_line_and_the_rest_is_there(tmp_path, server, right, image, fault):
    plan, reason, asked = LASTING[fault]
    if fault == "redirected in a circle":
        plan = [redirect(image)] * 99
    server.plan[image] = list(plan)
    net = network(server, largest_image=100_000)
    with pytest.raises(InputError, match=reason) as caught:
        prepare(tmp_path / "coco", OPTIONS, network=net)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(image).name in message
    assert "1 of 17 images missing" in message
    # A drop on a connection that was kept from before is asked again at once: the server may close those.
    assert asked <= server.asked[image] <= (2 if fault == "hangs up" else 1) * asked
    present = tree(tmp_path)
    assert right.keys() - present.keys() == {f"coco{image}", "coco/manifest.json"}
    assert present.items() <= right.items()

    server.plan.clear()
    server.asked.clear()
    prepare(tmp_path / "coco", OPTIONS, network=net)
    assert tree(tmp_path) == right
    assert dict(server.asked) == {image: 1}


SILENT = {
    "stalls": (stall, "the server went silent"),
    "never answers": (stall_at_once, "the server went silent"),
    "trickles": (trickle, r"the server sent \d+ bytes in"),
    "drips headers": (drip_headers, "the server went silent"),
    "drips 100 Continue": (continue_without_end, "the server went silent"),
    "drips a chunk's size": (drip_chunk_size, "the server went silent"),
}


def test_servers_that_only_seem_to_answer_are_left_after_the_timeout(tmp_path, server, right):
    images = [name.removeprefix("coco") for name in right if "train2017/" in name][: len(SILENT)]
    for image, (fault, _) in zip(images, SILENT.values(), strict=True):
        server.plan[image] = [fault] * 9
    began = time.monotonic()
    with pytest.raises(InputError, match=f"{len(SILENT)} of 17 images missing") as caught:
        prepare(tmp_path / "coco", OPTIONS, network=network(server, timeout=1.0, patience=0.0))
    assert time.monotonic() - began < 30  # three attempts of a second each, all at once
    for image, (_, reason) in zip(images, SILENT.values(), strict=True):
        assert re.search(rf"{Path(image).name} \({reason}", str(caught.value))
        assert server.asked[image] == 3


def test_wrong_picture_is_not_taken(tmp_path, server, image):
    server.files[image] = jpeg({"id": 1, "height": 30, "width": 31})
    with pytest.raises(InputError, match=rf"{Path(image).name} \(it has 31x30 pixels, the annotations say"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert not (tmp_path / "coco" / image[1:]).exists()


def test_other_formats_are_not_decoded(tmp_path, server, image):
    server.files[image] = b"GIF89a" + bytes(500)
    with pytest.raises(InputError, match="no JPEG or PNG"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(tmp_path, server, right, image, code):
    server.files["/elsewhere"] = server.files[image]
    server.plan[image] = [redirect("/step", code)]
    server.plan["/step"] = [redirect(f"{server.url}/elsewhere", code)]
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert tree(tmp_path) == right


def test_retry_after_holds_back_every_connection(tmp_path, server, right, image):
    began = time.monotonic()
    server.plan[image] = [status(429, Retry_After="1")]
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert time.monotonic() - began >= 1
    assert tree(tmp_path) == right


def test_server_that_is_down_is_not_asked_for_every_image(tmp_path, server):
    for path in server.files:
        if path.endswith("jpg"):
            server.plan[path] = [status(404)] * 9
    with pytest.raises(InputError, match=r"40 of 40 images missing, stopped there"):
        prepare(tmp_path / "coco", Options(40, 0), network=network(server, connections=2))
    assert sum(n for path, n in server.asked.items() if path.endswith("jpg")) < 15


@pytest.fixture
def proxied(server, monkeypatch):
    """Makes the server a proxy that wants credentials."""
    monkeypatch.delenv("no_proxy")
    server.credentials = "Basic bWU6c2Vjw6ldL3Q="  # me:secé]/t

    def proxied(address: str) -> Network:
        monkeypatch.setenv("http_proxy", address.replace("HOST", server.url.removeprefix("http://")))
        return Network(None, archive_of(server), timeout=10.0, backoff=0.01, attempts=3)

    return proxied


@pytest.mark.parametrize("address", ["http://me:sec%C3%A9%5D%2Ft@HOST", "me:sec%C3%A9%5D%2Ft@HOST/"])
def test_a_proxy_gets_its_credentials(tmp_path, server, proxied, right, address):
    prepare(tmp_path / "coco", OPTIONS, network=proxied(address))
    assert tree(tmp_path) == right


@pytest.mark.parametrize("address", ["http://HOST", "http://me:wrong@HOST"])
def test_a_proxy_that_refuses_is_asked_once(tmp_path, server, proxied, address):
    with pytest.raises(InputError, match=r"annotations_trainval2017\.zip: HTTP 407") as caught:
        prepare(tmp_path / "coco", OPTIONS, network=proxied(address))
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["http://", "http://h:port", "http://h:99999", "socks5://h:1", "http://[::1", "ftp://u:secret@h"],
)
def test_an_address_of_a_proxy_that_is_none(tmp_path, server, proxied, address):
    with pytest.raises(InputError, match=r"^http_proxy: not the address of a proxy") as caught:
        prepare(tmp_path / "coco", OPTIONS, network=proxied(address))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("password", "reason", "asked"), [("wrong", "failed: 407", 1), ("sec%C3%A9%5D%2Ft", "failed: 502", 3)]
)
def test_a_tunnel_through_a_proxy(tmp_path, server, proxied, monkeypatch, password, reason, asked):
    through = proxied(f"http://me:{password}@HOST")
    monkeypatch.setenv("https_proxy", os.environ["http_proxy"])
    net = replace(through, mirror="https://mirror.example")
    with pytest.raises(InputError, match=rf"ProxyError: .*{reason}"):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    assert server.asked["mirror.example:443"] == asked


def test_a_certificate_that_is_wrong_is_not_tried_again(tmp_path, server):
    key, accepted = tmp_path / "key.pem", []
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=elsewhere",
    ]
    made = subprocess.run([*command, "-keyout", key, "-out", key.with_suffix(".crt")], capture_output=True)
    if made.returncode:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(key.with_suffix(".crt"), key)
    plain = server.get_request
    server.get_request = lambda: accepted.append(1) or plain()
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    net = Network(server.url.replace("http:", "https:"), archive_of(server), backoff=0.01)
    with pytest.raises(InputError, match=r"SSLError: .*certificate"):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    assert len(accepted) == 1


def test_what_waits_for_a_silent_server_can_be_stopped(server, image):
    server.plan[image] = [stall_at_once] * 9
    with Downloader(network(server, timeout=60.0)) as downloader:
        Timer(0.5, downloader.stop.set).start()
        began = time.monotonic()
        with pytest.raises(FetchError):
            downloader.fetch(server.url + image, lambda data: None)
    assert time.monotonic() - began < 20  # Ctrl-C sets it; it would be 60
    assert server.asked[image] == 1


def test_nobody_there(tmp_path, server):
    net = network(server)
    server.server_close()
    server.shutdown()
    with pytest.raises(
        InputError, match=r"annotations_trainval2017\.zip: NewConnectionError: .* Connection refused"
    ):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    assert tree(tmp_path).keys() <= {"annotations_trainval2017.zip.partial"}
