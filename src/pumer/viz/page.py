"""A web page of token maps that needs no other file and no network."""

from __future__ import annotations

import html

from pumer.viz.maps import asset


def page(heading: str, body: str) -> str:
    """A complete HTML page, readable on a phone and in dark mode, in which token maps react.

    Args:
        heading: title of the page, as plain text.
        body: HTML of the content, for example of `TokenMap.to_html`.

    >>> page("Token maps", "<p>none</p>")[:15]
    '<!doctype html>'
    """
    title = html.escape(heading)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title>"
        f"<style>{asset('map.css')}{asset('page.css')}</style></head>"
        f"<body><main><h1>{title}</h1>{body}</main>"
        f"<script>{asset('page.js')}</script></body></html>\n"
    )
