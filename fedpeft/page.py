"""The pieces of a report's page: HTML that stands alone, without scripts or links, readable by day and by night.

Every piece takes plain text and escapes it; only `page`, `section` and `fold` take HTML, made by the pieces.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #5b6270; --line: #d9dde3; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #16181c; --faint: #a0a7b4; --line: #343a44; --card: #20242a; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
p.lead { color: var(--faint); }
dl.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
dl.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .9rem; }
dl.cards dt { color: var(--faint); font-size: .85rem; } dl.cards dd { margin: 0; overflow-wrap: anywhere; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; } th { color: var(--faint); font-weight: 600; }
td.words { white-space: normal; }
img { display: block; max-width: 100%; background: #ffffff; border-radius: .5rem; margin: .8rem 0; }
details { margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""

# Even where a value slipped through unescaped, a browser would run and fetch nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

WORDS = frozenset({"rejected", "reason", "value"})  # columns that hold sentences


def page(title: str, *parts: str) -> str:
    """The whole document."""
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n'


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing when nothing does."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def fold(title: str, *parts: str) -> str:
    """What a reader may open."""
    return f"<details><summary>{escape(title)}</summary>\n{''.join(parts)}\n</details>"


def lead(text: str) -> str:
    """The sentence under a heading."""
    return f'<p class="lead">{escape(text)}</p>'


def verbatim(text: str) -> str:
    """Text with its own line breaks."""
    return f"<pre>{escape(text)}</pre>"


def cards(facts: Iterable[tuple[str, str]]) -> str:
    """The headline numbers, each in a card."""
    return f'<dl class="cards">{"".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in facts)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns named by `head`; those in `WORDS` may wrap, a wide table scrolls by itself."""
    kinds = [' class="words"' if name in WORDS else "" for name in head]
    body = ("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    lines = "\n".join(f"<tr>{cells}</tr>" for cells in body)
    names = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def picture(png: bytes, described: str) -> str:
    """A PNG inside the page."""
    return f'<img alt="{escape(described)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
