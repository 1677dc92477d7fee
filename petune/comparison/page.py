"""The page of a comparison: one HTML file that asks for nothing else."""

import base64
import html
from collections.abc import Iterable, Sequence

from petune.comparison.results import HEADINGS, Comparison, cells

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: right; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; }}
.scroll {{ overflow-x: auto; }}
img {{ max-width: 100%; }}
.words td {{ text-align: left; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<div class="scroll">{methods}</div>
{plot}
{notes}
<h2>Runs</h2>
<div class="scroll">{runs}</div>
<h2>Where and with what</h2>
<div class="words">{environment}</div>
</body>
</html>
"""


def render(comparison: Comparison, plot: bytes) -> str:
    """The page as text.

    Args:
        comparison: what was found.
        plot: the figure as PNG; empty where nothing finished.
    """
    metric = comparison.metric
    name = metric.name if metric else "metric"
    headings = ["method", *(heading.format(metric=name) for heading in HEADINGS)]
    rows = [[row.method, *cells(row, metric)] for row in comparison.summaries]
    image = base64.b64encode(plot).decode("ascii")
    decides = f"{name} decides ({metric.direction})." if metric else "No run finished."
    return _PAGE.format(
        title=html.escape(comparison.title),
        summary=html.escape(decides),
        methods=_table(headings, rows),
        plot=f'<img alt="{html.escape(name)} against costs" src="data:image/png;base64,{image}">' if plot else "",
        notes="".join(f"<p>{html.escape(note)}</p>" for note in comparison.notes),
        runs=_runs(comparison),
        environment=_table(("", ""), [(name, value) for name, value in comparison.environment.items()]),
    )


def _runs(comparison: Comparison) -> str:
    rows = [run.row() for run in comparison.runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return _table(columns, [[_text(row.get(column)) for column in columns] for row in rows])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
