"""One HTML file that needs nothing else: no server, no network, no fonts, no libraries."""

import base64
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, scripts: Sequence[str], data: Any, **values: Any) -> str:
    """Fills a template of the folder ``web``. Whatever it prints is escaped, the data included.

    Args:
        template: File name; it extends ``frame.html``.
        scripts: Names of the scripts, in this order after ``base``.
        data: What they draw, plain; they find it as ``data``.
        **values: The template's own names, and the frame's ``kind``, ``title``, ``about`` and ``lead``.
    """
    web = resources.files("dropblock_det.report") / "web"
    own = {path.name: path.read_text(encoding="utf-8") for path in web.iterdir()}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(own), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(
        css=Markup(own["page.css"]),
        js=Markup("\n".join(own[f"{name}.js"] for name in ("base", *scripts))),
        data=jinja2.utils.htmlsafe_json_dumps(data, separators=(",", ":"), allow_nan=False),
        **values,
    )


def data_uri(content: bytes, kind: str) -> str:
    """Returns an image's file as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
