"""One self-contained HTML page of tables, plots and pictured rows: what every report is written with."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure


class Table(NamedTuple):
    """Cells are text or numbers; floats are shown with four decimals."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Plot(NamedTuple):
    """A picture of data."""

    name: str  # of its file, where it is kept as one
    caption: str  # also its text alternative: says what there is to see
    png: bytes


class Step(NamedTuple):
    """One step of a pictured row."""

    text: str
    label: str
    score: float  # P("+"), its colour: red 0, green 1


class Card(NamedTuple):
    """A row with its picture."""

    title: str
    png: bytes
    steps: Sequence[Step]


class Gallery(NamedTuple):
    """Rows side by side."""

    title: str
    note: str
    cards: Sequence[Card]


class Section(NamedTuple):
    """A part with a script of its own. All three are put into the page as they stand: only from our own templates."""

    html: str
    style: str
    script: str


def _shown(cell: Any) -> Any:
    return round(cell, 4) if isinstance(cell, float) else cell


def _aligned(table: Table) -> list[bool]:
    """Which columns stand at the right: those of numbers, be they with an interval or missing here and there."""
    columns = zip(*table.rows, strict=True)
    return [all(map(_is_numeric, cells)) for cells in columns] or [False] * len(table.head)


def _is_numeric(cell: Any) -> bool:
    return isinstance(cell, int | float) or str(cell) == _NONE or re.match(r"[-+]?\d", str(cell)) is not None


_NONE = "–"  # noqa: RUF001


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


NOTES_TITLE = "How to read the tables"
TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """Where the pages' templates are, with what they call: all text is escaped unless marked as `safe`."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found.filters |= {"shown": _shown, "base64": _base64, "aligned": _aligned}
    return found


def _policy(sections: Sequence[Section]) -> str:
    """What a browser may do with the page: run these very scripts, show pictures inside it, and nothing else."""
    hashes = [f"'sha256-{_base64(hashlib.sha256(section.script.encode()).digest())}'" for section in sections]
    scripts = " ".join(hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def render(
    title: str,
    tables: Sequence[Table],
    plots: Sequence[Plot],
    config: str,
    *,
    galleries: Sequence[Gallery] = (),
    sections: Sequence[Section] = (),
    intro: str = "",
    notes: str = "",
) -> str:
    """The page, `notes` below the tables. All text is escaped; pictures are inside it, so it needs no network."""
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title, tables=tables, plots=plots, config=config, galleries=galleries, sections=sections,
            intro=intro, notes=notes, notes_title=NOTES_TITLE, policy=_policy(sections),
        )
    )  # fmt: skip


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown; what others wrote stays inside its cell, and text."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(
        [
            f"## {table.title}",
            "",
            *("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines),
        ]
    )


def _markdown_cell(cell: Any) -> str:
    return re.sub(r"<(?=[\w/!?])", "&lt;", " ".join(str(cell).split())).replace("|", "\\|")


def png_of(figure: Figure) -> bytes:
    """A plot as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()
