"""Public kernels on the shapes of the CUDA benchmarks, to be run in the same minute on the same GPU.

    python bench/cuda_peers.py [--quick] [--json FILE]

PyTorch's scaled_dot_product_attention through cuDNN and through FlashAttention-2; the sparse attention of
flash-linear-attention where that package is installed. A line of JSON for each case goes to FILE.
"""

import argparse
import json
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPES = [("32/8 d128", 32, 8, 128), ("64/4 d128", 64, 4, 128), ("32/8 d64", 32, 8, 64)]
BACKENDS = [("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)]
BLOCK_TOKENS = 64
TOP_BLOCKS = 16


def median_ms(work, budget_ms):
    """The median of as many runs as fit in the budget, at least five, after three to warm up."""
    for _ in range(3):
        work()
    times = []
    while len(times) < 5 or sum(times) < budget_ms:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def size(tokens):
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def dense_cases(quick):
    """(case, peer, work, FLOP, bytes that must move) of dense attention."""
    for name, query_heads, kv_heads, dim in SHAPES:
        for tokens in [8192] if quick else [8192, 32768, 65536, 131072]:
            query, key, value = (
                random(1, heads, tokens, dim) for heads in (query_heads, kv_heads, kv_heads)
            )
            flops = 2 * tokens * tokens * query_heads * dim
            for peer, backend in BACKENDS:
                if peer != "cuDNN" and tokens > 65536:
                    continue
                yield f"dense prefill {name} {size(tokens)}", peer, backend, (query, key, value, True), flops, 0
        for tokens in [131072] if quick else [16384, 131072, 1 << 20]:
            query, key, value = random(1, query_heads, 1, dim), *(random(1, kv_heads, tokens, dim) for _ in range(2))
            for peer, backend in BACKENDS:
                yield f"dense decode {name} {size(tokens)}", peer, backend, (query, key, value, False), 0, 4 * tokens * kv_heads * dim


def sdpa(query, key, value, causal):
    return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def native_sparse_attention():
    """flash-linear-attention's kernels, or None and the reason."""
    try:
        from fla.ops.nsa import parallel_nsa
    except Exception as failure:  # any of its own dependencies may be missing
        return None, f"{type(failure).__name__}: {failure}"
    return parallel_nsa, ""


def sparse_cases(parallel_nsa, quick):
    """(case, peer, work) of native sparse attention; that package needs groups of 16 query heads."""
    for tokens in [16384] if quick else [32768, 65536]:
        query, key, value = (random(1, tokens, heads, 128) for heads in (64, 4, 4))
        gates = [torch.rand(1, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        own = torch.arange(tokens, device="cuda").view(1, tokens, 1, 1) // BLOCK_TOKENS
        blocks = (torch.rand(1, tokens, 4, TOP_BLOCKS, device="cuda") * (own + 1)).long()
        blocks[..., 0:1] = own
        blocks = blocks.sort(-1).values

        def selected():
            return parallel_nsa(
                query, key, value, g_slc=gates[1], block_indices=blocks, block_counts=TOP_BLOCKS,
                block_size=BLOCK_TOKENS, window_size=0,
            )

        def whole():
            return parallel_nsa(
                query, key, value, gates[0], gates[1], block_counts=TOP_BLOCKS, block_size=BLOCK_TOKENS, window_size=0
            )

        yield f"selected prefill 64/4 d128 {size(tokens)} random lists", "flash-linear-attention", selected
        yield f"compressed and selected prefill 64/4 d128 {size(tokens)}", "flash-linear-attention", whole


class Report:
    """Prints a line for each result and appends it to the file, if there is one."""

    def __init__(self, path):
        self.path = path

    def add(self, case, peer, work, flops=0, num_bytes=0, budget_ms=300.0):
        try:
            with torch.inference_mode():
                milliseconds = median_ms(work, budget_ms)
        except Exception as failure:  # a peer that refuses a shape is a result, too
            print(f"{case:42} {peer:24} not run: {str(failure).splitlines()[0][:90]}", flush=True)
            return
        rate = f"{flops / milliseconds / 1e9:7.0f} TFLOP/s" if flops else ""
        rate = f"{num_bytes / milliseconds / 1e6:7.0f} GB/s" if num_bytes else rate
        print(f"{case:42} {peer:24} {milliseconds:9.3f} ms {rate}", flush=True)
        if self.path:
            record = {"case": case, "peer": peer, "ms": milliseconds, "flops": flops, "bytes": num_bytes}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small contexts only")
    parser.add_argument("--json", help="append a line for each case to this file")
    arguments = parser.parse_args()
    torch.manual_seed(torch.seed() % 2**31)
    report = Report(arguments.json)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    source = random(1 << 29)
    target = torch.empty_like(source)
    report.add("device copy", "PyTorch", lambda: target.copy_(source), num_bytes=2 * source.nbytes)
    del source, target
    for case, peer, backend, (query, key, value, causal), flops, num_bytes in dense_cases(arguments.quick):
        with sdpa_kernel(backend):
            report.add(case, peer, lambda: sdpa(query, key, value, causal), flops, num_bytes)
    parallel_nsa, reason = native_sparse_attention()
    if parallel_nsa is None:
        print(f"flash-linear-attention: not run, {reason}")
        return
    for case, peer, work in sparse_cases(parallel_nsa, arguments.quick):
        report.add(case, peer, work)


if __name__ == "__main__":
    main()
