"""The second job: a context of 2^20 tokens of a real text, real queries decoded against it, dense and
sparse: latency, recall of attention mass, and error of the output against the budget.
"""

import time

import haystack as haystacks
import numpy
import oracle
import progress
import variants
from engine import Engine
from service import Service

# The middle third of the model, evenly spaced: before 12 attention is spread over content, later half of it
# lies on the first token, and 18 is the first layer in which heads look up single facts.
_LAYERS = [8, 13, 18]
_HARVEST_SECONDS = 180.0
_LATENCY_REPEATS = 12


class Sizes:
    """The job at full size, or small enough for a test."""

    def __init__(self, engine: Engine, quick: bool):
        self.num_tokens = 1 << (16 if quick else 20)
        self.window = 1024 if quick else engine.context_tokens
        self.harvest_seconds = 6.0 if quick else _HARVEST_SECONDS
        self.num_queries = 4 if quick else 16
        self.lengths = [1 << power for power in range(12, self.num_tokens.bit_length())]
        self.repeats = 3 if quick else _LATENCY_REPEATS

    def rows(self) -> list[int]:
        """Rows of the newest window whose queries are decoded: its second half, evenly."""
        last = self.window - haystacks.SINK_TOKENS - 1
        first = self.window // 2
        return [int(row) for row in numpy.linspace(first, last, self.num_queries)]


class _Measured:
    """Answers of one variant to the same queries: per layer [positions, query_heads, ...]."""

    def __init__(self, outputs, lses, seconds, fraction):
        self.outputs = numpy.stack(outputs)
        self.lses = numpy.stack(lses)
        self.seconds = seconds
        self.fraction = fraction


def _decode_all(service, context, haystack, rows, method, bar) -> _Measured:
    """Every query of every layer by itself, as an engine would send them, timed at the client."""
    outputs, lses, seconds = [], [], []
    before = service.tokens_read()
    for layer, queries in enumerate(haystack.queries):
        results = []
        for row in rows:
            start = time.perf_counter()
            results.append(
                context.decode(
                    layer,
                    queries[row : row + 1].numpy(),
                    start_pos=haystack.newest_start + row,
                    method=method,
                    return_lse=True,
                )
            )
            seconds.append(time.perf_counter() - start)
        outputs.append(numpy.concatenate([result.output for result in results]))
        lses.append(numpy.concatenate([result.lse for result in results]))
    bar.advance()
    fraction = service.tokens_read().fraction_since(before)
    return _Measured(outputs, lses, seconds, fraction)


def _relative_error(found: numpy.ndarray, expected: numpy.ndarray) -> numpy.ndarray:
    difference = numpy.linalg.norm(found - expected, axis=-1)
    return difference / numpy.linalg.norm(expected, axis=-1)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p90 = numpy.percentile(seconds, [50, 90])
    return {"p50_ms": 1e3 * p50, "p90_ms": 1e3 * p90}


def _accuracy(measured: _Measured, dense: _Measured) -> dict:
    """Recall is exact: both log-sum-exps are over the same logits, the sparse one over fewer of them."""
    recall = numpy.exp(numpy.minimum(0.0, measured.lses - dense.lses))
    error = _relative_error(measured.outputs, dense.outputs)
    return {
        "recall_mean": float(recall.mean()),
        "recall_p10": float(numpy.percentile(recall, 10)),
        "recall_by_layer": [float(layer.mean()) for layer in recall],
        "error_mean": float(error.mean()),
        "error_by_layer": [float(layer.mean()) for layer in error],
        "error_p50": float(numpy.percentile(error, 50)),
        "error_p90": float(numpy.percentile(error, 90)),
    }


