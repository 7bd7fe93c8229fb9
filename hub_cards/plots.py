"""Plots of a card: PNG files, legible at its width on light and dark pages, always the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plots"]

# A white ground of its own reads on dark pages too; colours are told apart in grey (Okabe and Ito).
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_INK = "#222222"
_SIZE = (8.0, 3.6)
_DPI = 120
_MAX_SUBSETS = 15
_LAST_BIN = 30

Draw = Callable[["Axes", Sequence[Mapping[str, Any]], Sequence[str]], bool]


def draw_plots(
    folder: Path, subsets: Sequence[Mapping[str, Any]], stages: Sequence[str]
) -> list[dict[str, str]]:
    """Draw what there is to see, and return file, title and alternative text of each plot.

    Args:
        folder: Made when there is a plot to put in it.
        subsets: The counts of `run.json`, by split and subset.
        stages: The stages' names.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "report", "A card's plots") from error

    drawn = []
    for file, title, draw in _PLOTS:
        figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _style(axes, title)
        if draw(axes, subsets, stages):
            folder.mkdir(parents=True, exist_ok=True)
            _save(figure, folder / file)
            drawn.append({"file": file, "title": title, "alt": title})
    return drawn


def _save(figure: Figure, path: Path) -> None:
    # No version, no date: the same counts give the same file.
    figure.savefig(path, format="png", metadata={"Software": None})


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, color=_INK)
    axes.tick_params(labelsize=11, colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _per_row(axes: Axes, subsets: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> bool:  # noqa: ARG001
    counts = _histogram(subsets, "false_per_row")
    if not any(counts):
        return False
    bars = axes.bar(range(len(counts)), counts, color=_COLORS[0])
    axes.bar_label(bars, labels=[f"{count:,}" if count else "" for count in counts], fontsize=10)
    axes.set_xlabel("false negatives in a row", fontsize=11)
    axes.set_ylabel("rows", fontsize=11)
    _whole_steps(axes, len(counts))
    return True


def _position(axes: Axes, subsets: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> bool:  # noqa: ARG001
    seen, found = _histogram(subsets, "seen_at"), _histogram(subsets, "false_at")
    if not any(found):
        return False
    found += [0] * (len(seen) - len(found))
    shares = [100 * f / s if s else 0.0 for f, s in zip(found, seen, strict=True)]
    axes.bar(range(1, len(shares) + 1), shares, color=_COLORS[0])
    axes.set_xlabel("place in the mined list (1 = ranked highest)", fontsize=11)
    axes.set_ylabel("% false", fontsize=11)
    _whole_steps(axes, len(shares) + 1, first=1)
    return True


def _flagged(axes: Axes, subsets: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> bool:
    names, shares = _flagged_shares(subsets, len(stages))
    if not names:
        return False
    height = 0.8 / len(stages)
    for index, stage in enumerate(stages):
        places = [place + (index - (len(stages) - 1) / 2) * height for place in range(len(names))]
        color = _COLORS[index % len(_COLORS)]
        axes.barh(places, [share[index] for share in shares], height, color=color, label=stage)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("% of the rows asked that were flagged", fontsize=11)
    axes.set_xlim(0, 100)
    if len(stages) > 1:
        axes.legend(fontsize=11, frameon=False)
    _set_height(axes, max(2.4, 1.2 + 0.34 * len(names)))
    return True


def _flagged_shares(
    subsets: Sequence[Mapping[str, Any]], n_stages: int
) -> tuple[list[str], list[list[float]]]:
    """Return the largest subsets and, for each, the share of rows that each stage flagged."""
    asked: dict[str, list[Counter[str]]] = {}
    for part in subsets:
        flows = asked.setdefault(part["subset"] or "all rows", [Counter() for _ in range(n_stages)])
        for flow, stage in zip(flows, part["stages"], strict=True):
            flow.update(stage)
    judged = [name for name, flows in asked.items() if flows[0]["rows_asked"]]
    names = sorted(judged, key=lambda name: (-asked[name][0]["rows_asked"], name))[:_MAX_SUBSETS]
    shares = [
        [100 * flow["rows_flagged"] / max(flow["rows_asked"], 1) for flow in asked[name]]
        for name in names
    ]
    return names, shares


def _funnel(axes: Axes, subsets: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> bool:
    steps = []
    for index, stage in enumerate(stages):
        flows = [part["stages"][index] for part in subsets]
        steps.append((f"seen by {stage}", sum(flow["passages_asked"] for flow in flows)))
        flagged = sum(flow["better"] + flow["worse"] for flow in flows)
        steps.append((f"flagged by {stage}", flagged))
    if not steps[0][1]:
        return False
    bars = axes.barh([name for name, _ in steps], [count for _, count in steps], color=_COLORS[0])
    total = steps[0][1]
    labels = [f" {count:,} ({count / total:.0%})" for _, count in steps]
    axes.bar_label(bars, labels=labels, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, total * 1.2)
    axes.set_xlabel("passages", fontsize=11)
    _set_height(axes, 1.4 + 0.45 * len(steps))
    return True


def _histogram(subsets: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    total: Counter[int] = Counter()
    for part in subsets:
        total.update({int(key): count for key, count in part[name].items()})
    return [total[key] for key in range(max(total, default=-1) + 1)]


def _set_height(axes: Axes, height: float) -> None:
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.set_size_inches(_SIZE[0], height)


def _whole_steps(axes: Axes, n_bins: int, *, first: int = 0) -> None:
    step = max(1, n_bins // 15)
    ticks = list(range(first, n_bins, step))
    above = [f"{tick}+" if tick >= _LAST_BIN else f"{tick}" for tick in ticks]
    axes.set_xticks(ticks, above)


_PLOTS: tuple[tuple[str, str, Draw], ...] = (
    ("funnel.png", "What each stage saw and flagged", _funnel),
    ("per-row.png", "False negatives per row", _per_row),
    ("position.png", "Where in the mined list false negatives stand", _position),
    ("flagged.png", "Flagged rows by subset and stage", _flagged),
)
