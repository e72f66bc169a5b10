"""Plot of the overload result file."""

from matplotlib.figure import Figure

from benchmarks.plots import LIMIT, Result, caption, plt, remove_frame

MIN_GOODPUT = 0.9


def goodput(result: Result) -> Figure | None:
    """Plot goodput over time at each multiple of the sustainable rate; red: 90 % of the peak."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, row in enumerate(result["rows"]):
        shares = [work / result["peak"] for work in row["goodput_by_second"]]
        mean = [sum(shares[max(0, i - 4) : i + 1]) / len(shares[max(0, i - 4) : i + 1]) for i in range(len(shares))]
        color = plt.get_cmap("viridis")(number / len(result["rows"]))
        label = f"{row['multiple']}×: {row['goodput_to_peak']:.2f} of the peak, p99 of a query {_ratio(row)}× its idle"
        axes.plot(mean, color=color, label=label)
    axes.axhline(MIN_GOODPUT, color=LIMIT, lw=1)
    axes.set(
        title="Goodput under overload, mean of 5 seconds",
        ylabel="useful work per second, share of the peak",
        ylim=(0, 1.3),
    )
    axes.set_xlabel(f"seconds; {caption(result)}", fontsize=8)
    remove_frame(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _ratio(row: Result) -> str:
    return "–" if row["query_p99_to_idle"] is None else f"{row['query_p99_to_idle']:.1f}"


PLOTS = (goodput,)
