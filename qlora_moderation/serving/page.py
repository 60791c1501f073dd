"""The page at `/`, and the headers that keep it to itself.

In: `page.html`. Out: its bytes and a policy that allows its own style and script, named by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
"""Sent with every answer."""


def load_page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers."""
    page = files("qlora_moderation.serving").joinpath("page.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"style-src {_list_hashes(page, b'style')}",
        f"script-src {_list_hashes(page, b'script')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return page, {**SAFE_HEADERS, "content-security-policy": "; ".join(policy)}


def _list_hashes(page: bytes, element: bytes) -> str:
    """Return the hashes of all inline elements of a kind; browsers hash what stands between the tags, byte for byte."""
    inside = re.findall(rb"<%b[^>]*>(.*?)</%b>" % (element, element), page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in inside]
    return " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
