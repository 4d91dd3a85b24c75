"""The main job's report: one HTML file that needs nothing else, and all its figures as JSON beside it."""

import html
import json
import pathlib

import charts

_STYLE = """
body { font: 16px/1.5 Helvetica, Arial, sans-serif; color: #1d1d1f; margin: 0; background: #f6f6f4; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 21px; margin: 0 0 8px; }
section { background: #fff; border: 1px solid #e2e2de; border-radius: 8px; padding: 24px; margin-top: 20px; }
p { margin: 0 0 12px; max-width: 80ch; }
.lead { color: #55555a; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: #fff; border: 1px solid #e2e2de; border-radius: 8px; padding: 14px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.25; }
.card span { color: #55555a; font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; margin-bottom: 12px; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #ececea; white-space: nowrap; }
th { font-weight: 600; color: #55555a; border-bottom: 2px solid #d8d8d4; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; }
.right { color: #1d7a43; font-weight: 600; } .wrong { color: #b3261e; font-weight: 600; }
.scroll { overflow-x: auto; }
figure { margin: 8px 0 12px; } figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #55555a; font-size: 14px; max-width: 90ch; margin-top: 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; font-size: 14px; }
dt { color: #55555a; } dd { margin: 0; }
"""


def _text(value) -> str:
    return html.escape(str(value))


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _optional(value, form: str) -> str:
    return "–" if value is None else form.format(value)


def _default_figures(figures: dict) -> dict:
    """The figures of the shipped default method, at the budget that it ships with."""
    return next(
        point for point in figures["million"]["accuracy"] if point["label"] == figures["default"]
    )


def _cards(figures: dict) -> str:
    million, reading = figures["million"], figures["reading"]
    default = _default_figures(figures)
    right = sum(method["right"] for method in reading["methods"])
    cards = [
        (f"{million['context_tokens']:,}", "tokens of context, in each of three layers"),
        (
            f"{million['dense']['p50_ms'] / default['p50_ms']:.0f}× faster",
            f"decode at that length with {_text(default['label'])} than dense: "
            f"{default['p50_ms']:.1f} against {million['dense']['p50_ms']:.0f} ms",
        ),
        (f"{default['fraction_read']:.2%}", "of the keys read by it"),
        (f"{default['recall_mean']:.1%}", "of dense attention's mass on them, mean over heads"),
        (f"{right} of {len(reading['methods'])}", "runs that found the hidden fact"),
    ]
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{big}</b><span>{small}</span></div>' for big, small in cards)
        + "</div>"
    )


def _reading(reading: dict) -> str:
    rows = []
    for method in reading["methods"]:
        mark = "right" if method["right"] else "wrong"
        rows.append(
            [
                _text(method["label"]),
                f'<span class="{mark}">{mark}</span>',
                f"“{_text(method['answer'])}”",
                _optional(method["prefill_seconds"], "{:.1f}"),
                f"{method['decode_tokens_per_second']:.1f}",
                _optional(method["fraction_read"], "{:.1%}"),
                _optional(method["top1_agreement"], "{:.1%}"),
                _optional(method["kl_nats"], "{:.2g}"),
            ]
        )
    header = ["method", "", "answer", "prefill, s", "decode, tok/s", "keys read", "top-1", "KL, nats"]
    table = _table(header, rows).replace("<td>“", '<td class="text">“')
    table = table.replace("<th>answer", '<th class="text">answer')
    return f"""<section><h2>Reading a text and answering a question</h2>
<p>The model read {reading["prompt_tokens"]:,} tokens of the King James Bible with one sentence hidden at
{reading["fact_depth"]:.0%} of it: “{_text(reading["fact"])}” and was asked: “{_text(reading["question"])}”</p>
{table}
<p>Top-1 and KL compare the distributions of the next token with those of the model's own attention (PyTorch
SDPA, {_text(reading["dtype"])}), at the same {reading["compared_positions"]} positions: the prompt's last tokens
and the reference's answer, fed one by one. A dash under prefill: the method answers from a copy-on-write fork of
the dense prefill of the prompt. “Keys read” counts decode steps. “Prefill too” runs a method sparse where it was not made for
that; MoBA is made for models that were trained with it.</p></section>"""


