"""The report's plots, as SVG text to be put into its HTML."""

import io
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

# One colour and mark a method wherever it appears.
_STYLES = {
    "dense": ("#222222", "o", "-"),
    "sdpa": ("#8a8a8a", "s", "--"),
    "best": ("#8a8a8a", "", "--"),
    "quest": ("#1f6fb4", "o", "-"),
    "kinetics": ("#2e9c5a", "^", "-"),
    "block_topk": ("#8657c2", "D", "-"),
    "block_topk_bound": ("#d1495b", "v", "-"),
    "moba": ("#9c6b30", "P", "-"),
    "window": ("#ef8a17", "X", "-"),
}
_NAMES = {"sdpa": "PyTorch SDPA, in process", "best": "best possible pages of 16"}
_MASS_FLOOR = 1e-4

plt.rcParams.update(
    {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)


def tokens_text(tokens: float) -> str:
    """4,096 as 4K, 2^20 as 1M."""
    if tokens >= 1 << 20:
        return f"{tokens / (1 << 20):g}M"
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def _svg(figure, name: str, description: str) -> str:
    """The figure's SVG element. `name` keeps its ids apart from those of other figures on the page."""
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _line(axes, family: str, x, y) -> None:
    color, marker, line = _STYLES[family]
    axes.plot(
        x,
        y,
        color=color,
        marker=marker,
        linestyle=line,
        markersize=5,
        linewidth=1.7,
        label=_NAMES.get(family, family),
    )


def _token_axis(axes, values: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [tokens_text(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _milliseconds(axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _families(figures: list[dict]) -> list[str]:
    return list(dict.fromkeys(figure["family"] for figure in figures))


def latency(figures: list[dict]) -> str:
    """Median decode latency against context length, both logarithmic."""
    figure, axes = plt.subplots(figsize=(8.6, 4.6))
    for family in _families(figures):
        points = [point for point in figures if point["family"] == family]
        _line(axes, family, [p["context_tokens"] for p in points], [p["p50_ms"] for p in points])
    lengths = sorted({point["context_tokens"] for point in figures})
    _token_axis(axes, lengths)
    axes.set_yscale("log")
    _milliseconds(axes.yaxis)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("decode latency, one token, one layer (ms, median)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "latency", "Decode latency against context length")


def _budget_axis(axes, figures: list[dict]) -> None:
    reads = [point["tokens_read"] for point in figures]
    powers = range(int(numpy.log2(min(reads))), int(numpy.ceil(numpy.log2(max(reads)))) + 1)
    _token_axis(axes, [float(1 << power) for power in powers])
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel("tokens read a query head (mean)")


def _against_budget(figures: list[dict], best: list[dict], panels, name: str, description: str) -> str:
    """Three panels of lines over the tokens read. panels: (value of a figure or of a best point, None
    where it has none; title; label of the axis; whether it is a share)."""
    figure, all_axes = plt.subplots(1, 3, figsize=(13.2, 4.2), layout="constrained")
    for axes, (value, title, label, is_share) in zip(all_axes, panels, strict=True):
        for family in _families(figures):
            points = [point for point in figures if point["family"] == family]
            _line(axes, family, [p["tokens_read"] for p in points], [value(p) for p in points])
        if is_share:
            _line(axes, "best", [p["budget_tokens"] for p in best], [value(p) for p in best])
        _budget_axis(axes, figures)
        axes.set_title(title)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.02 if is_share else None)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return _svg(figure, name, description)


def accuracy(figures: list[dict], best: list[dict]) -> str:
    """Recall (mean and worst tenth) and output error against the tokens read."""
    share = "share of dense attention mass"
    panels = [
        (lambda p: p["recall_mean"], "Recall of attention mass, mean", share, True),
        (lambda p: p["recall_p10"], "Recall, worst tenth of heads and positions", share, True),
        (
            lambda p: p["error_mean"],
            "Relative error of the output, mean",
            "‖out − dense‖ / ‖dense‖",
            False,
        ),
    ]
    return _against_budget(figures, best, panels, "accuracy", "Recall and error against budget")


def recall_by_layer(figures: list[dict], best: list[dict], layers: list[int]) -> str:
    """The same recall, layer by layer: how spread a layer's attention is decides."""

    def panel(index: int, layer: int):
        title = f"Recall in layer {layer}, mean"
        label = "share of dense attention mass"
        return (lambda p: p["recall_by_layer"][index], title, label, True)

    panels = [panel(index, layer) for index, layer in enumerate(layers)]
    return _against_budget(figures, best, panels, "by-layer", "Recall by layer against budget")


def trade(figures: list[dict], dense: dict) -> str:
    """What accuracy costs: recall against latency at the full length."""
    figure, axes = plt.subplots(figsize=(8.6, 4.4))
    for family in _families(figures):
        points = [point for point in figures if point["family"] == family]
        _line(axes, family, [p["p50_ms"] for p in points], [p["recall_mean"] for p in points])
    _line(axes, "dense", [dense["p50_ms"]], [1.0])
    axes.set_xscale("log")
    _milliseconds(axes.xaxis)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("decode latency at the full length, one token, one layer (ms, median)")
    axes.set_ylabel("recall of attention mass, mean")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "trade", "Recall against latency")


def _binned(heads: list[dict], begin: int, end: int, num_bins: int) -> numpy.ndarray:
    """[heads, bins]: dense mass of the selected spans in each bin; NaN where nothing was selected."""
    width = (end - begin) / num_bins
    mass = numpy.full((len(heads), num_bins), numpy.nan)
    for row, head in enumerate(heads):
        for span_begin, span_end, span_mass in head["spans"]:
            first = max(0, int((span_begin - begin) / width))
            last = min(num_bins - 1, int((span_end - 1 - begin) / width))
            if span_end <= begin or span_begin >= end:
                continue
            share = span_mass / max(1.0, (span_end - span_begin) / width)
            mass[row, first : last + 1] = numpy.nan_to_num(mass[row, first : last + 1]) + share
    return mass


def _eighths(begin: int, end: int) -> tuple[list[float], list[str]]:
    """Ticks that cut a range into eight parts, and their texts."""
    ticks = [begin + (end - begin) * part / 8 for part in range(9)]
    return ticks, [("−" if tick < 0 else "") + tokens_text(abs(tick)) for tick in ticks]


def selection_map(selection: dict, window_tokens: int) -> str:
    """Which tokens each head of each layer chose: over the whole context, and in its newest window."""
    heads = sorted(selection["heads"], key=lambda head: (head["layer"], head["head"]))
    end = selection["position"] + 1
    newest = max(0, end - window_tokens)
    panels = [
        (0, end, 512, "The whole context", 0, "position in the context (tokens)"),
        (newest, end, 256, f"Its newest {tokens_text(end - newest)}", end, "position before the query (tokens)"),
    ]
    figure, all_axes = plt.subplots(
        1, 2, figsize=(13.2, 5.2), sharey=True, width_ratios=[2, 1], layout="constrained"
    )
    colors = plt.get_cmap("viridis_r").copy()
    colors.set_bad("#f1f1f1")
    for axes, (begin, stop, num_bins, title, origin, label) in zip(all_axes, panels, strict=True):
        mass = numpy.maximum(_binned(heads, begin, stop, num_bins), _MASS_FLOOR)
        image = axes.imshow(
            mass,
            aspect="auto",
            interpolation="none",
            cmap=colors,
            norm=LogNorm(_MASS_FLOOR, 1.0),
            extent=(begin - origin, stop - origin, len(heads) - 0.5, -0.5),
        )
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.grid(visible=False)
        axes.set_xticks(*_eighths(begin - origin, stop - origin))
        layers = [head["layer"] for head in heads]
        for row in range(1, len(heads)):
            if layers[row] != layers[row - 1]:
                axes.axhline(row - 0.5, color="white", linewidth=3)
    all_axes[0].set_yticks(
        range(len(heads)), [f"layer {head['layer']}, head {head['head']}" for head in heads], fontsize=8
    )
    figure.colorbar(image, ax=all_axes, label="share of dense attention mass there", pad=0.01)
    return _svg(figure, "map", "Spans selected by each head")
