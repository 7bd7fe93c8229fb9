"""Heat map: what leaving out each subset does to each benchmark, as a PNG, always the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_relabel.errors import MissingExtraError
from hf_relabel.prune.report import Round

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_matplotlib", "draw_heatmap"]

_COLORS = "PuOr"  # told apart by all kinds of eyes; white is no change
_INK = "#222222"
_DPI = 120
_CELL = (1.15, 0.42)
_MARGIN = (3.2, 1.9)
_STRONG = 0.6
"""Beyond this share of the scale a cell is too dark for dark letters."""


def check_matplotlib() -> None:
    """Raise MissingExtraError now, not after hours of training."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "report", "The heat map of a sweep") from error


def draw_heatmap(round_: Round, path: Path) -> None:
    """Draw a line for each subset and a column for each benchmark, their average first.

    A cell is the change in points (hundredths of the score) when the subset is left out; bold ones
    are beyond the noise of their own benchmark, subsets marked to be dropped are named in bold.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = round_.effects
    columns = ["average", *found.benchmarks] if len(found.benchmarks) > 1 else [*found.benchmarks]
    size = (
        _MARGIN[0] + _CELL[0] * len(columns),
        _MARGIN[1] + _CELL[1] * len(found.effects),
    )
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _fill(axes, round_, columns)
    # No version, no date: the same scores give the same file.
    figure.savefig(path, format="png", metadata={"Software": None})


def _fill(axes: Axes, round_: Round, columns: list[str]) -> None:
    effects = round_.effects.effects
    points = [[100 * effect.gains.get(name, effect.gain) for name in columns] for effect in effects]
    largest = max(abs(value) for line in points for value in line) or 1.0
    image = axes.imshow(points, cmap=_COLORS, vmin=-largest, vmax=largest, aspect="auto")
    for y, effect in enumerate(effects):
        for x, name in enumerate(columns):
            is_sure = name in effect.stands_out or (name not in effect.gains and effect.is_marked)
            value = points[y][x]
            color = "white" if abs(value) > _STRONG * largest else _INK
            weight = "bold" if is_sure else "normal"
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 10}
            axes.text(x, y, f"{value:+.2f}", color=color, fontweight=weight, **style)
    _label(axes, round_, columns)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=9, colors=_INK)
    bar.outline.set_visible(False)


def _label(axes: Axes, round_: Round, columns: list[str]) -> None:
    found = round_.effects
    names = [f"{e.subset} (drop)" if e.is_marked else e.subset for e in found.effects]
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=10)
    axes.set_yticks(range(len(names)), names, fontsize=10)
    for label, effect in zip(axes.get_yticklabels(), found.effects, strict=True):
        label.set_fontweight("bold" if effect.is_marked else "normal")
    axes.tick_params(length=0, colors=_INK)
    before = f"\n({', '.join(round_.removed)} being out already)" if round_.removed else ""
    title = f"Change in points when a subset is left out{before}"
    axes.set_title(title, loc="left", fontsize=12, color=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
