"""What the figures of all suites share: colors, grouped bars, captions and PNG files.

`python -m benchmarks.plots results/cpu.json` draws the figures of a result file again, next to it.
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from benchmarks.report import format_number

mpl.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
Plot = Callable[[Result], Figure | None]  # None: the result has no data for it

OURS, OURS_LIGHT = "#1f5f99", "#7fb3d5"
BASELINE, BASELINE_LIGHT = "#9a9a9a", "#d9a441"
LIMIT = "#b03030"  # of a target or limit
SUITES = ("cpu", "families", "scheduling", "overload", "gpu")


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure with one panel, in inches."""
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def slot(number: int, count: int) -> tuple[float, float]:
    """Return the x offset and the width of bar `number` of the `count` bars of a group."""
    width = 0.8 / count
    return (number - (count - 1) / 2) * width, width


def group_bars(axes: Axes, heights: Mapping[int, float], number: int, count: int, **style: Any) -> BarContainer:
    """Draw bar `number` of `count` in each group. `heights`: height by number of the group."""
    offset, width = slot(number, count)
    return axes.bar([x + offset for x in heights], list(heights.values()), 0.9 * width, **style)


def label_bars(axes: Axes, bars: BarContainer, values: Iterable[float], fontsize: int, **options: Any) -> None:
    """Write a number at each bar."""
    axes.bar_label(bars, [format_number(value) for value in values], fontsize=fontsize, padding=2, **options)


def finish(figure: Figure, axes: Axes, labels: list[str], result: Result, columns: int) -> None:
    """Finish a grouped plot: group labels, machine and date, legend below in `columns` columns."""
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    remove_frame(axes)
    axes.set_xlabel(caption(result), fontsize=8)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def remove_frame(axes: Axes) -> None:
    """Hide the lines at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)


def caption(result: Result) -> str:
    """Return the machine and the date of a result."""
    machine = result["machine"]
    device = result["gpu"]["name"] if "gpu" in result else f"{machine['cpu']}, {machine['cores']} cores"
    return f"{device}, {result['timestamp'][:10]}"


def draw(path: Path, plots: Iterable[Plot]) -> list[Path]:
    """Write a PNG next to the result file for each plot that has data; return the paths."""
    result = json.loads(path.read_text())
    files = []
    for plot in plots:
        figure = plot(result)
        if figure is not None:
            file = path.with_name(f"{path.stem}-{plot.__name__}.png")
            figure.savefig(file, dpi=150)
            plt.close(figure)
            print(f"written: {file}", flush=True)
            files.append(file)
    return files


def main() -> None:
    path = Path(sys.argv[1])
    suite = next((name for name in SUITES if path.stem.startswith(name)), "gpu")  # the GPU suite writes results.json
    draw(path, import_module(f"benchmarks.{suite}.plots").PLOTS)


if __name__ == "__main__":
    main()
