"""What the second job's measurements are held against, computed by PyTorch from the same keys and values."""

import dataclasses
import time

import torch
from haystack import Haystack

PAGE_TOKENS = 16


@dataclasses.dataclass
class Truth:
    """Of one layer, for each position: dense attention in fp32 [positions, query_heads, head_dim], its
    log-sum-exp [positions, query_heads], and the mass of the best pages [positions, query_heads,
    budgets]."""

    output: torch.Tensor
    lse: torch.Tensor
    best_mass: torch.Tensor


def dense_truth(haystack: Haystack, layer: int, rows: list[int], budgets: list[int]) -> Truth:
    """Exact attention of the newest window's rows, and the largest share of its mass that any choice of
    pages of 16 tokens could hold: the bound of every method with that page and budget."""
    keys, values = haystack.keys(layer), haystack.values(layer)
    queries = haystack.queries[layer][rows]
    num_rows, num_heads, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    positions = torch.tensor([haystack.newest_start + row for row in rows])
    outputs, lses, masses = [], [], []
    for kv_head in range(keys.shape[1]):
        key, value = keys[:, kv_head].float(), values[:, kv_head].float()
        query = queries[:, kv_head * group : (kv_head + 1) * group].reshape(-1, head_dim)
        logits = query @ key.T * head_dim**-0.5
        hidden = torch.arange(len(key)) > positions.repeat_interleave(group).unsqueeze(1)
        logits.masked_fill_(hidden, float("-inf"))
        lse = logits.logsumexp(-1, keepdim=True)
        mass = logits.sub_(lse).exp_()
        outputs.append((mass @ value).reshape(num_rows, group, -1))
        lses.append(lse.reshape(num_rows, group))
        pages = torch.nn.functional.pad(mass, (0, -len(key) % PAGE_TOKENS))
        pages = pages.reshape(len(mass), -1, PAGE_TOKENS).sum(-1)
        best = pages.topk(min(max(budgets) // PAGE_TOKENS, pages.shape[1]), dim=-1).values.cumsum(-1)
        counts = [min(budget // PAGE_TOKENS, best.shape[1]) - 1 for budget in budgets]
        masses.append(best[:, counts].reshape(num_rows, group, len(budgets)))
    return Truth(torch.cat(outputs, 1), torch.cat(lses, 1), torch.cat(masses, 1))


def sdpa_seconds(haystack: Haystack, layer: int, lengths: list[int], repeats: int) -> list[list[float]]:
    """Times of PyTorch's own attention of one query over the first keys, in this process, no service."""
    # [1, heads, tokens, head_dim], contiguous as an engine's cache would be.
    key = haystack.keys(layer).transpose(0, 1).unsqueeze(0).contiguous()
    value = haystack.values(layer).transpose(0, 1).unsqueeze(0).contiguous()
    # The query heads of a group as rows of one head: so PyTorch reads each key once, its fastest way.
    query = haystack.queries[layer][-1].reshape(1, key.shape[1], -1, key.shape[3]).to(key.dtype)
    all_times = []
    for length in lengths:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(
                query, key[:, :, :length], value[:, :, :length]
            )
            times.append(time.perf_counter() - start)
        all_times.append(times[1:])
    return all_times
