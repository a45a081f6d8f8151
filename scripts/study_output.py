"""Format the records of `study.study` as CSV, Markdown tables and plots.

A budget above 1 is a count of tokens, else a share of the past tokens.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sparsecache.errors import UsageError

Record = dict[str, Any]
_HEAD = ["run", "kept", "all", "difference", "95% interval", "without code", "even rows", "odd rows", "tokens/s"]


def as_csv(records: Sequence[Record]) -> str:
    """Return records as CSV, numbers with four decimals."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: round(each, 4) if isinstance(each, float) else each for key, each in record.items()})
    return out.getvalue()


def as_markdown(records: Sequence[Record]) -> str:
    """Return the columns that a page shows."""
    lines = [f"| {' | '.join(_HEAD)} |", f"| :--- |{' ---: |' * (len(_HEAD) - 1)}"]
    for record in records:
        low, high = record["all_low"], record["all_high"]
        cells = [
            f"`{record['run']}`",
            "" if record["kept"] is None else f"{record['kept']:.1%}",
            _number(record["all"], ".1f"),
            _number(record["all_difference"], "+.1f"),
            "" if low is None else f"{low:+.1f} to {high:+.1f}",
            *(
                _number(record[f"{part}_difference"], "+.1f")
                for part in ("without_code", "even_without_code", "odd_without_code")
            ),
            _number(record["decode_tokens_per_s"], ",.0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(records: Sequence[Record], part: str, title: str) -> Any:
    """Return a plot of each run's difference to the first, with its interval, in order of the difference.

    part: a name of `parts`. Raises UsageError if matplotlib is missing.
    """
    from sparsecache.longbench.plots._figure import INK, MUTED, PAGE, SERIES, Plot, new_figure, with_style

    drawn = sorted(
        (record for record in records if record[f"{part}_difference"] is not None),
        key=lambda record: float(record[f"{part}_difference"]),
    )

    def figure() -> Plot:
        figure, axis = new_figure(0.5 + 0.17 * len(drawn), width=PAGE * 0.8)
        axis.axvline(0, color=MUTED, linewidth=0.8)
        for place, record in enumerate(drawn):
            difference, low, high = (record[f"{part}_{key}"] for key in ("difference", "low", "high"))
            if low is not None:
                axis.plot((low, high), (place, place), color=SERIES[0])
            axis.plot(difference, place, "o", color=SERIES[0])
        axis.set_yticks(range(len(drawn)), [_label(record) for record in drawn])
        axis.set_ylim(-0.6, len(drawn) - 0.4)
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.grid(axis="x")
        axis.set_xlabel(f"{_difference_label(records)}, 95 % intervals (in parentheses: kept)")
        return Plot(title, f"{title}: differences to {records[0]['run']}", figure)

    return with_style(figure)()


def budget_table(records: Sequence[Record], part: str) -> str:
    """Return a Markdown table of differences to the first run: a line per method, a column per budget."""
    lines = _lines_of(records)
    budgets = sorted({budget for line in lines.values() for budget in line}, key=_order)
    table = [f"| run | {' | '.join(map(_budget_text, budgets))} |", f"| :--- |{' ---: |' * len(budgets)}"]
    for name, line in lines.items():
        cells = (_number(line[at][f"{part}_difference"], "+.1f") if at in line else "" for at in budgets)
        table.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(table) + "\n"


def draw_budgets(records: Sequence[Record], part: str, title: str) -> Any:
    """Return a plot of differences to the first run over the kept share: a line per method.

    Counts of tokens and shares have a panel each, as far as there are such budgets. part: a name of `parts`. Raises
    UsageError if matplotlib is missing, and without a run that has a budget.
    """
    from sparsecache.longbench.plots._axes import KEPT_LABEL, legend_beside, set_share_axis
    from sparsecache.longbench.plots._figure import MUTED, PAGE, Plot, line_style, new_figure, with_style

    lines = {
        name: drawn
        for name, line in _lines_of(records).items()
        if (drawn := {at: each for at, each in line.items() if each["kept"] and each[f"{part}_difference"] is not None})
    }
    kinds = {"budgets in tokens": lambda budget: budget > 1, "budgets as shares": lambda budget: budget <= 1}
    panels = {label: kind for label, kind in kinds.items() if any(kind(at) for line in lines.values() for at in line)}
    if not panels:
        raise UsageError(f"No run has a budget and a score for {part}, so there is no line. Leave out --budgets.")

    def figure() -> Plot:
        figure, axes = new_figure(2.6, len(panels), PAGE, squeeze=False, sharey=True)
        handles = {}
        for axis, (label, is_shown) in zip(axes[0], panels.items(), strict=True):
            axis.axhline(0, color=MUTED, linewidth=0.8)
            for number, (name, line) in enumerate(lines.items()):
                points = sorted(
                    (record["kept"], record[f"{part}_difference"], record[f"{part}_low"], record[f"{part}_high"])
                    for budget, record in line.items()
                    if is_shown(budget)
                )
                if points:
                    style = line_style(number)
                    handles[name] = _draw_line(axis, points, style)
            set_share_axis(axis, [line[at]["kept"] for line in lines.values() for at in line if is_shown(at)])
            axis.set_xlabel(f"{KEPT_LABEL},\n{label}")
        axes[0][0].set_ylabel(_difference_label(records))
        low, high = axes[0][0].get_ylim()
        axes[0][0].set_ylim(min(low, -0.5), max(high, 0.5))  # equal scores are no scale
        legend_beside(figure, list(handles.values()), list(handles), len(handles))
        return Plot(title, f"{title}: differences to {records[0]['run']} by kept share", figure)

    return with_style(figure)()


def _difference_label(records: Sequence[Record]) -> str:
    """Return the label of an axis: it names the baseline, unless the name is long."""
    baseline = records[0]["run"]
    return f"difference to {baseline if len(baseline) <= 20 else 'the baseline'} in points"


def _draw_line(axis: Any, points: Sequence[tuple[float, float, float | None, float | None]], style: Record) -> Any:
    """Draw points (kept, difference, low, high) with their intervals; return the line."""
    for kept, _, low, high in points:
        if low is not None:
            axis.plot((kept, kept), (low, high), color=style["color"], linewidth=0.5, alpha=0.4)
    (line,) = axis.plot([point[0] for point in points], [point[1] for point in points], **style)
    return line


def _lines_of(records: Iterable[Record]) -> dict[str, dict[float, Record]]:
    """Return the records whose budget is a number, by the name of their line and by budget.

    Runs of a line have the same other options. Its name is that of its first run without the budget, or of the method
    if the run's name does not state the budget. If another line has this name, it is the run's.
    """
    lines: dict[str, dict[float, Record]] = {}
    names: dict[tuple[str, str], str] = {}
    for record in records:
        if not isinstance(record["budget"], int | float):
            continue
        key = record["method"], re.sub(r"\bbudget=\S+", "", record["options"])
        name = re.sub(r"-budget=[^-=]+", "", record["run"])
        name = record["method"] if name == record["run"] else name
        name = names.setdefault(key, record["run"] if name in lines else name)
        lines.setdefault(name, {})[float(record["budget"])] = record
    return lines


def _order(budget: float) -> tuple[bool, float]:
    return budget <= 1, budget


def _budget_text(budget: float) -> str:
    return f"{budget:,.0f} tokens" if budget > 1 else f"{budget:.3g}" if budget < 0.001 else f"{100 * budget:.3g} %"


def _label(record: Record) -> str:
    return record["run"] + ("" if record["kept"] is None else f" ({record['kept']:.1%})")


def _number(number: float | None, form: str) -> str:
    text = "" if number is None else format(number, form)
    return text[1:] if text in ("+0.0", "-0.0") else text
