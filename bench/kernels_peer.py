"""PyTorch's scaled_dot_product_attention on the shapes of bench_kernels, to be run in the same minute.

    python bench/kernels_peer.py [--quick] [--threads N] [--json FILE]
"""

import argparse
import json
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

SHAPES = [("9/3 d64", 9, 3, 64), ("32/8 d128", 32, 8, 128)]


def median_seconds(budget, work):
    """The median of as many runs as fit in the budget, at least three, after one to warm up."""
    work()
    seconds = []
    start = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - start < budget:
        before = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds)


def attention(query, key, value, causal):
    return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def cases(quick):
    for name, query_heads, kv_heads, dim in SHAPES:
        for tokens in [4096] if quick else [131072]:
            yield f"dense decode {name}", query_heads, kv_heads, dim, 1, tokens
        for tokens in [300] if quick else [4096, 8192]:
            yield f"dense prefill {name}", query_heads, kv_heads, dim, tokens, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small contexts only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="append a line for each case to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for label, query_heads, kv_heads, dim, rows, tokens in cases(arguments.quick):
        for dtype in (torch.bfloat16, torch.float32):
            query = torch.randn(1, query_heads, rows, dim, dtype=dtype)
            key = torch.randn(1, kv_heads, tokens, dim, dtype=dtype)
            value = torch.randn(1, kv_heads, tokens, dim, dtype=dtype)
            with torch.inference_mode():
                seconds = median_seconds(
                    0.05 if arguments.quick else 2.0,
                    lambda: attention(query, key, value, causal=rows > 1),
                )
            pairs = tokens if rows == 1 else tokens * (tokens + 1) / 2
            flops = 4 * pairs * query_heads * dim
            size = f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
            name = f"{label} {size}"
            type_name = str(dtype).removeprefix("torch.")
            print(f"{name:34} {type_name:9} {seconds * 1e3:9.3f}ms {flops / seconds / 1e9:9.1f} GFLOP/s", flush=True)
            if arguments.json:
                with open(arguments.json, "a", encoding="utf-8") as file:
                    record = {
                        "case": name,
                        "peer": f"PyTorch {torch.__version__} SDPA, {arguments.threads} threads",
                        "type": type_name,
                        "seconds": seconds,
                        "flops": flops,
                    }
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