def _million(figures: dict) -> str:
    million = figures["million"]
    dense = million["dense"]
    rows = [["dense", "100%", f"{dense['p50_ms']:.1f}", f"{dense['p90_ms']:.1f}", "1", "1", "0", "0"]]
    for point in million["accuracy"]:
        rows.append(
            [
                _text(point["label"]),
                f"{point['fraction_read']:.2%}",
                f"{point['p50_ms']:.1f}",
                f"{point['p90_ms']:.1f}",
                f"{point['recall_mean']:.3f}",
                f"{point['recall_p10']:.3f}",
                f"{point['error_mean']:.3f}",
                f"{point['error_p90']:.3f}",
            ]
        )
    header = [
        "method and budget, tokens",
        "keys read",
        "p50, ms",
        "p90, ms",
        "recall, mean",
        "recall, worst tenth",
        "error, mean",
        "error, p90",
    ]
    layers = ", ".join(str(layer) for layer in million["layers"])
    check = million["check"]
    return f"""<section><h2>A million tokens behind it</h2>
<p>{million["context_tokens"]:,} tokens of the model's own keys and values, layers {layers}:
{million["distinct_windows"]} distinct windows of {million["window_tokens"]:,} tokens of the text
({million["distinct_tokens"]:,} distinct tokens), then the same again; the newest window is the queries' own.
Keys beyond the newest window are encoded as at position 0, the farthest that the model knows, so that they do not
lie upon the near ones. {million["kv_bytes"] / 2**30:.2f} GiB of keys and values and
{million["summary_bytes"] / 2**30:.2f} GiB of summaries for all methods together. {million["queries"]} real queries
(positions × layers × heads).</p>
{_figure(charts.accuracy(million["accuracy"], check["best_recall"]),
         "Recall: the share of dense attention's mass on the keys that a method read, from the two log-sum-exps. "
         "The dashed line is what no choice of 16-token pages could exceed at that budget.")}
{_figure(charts.recall_by_layer(million["accuracy"], check["best_recall"], million["layers"]),
         "Layers differ more than methods: where attention is spread over tens of thousands of tokens no small "
         "budget can hold it; where it lies on the sink, near tokens and single facts a small one does.")}
{_table(header, rows)}
<p>Dense through the service against PyTorch in fp32 on the same keys: relative error at most
{check["error_max"]:.1e}, log-sum-exp within {check["lse_difference_max"]:.1e}.</p></section>
<section><h2>Latency against context length</h2>
{_figure(charts.latency(million["latency"]),
         "One query through gRPC from Python, one layer a call, on forks of the same context; methods as shipped. "
         "PyTorch's own attention runs in the client's process, without a service.")}
{_figure(charts.trade(million["accuracy"], dense),
         f"What accuracy costs at {million['context_tokens']:,} tokens: each mark is one budget.")}</section>
<section><h2>What each head selected</h2>
{_figure(charts.selection_map(million["map"], million["window_tokens"]),
         f"One query at position {million['map']['position']:,}, method {_text(figures['default'])}. Grey: not "
         "read. Colour: the share of dense attention's mass that lies on the tokens read there.")}</section>"""


def _machine(figures: dict) -> str:
    items = {**figures["machine"], **{f"Time, {k}": f"{v:.0f} s" for k, v in figures["seconds"].items()}}
    rows = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in items.items())
    return f"<section><h2>Machine, versions and times</h2><dl>{rows}</dl></section>"


def write(path: pathlib.Path, figures: dict) -> pathlib.Path:
    """Writes the report and, beside it, figures.json; returns the latter's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = path.with_name("figures.json")
    numbers.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    note = " A quick run: small sizes, for a test of the whole." if figures["quick"] else ""
    path.write_text(
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Longspan: the main job</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><main><h1>A language model reads through Longspan</h1>
<p class="lead">SmolLM2-135M-Instruct in Hugging Face Transformers; its attention and its KV cache are a Longspan
server. Dense and sparse, on real text.{note}</p>
{_cards(figures)}{_reading(figures["reading"])}{_million(figures)}{_machine(figures)}
</main></body></html>
""",
        encoding="utf-8",
    )
    return numbers
