"""The second job's context: a model's own keys and values over a real text, far beyond the model's context.

Windows of the model's context length are laid one after the other, as many distinct ones as the time
allows, then the same again; the newest window is the queries' own, and its text is not among the others.
Two things make of them one context rather than many that lie upon each other:
- Positions. A model knows none beyond its own context. Keys of all but the newest window are stored as at
  position 0, the farthest that the model knows, so that heads which look at near tokens find those in the
  newest window alone, and heads which look for content find it anywhere (as InfLLM does, arXiv 2402.04617).
- The sink, attention that a model puts on its first tokens. Each window is read behind the text's first
  few tokens, whose keys and values are stored once.
"""

import dataclasses

import progress
import torch
from engine import Engine, Harvest

SINK_TOKENS = 4


@dataclasses.dataclass
class Haystack:
    """Per layer, keys and values [tokens, kv_heads, head_dim] of the sink, of each distinct window and
    of the newest window, and the newest window's queries [tokens, query_heads, head_dim] in fp32."""

    layers: list[int]
    num_tokens: int
    window_tokens: int
    sink: list[tuple[torch.Tensor, torch.Tensor]]
    windows: list[list[tuple[torch.Tensor, torch.Tensor]]]
    newest: list[tuple[torch.Tensor, torch.Tensor]]
    queries: list[torch.Tensor]
    harvest_seconds: float

    @property
    def newest_start(self) -> int:
        return self.num_tokens - len(self.queries[0])

    @property
    def distinct_tokens(self) -> int:
        """Tokens of the context that were computed rather than repeated."""
        distinct = SINK_TOKENS + sum(len(window[0][0]) for window in self.windows)
        return min(self.num_tokens, distinct + len(self.queries[0]))

    def pieces(self):
        """The whole context in order: (start, per layer (key, value))."""
        yield 0, self.sink
        position, index = SINK_TOKENS, 0
        while position < self.newest_start:
            window = self.windows[index % len(self.windows)]
            room = self.newest_start - position
            piece = [(key[:room], value[:room]) for key, value in window]
            yield position, piece
            position += len(piece[0][0])
            index += 1
        yield position, self.newest

    def keys(self, layer: int) -> torch.Tensor:
        """[tokens, kv_heads, head_dim]: the context's keys of the layer with that index."""
        return torch.cat([piece[layer][0] for _, piece in self.pieces()])

    def values(self, layer: int) -> torch.Tensor:
        return torch.cat([piece[layer][1] for _, piece in self.pieces()])


def harvest(
    engine: Engine, ids: list[int], layers: list[int], num_tokens: int, window: int, seconds: float
) -> Haystack:
    """Reads windows until `seconds` are over, but at least two, and no more than fit."""
    reader = Harvest(engine, layers)
    step = window - SINK_TOKENS
    sink_ids = ids[:SINK_TOKENS]
    wanted = min(-(-(num_tokens - window) // step), (len(ids) - SINK_TOKENS) // step - 1)

    def read(body: list[int]):
        return reader.window(sink_ids + body)

    def stored(*key_and_value: torch.Tensor):
        # bf16, the type of the context's cache, so that the checks see the keys that are stored.
        return tuple(rows.bfloat16() for rows in key_and_value)

    rows = read(ids[-step:])
    sink = [stored(layer.key[:SINK_TOKENS], layer.value[:SINK_TOKENS]) for layer in rows]
    newest = [stored(layer.key[SINK_TOKENS:], layer.value[SINK_TOKENS:]) for layer in rows]
    queries = [layer.query[SINK_TOKENS:].float() for layer in rows]
    windows = []
    with progress.Progress("Windows through the model", wanted, "windows", seconds) as bar:
        while len(windows) < wanted and (bar.seconds < seconds or len(windows) < 2):
            begin = SINK_TOKENS + len(windows) * step
            windows.append(
                [
                    stored(layer.first_key[SINK_TOKENS:], layer.value[SINK_TOKENS:])
                    for layer in read(ids[begin : begin + step])
                ]
            )
            bar.advance()
        taken = bar.seconds
    return Haystack(layers, num_tokens, window, sink, windows, newest, queries, taken)


def append(context, haystack: Haystack) -> float:
    """Stores the whole context; returns the seconds that it took."""
    with progress.Progress("Appending to the service", haystack.num_tokens, "tokens") as bar:
        for start, piece in haystack.pieces():
            with context.append_stream() as stream:
                for layer, (key, value) in enumerate(piece):
                    stream.write(layer, start, key, value)
            bar.advance(len(piece[0][0]))
        return bar.seconds
