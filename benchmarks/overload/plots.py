"""Plot of the overload result file."""

import numpy as np
from matplotlib.figure import Figure

from benchmarks.plots import LIMIT, Result, caption, plt, remove_frame

MIN_GOODPUT = 0.9


def goodput(result: Result) -> Figure | None:
    """Plot the useful work since the beginning at each multiple of the sustainable rate; red: 90 % of the peak."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, row in enumerate(result["rows"]):
        work = np.cumsum([0, *row["goodput_by_second"]]) / result["peak"]
        ratio = "–" if row["query_p99_to_idle"] is None else f"{row['query_p99_to_idle']:.1f}"
        label = f"{row['multiple']}×: {row['goodput_to_peak']:.2f} of the peak, p99 of a query {ratio}× its idle"
        axes.plot(work, color=plt.get_cmap("viridis")(number / len(result["rows"])), label=label)
    axes.axline((0, 0), slope=MIN_GOODPUT, color=LIMIT, lw=1)
    axes.set(
        title="Goodput under overload", ylabel="useful work, in seconds of the peak", xlim=(0, None), ylim=(0, None)
    )
    axes.set_xlabel(f"seconds; {caption(result)}", fontsize=8)
    remove_frame(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


PLOTS = (goodput,)
