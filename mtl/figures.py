"""Plots as PNG files, from what the jobs return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Okabe and Ito's colours, which people see apart whatever their colour vision; a marker beside each.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
_FEW = 12  # places on an axis that are all named
_STYLES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", ":"), (GREY, "D", "-."))


def plot_objective(path: str | Path, objective: Sequence[float]) -> None:
    """The objective after each half-step of training (nats)."""
    with _figure(path, 7, 4) as axes:
        steps = range(1, len(objective) + 1)
        axes.plot(steps, objective, color=BLUE, marker="o", markersize=4)
        axes.set(title="Training objective by half-step", xlabel="half-step", ylabel="objective (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        last = f"{objective[-1]:,.0f}"
        axes.annotate(last, (len(objective), objective[-1]), (0, 8), textcoords="offset points", ha="right")


def plot_errors(path: str | Path, rmse: Mapping[str, float], ours: Sequence[str], unit: str) -> None:
    """RMSE by method, as bars with their values.

    Args:
        rmse: by method, in the order to draw.
        ours: the methods to set apart.
        unit: of the labels.
    """
    with _figure(path, 8, 0.55 * len(rmse) + 1.4) as axes:
        names = list(rmse)
        bars = axes.barh(names, list(rmse.values()), color=[BLUE if name in ours else GREY for name in names])
        axes.bar_label(bars, fmt="%.3f", padding=4)
        axes.invert_yaxis()
        axes.set(title="Error on events never seen: lower is better", xlabel=f"RMSE ({unit})")
        axes.set_xlim(0, 1.12 * max(rmse.values()))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)


def plot_errors_by_events(
    path: str | Path, groups: Sequence[Mapping[str, Any]], names: Mapping[str, str], unit: str, few_users: int = 10
) -> None:
    """RMSE against the number of events that a user had in training.

    Args:
        groups: ``by_user_events`` of :func:`mtl.evaluate.evaluate`.
        names: what to draw beside ours, baseline → how to call it.
        unit: of the labels.
        few_users: groups of fewer users are left out, for a single one would rule them.
    """
    drawn = [group for group in groups if group["users"] >= few_users]
    with _figure(path, 8, 4.8) as axes:
        series = {"oracle-mtl": [group["rmse"] for group in drawn]}
        series |= {called: [group["baselines"][name]["rmse"] for group in drawn] for name, called in names.items()}
        for (called, values), (colour, marker, line) in zip(series.items(), _STYLES, strict=False):
            axes.plot(range(len(drawn)), values, color=colour, marker=marker, linestyle=line, label=called)
        labels = [
            f"{_between(group['from'], group['to'])}\n{group['n']:,} rows\n{group['users']:,} users" for group in drawn
        ]
        axes.set_xticks(range(len(drawn)), labels)
        axes.set(
            title="Error by how much is known of the user",
            xlabel="events of the user in the model, with what each point averages over",
            ylabel=f"RMSE ({unit})",
        )
        axes.legend(frameon=False, ncols=len(series), loc="upper right")
        axes.margins(x=0.09, y=0.18)


@dataclass(frozen=True)
class Curve:
    """y against x, between low and high where there is an interval."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def plot_curves(
    path: str | Path,
    curves: Mapping[str, Curve],
    title: str,
    x: str,
    y: str,
    x_log: bool = False,
    mark: tuple[float, float, str] | None = None,
    ticks: Sequence[str] = (),
) -> None:
    """Curves by name, four at most.

    Args:
        x, y: what the axes are, with their units.
        x_log: the x axis is logarithmic; where there is a 0, from the smallest other place on.
        mark: a point of note (x, y) and what is said of it.
        ticks: what x = 0, 1, … are called, where they are no numbers.
    """
    with _figure(path, 8, 4.8) as axes:
        for (name, curve), (colour, marker, line) in zip(curves.items(), _STYLES, strict=False):
            every = max(1, len(curve.x) // 12)
            axes.plot(curve.x, curve.y, color=colour, marker=marker, markevery=every, linestyle=line, label=name)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        places = sorted({x for curve in curves.values() for x in curve.x})
        if x_log:
            axes.set_xscale("log") if places[0] else axes.set_xscale("symlog", linthresh=places[1])
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        elif x_log and len(places) <= _FEW:
            axes.set_xticks(places, [f"{place:,g}" for place in places])
            axes.set_xticks([], minor=True)
        elif not x_log:
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        if mark:
            axes.annotate(
                mark[2],
                mark[:2],
                (20, 30),
                textcoords="offset points",
                arrowprops={"arrowstyle": "->", "color": "#444444"},
            )
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.legend(frameon=False)


def plot_bars(path: str | Path, groups: Mapping[str, Mapping[str, float]], title: str, y: str) -> None:
    """Bars by group and, side by side within it, by series (the same in all groups, four at most), on a logarithmic axis."""
    with _figure(path, 1.5 + 2.6 * len(groups), 4.8) as axes:
        series = list(next(iter(groups.values())))
        width = 0.8 / len(series)
        for j, (name, (colour, *_)) in enumerate(zip(series, _STYLES, strict=False)):
            at = [i + (j - (len(series) - 1) / 2) * width for i in range(len(groups))]
            bars = axes.bar(at, [group[name] for group in groups.values()], 0.92 * width, color=colour, label=name)
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_yscale("log")
        axes.set(title=title, ylabel=y)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
        axes.legend(frameon=False, ncols=len(series))


def _between(low: int, high: int | None) -> str:
    if high is None:
        return f"≥ {low}"
    return f"{low}" if high == low else f"{low}–{high}"


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Axes]:
    """One pair of axes, saved on leaving; without pyplot, whose state is the whole process's."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    yield axes
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