def _measure_accuracy(service, context, haystack, rows, quick) -> tuple[_Measured, list[dict]]:
    all_variants = variants.million_variants(quick)
    dense_method = variants.shipped("dense")
    with progress.Progress("Decoding real queries", len(all_variants) + 1, "methods") as bar:
        # Once unmeasured: the first calls touch cold memory.
        _decode_all(service, context, haystack, rows[:1], dense_method, bar)
        bar.done = 0
        dense = _decode_all(service, context, haystack, rows, dense_method, bar)
        figures = []
        for variant in all_variants:
            measured = _decode_all(service, context, haystack, rows, variant.method, bar)
            figures.append(
                {
                    "label": variant.label,
                    "family": variant.family,
                    "budget_tokens": variant.budget_tokens,
                    "fraction_read": measured.fraction,
                    "tokens_read": measured.fraction * haystack.num_tokens,
                    **_percentiles(measured.seconds),
                    **_accuracy(measured, dense),
                }
            )
    return dense, figures


def _check_against_torch(haystack, rows, dense: _Measured, budgets) -> dict:
    """The dense answers against PyTorch in fp32 on the same keys, and the best possible recall."""
    errors, lse_differences, best = [], [], []
    with progress.Progress("Checking dense with PyTorch", len(haystack.layers), "layers") as bar:
        for layer in range(len(haystack.layers)):
            truth = oracle.dense_truth(haystack, layer, rows, budgets)
            errors.append(_relative_error(dense.outputs[layer], truth.output.numpy()))
            lse_differences.append(numpy.abs(dense.lses[layer] - truth.lse.numpy()))
            best.append(truth.best_mass.numpy())
            bar.advance()
    best_mass = numpy.stack(best)
    return {
        "error_max": float(numpy.max(errors)),
        "lse_difference_max": float(numpy.max(lse_differences)),
        "page_tokens": oracle.PAGE_TOKENS,
        "best_recall": [
            {
                "budget_tokens": budget,
                "recall_mean": float(best_mass[..., index].mean()),
                "recall_p10": float(numpy.percentile(best_mass[..., index], 10)),
                "recall_by_layer": [float(layer[..., index].mean()) for layer in best_mass],
            }
            for index, budget in enumerate(budgets)
        ],
    }


def _latency_methods(quick: bool) -> list[variants.Variant]:
    """As shipped, in all layers."""
    return [
        variants.Variant(name, name, variants.everywhere(variants.shipped(name)))
        for name in ["dense", *variants.million_families(quick)]
    ]


def _measure_latency(context, haystack, sizes: Sizes, quick: bool) -> list[dict]:
    """Decode of the last token of forks of growing length, all layers, one call a layer."""
    methods = _latency_methods(quick)
    figures = []
    with progress.Progress(
        "Latency against length", len(sizes.lengths) * len(methods), "points"
    ) as bar:
        for length in sizes.lengths:
            fork = context.fork(length)
            for variant in methods:
                seconds = []
                for repeat in range(sizes.repeats + 1):
                    for layer, queries in enumerate(haystack.queries):
                        query = queries[-1 - repeat :][:1].numpy()
                        start = time.perf_counter()
                        fork.decode(layer, query, method=variant.method)
                        seconds.append(time.perf_counter() - start)
                warm = seconds[len(haystack.queries) :]
                figures.append(
                    {
                        "family": variant.family,
                        "context_tokens": length,
                        **_percentiles(warm),
                    }
                )
                bar.advance()
            fork.delete()
    for length, seconds in zip(
        sizes.lengths,
        oracle.sdpa_seconds(haystack, 0, sizes.lengths, 3 * sizes.repeats),
        strict=True,
    ):
        figures.append(
            {"family": "sdpa", "context_tokens": length, **_percentiles(seconds)}
        )
    return figures


def _selection_map(context, haystack, row: int, method) -> dict:
    """What every head of every layer selected for one query, with the dense mass of each span."""
    heads = []
    for layer, queries in enumerate(haystack.queries):
        explained = context.explain(
            layer,
            queries[row : row + 1].numpy(),
            start_pos=haystack.newest_start + row,
            method=method,
            compare_with_dense=True,
        )
        for selection in explained.selections:
            heads.append(
                {
                    "layer": haystack.layers[layer],
                    "head": selection.query_head,
                    "tokens": selection.num_tokens,
                    "recall": float(explained.recall[0, selection.query_head]),
                    "error": float(explained.relative_error[0, selection.query_head]),
                    "spans": [[span.begin, span.end, span.mass or 0.0] for span in selection.spans],
                }
            )
    return {"position": haystack.newest_start + row, "heads": heads}


