"""One self-contained HTML page of tables, plots and pictured rows: what every report is written with."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
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


def _shown(cell: Any) -> Any:
    return round(cell, 4) if isinstance(cell, float) else cell


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


_ENVIRONMENT = jinja2.Environment(autoescape=True)
_ENVIRONMENT.filters |= {"shown": _shown, "base64": _base64}
_PAGE = _ENVIRONMENT.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } figure { margin: 2rem 0; }
figcaption { color: #555; } .scroll { overflow-x: auto; } code { background: #f4f4f4; padding: 0 .3em; }
pre { overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
.card { border: 1px solid #ddd; padding: .5rem; font-size: .9rem; }
.card ol { margin: .5rem 0 0; padding-left: 1.2rem; }
.card img { width: 100%; max-width: 10rem; image-rendering: pixelated; } .card li { padding: 0 .3em; }
</style></head><body>
<h1>{{ title }}</h1>
{% if intro %}<p>{{ intro }}</p>{% endif %}
{% for table in tables %}<h2>{{ table.title }}</h2><div class="scroll"><table>
<tr>{% for name in table.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in table.rows %}<tr>{% for cell in row %}
<td{% if cell is number %} class="number"{% endif %}>{{ cell | shown }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
{% for plot in plots %}<figure><img alt="{{ plot.caption }}" src="data:image/png;base64,{{ plot.png | base64 }}">
<figcaption>{{ plot.caption }}</figcaption></figure>{% endfor %}
{% for gallery in galleries %}<h2>{{ gallery.title }}</h2><p>{{ gallery.note }}</p><div class="cards">
{% for card in gallery.cards %}<article class="card">
<img alt="picture of {{ card.title }}" src="data:image/png;base64,{{ card.png | base64 }}">
<div>{{ card.title }}</div><ol>{% for step in card.steps %}
<li style="background: hsl({{ (120 * step.score) | round | int }} 70% 85%)">
{{ step.text }} <b>{{ step.label }}</b> ({{ "%.2f" | format(step.score) }})</li>{% endfor %}</ol></article>
{% endfor %}</div>{% endfor %}
<h2>Config</h2><pre>{{ config }}</pre>
</body></html>
""")


def render(
    title: str,
    tables: Sequence[Table],
    plots: Sequence[Plot],
    config: str,
    *,
    galleries: Sequence[Gallery] = (),
    intro: str = "",
) -> str:
    """The page. All text is escaped; pictures are inside it, so it needs no network."""
    return _PAGE.render(title=title, tables=tables, plots=plots, config=config, galleries=galleries, intro=intro)


def png_of(figure: Figure) -> bytes:
    """A plot as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()
