"""Pages that are read, and clicked through in a browser where there is one."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside = []
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.outside += [
            v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))
        ]
        if tag not in ("meta", "input", "br", "link", "img", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read_whole(page):
    """Every element is closed, and nothing is fetched from elsewhere."""
    links = Links()
    links.feed(page)
    assert links.outside == []
    assert links.open == []
    assert not re.search(r"@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", page)


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--virtual-time-budget=3000", "--window-size=500,900", "--dump-dom"),
]

BEFORE = """
    <script>
    const seen = { errors };
    const all = query => [...document.querySelectorAll(query)];
    const click = query => { for (const button of all(query)) button.click(); };
"""
AFTER = """
    click("#theme"); seen.theme = document.documentElement.dataset.theme;
    seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const result = document.createElement("pre");
    result.id = "seen"; result.textContent = JSON.stringify(seen);
    document.body.replaceChildren(result);
    </script></body>"""


def in_a_browser(test):
    """Marks a test that needs one."""
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")(test))


def clicked(script, tmp_path, page):
    """Runs a script in the page in a headless Chromium; returns what it noted in ``seen``."""
    errors = "<script>const errors = []; addEventListener('error', e => errors.push(e.message));</script>"
    page = page.replace("<head>", "<head>" + errors)
    (tmp_path / "page.html").write_text(page.replace("</body>", BEFORE + script + AFTER))
    dom = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    ).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.S).group(1)))