def _print(result: dict) -> None:
    dense = result["dense"]
    progress.say(
        f"  Dense through the service against PyTorch in fp32: relative error at most "
        f"{result['check']['error_max']:.1e}, lse within {result['check']['lse_difference_max']:.1e}"
    )
    rows = [["dense", "100%", f"{dense['p50_ms']:.1f}", f"{dense['p90_ms']:.1f}", "1", "1", "0", "0"]]
    for figure in result["accuracy"]:
        rows.append(
            [
                figure["label"],
                f"{figure['fraction_read']:.2%}",
                f"{figure['p50_ms']:.1f}",
                f"{figure['p90_ms']:.1f}",
                f"{figure['recall_mean']:.3f}",
                f"{figure['recall_p10']:.3f}",
                f"{figure['error_mean']:.3f}",
                f"{figure['error_p90']:.3f}",
            ]
        )
    header = ["method and budget", "keys read", "p50 ms", "p90 ms", "recall", "p10", "error", "p90"]
    progress.table(header, rows)
    best = ", ".join(
        f"{point['budget_tokens']:,}: {point['recall_mean']:.3f}"
        for point in result["check"]["best_recall"]
    )
    progress.say(f"  Best possible recall with pages of 16, by budget: {best}")


def run(engine: Engine, service: Service, verses: list[str], quick: bool) -> dict:
    """The job's figures."""
    sizes = Sizes(engine, quick)
    progress.headline(f"A context of {sizes.num_tokens:,} tokens")
    speeds = engine.use_fastest_dtype()
    ids = engine.encode("\n".join(verses))
    haystack = haystacks.harvest(
        engine, ids, _LAYERS, sizes.num_tokens, sizes.window, sizes.harvest_seconds
    )
    progress.say(
        f"  {len(haystack.windows)} distinct windows of {sizes.window:,} tokens, then repeated: "
        f"{haystack.distinct_tokens:,} distinct tokens of {haystack.num_tokens:,}"
    )
    families = variants.million_families(quick)
    methods = [variants.shipped("dense")]
    methods += [variants.everywhere(variants.shipped(family)) for family in families]
    config = engine.model.config
    context = service.client.create_context(
        num_layers=len(_LAYERS),
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        kv_dtype="bf16",
        methods=methods,
    )
    append_seconds = haystacks.append(context, haystack)
    info = context.info()
    rows = sizes.rows()
    dense, accuracy = _measure_accuracy(service, context, haystack, rows, quick)
    budgets = sorted({figure["budget_tokens"] for figure in accuracy if figure["family"] != "window"})
    result = {
        "context_tokens": sizes.num_tokens,
        "window_tokens": sizes.window,
        "distinct_windows": len(haystack.windows),
        "distinct_tokens": haystack.distinct_tokens,
        "layers": _LAYERS,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "queries": len(rows) * len(_LAYERS) * config.num_attention_heads,
        "model_dtype": str(engine.model.dtype).removeprefix("torch."),
        "model_tokens_per_second": speeds,
        "harvest_seconds": haystack.harvest_seconds,
        "append_seconds": append_seconds,
        "kv_bytes": info.kv_bytes,
        "summary_bytes": info.summary_bytes,
        "dense": _percentiles(dense.seconds),
        "accuracy": accuracy,
        "check": _check_against_torch(haystack, rows, dense, budgets),
        "latency": _measure_latency(context, haystack, sizes, quick),
        "map": _selection_map(
            context,
            haystack,
            rows[-1],
            variants.default_variant().method,
        ),
    }
    _print(result)
    context.delete()
    return result
