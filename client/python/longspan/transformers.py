"""Longspan as the attention and the KV cache of an unmodified Hugging Face Transformers model.

    longspan.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="longspan")
    with LongspanCache(client, model, methods=["quest"]) as cache:
        model.generate(input_ids, past_key_values=cache)

Each layer's queries, keys and values travel to the server in one call; what comes back is the attention
output. No keys or values stay in the engine. One cache is one sequence (batch size 1, no padding).
Served: decoder models whose layers are all causal full attention. Needs transformers 5 or newer.
"""

from __future__ import annotations

import contextlib
import typing

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from longspan.client import Client
from longspan.context import Context
from longspan.v1.method_pb2 import Method

NAME = "longspan"
_KV_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# How `LongspanCache.update` tells the attention function where the rows belong: Transformers hands the
# cache's key tensor on, but not the cache.
_ROWS_OF = "_longspan_layer"


def register() -> None:
    """Makes attn_implementation="longspan" known to Transformers; harmless to repeat."""
    AttentionInterface.register(NAME, _attention)
    # Without a mask function of the same name Transformers would drop padding masks silently.
    AttentionMaskInterface.register(NAME, _mask)


class LongspanCache(Cache):
    """The KV cache of one sequence, held by a server. As a context manager it deletes its context at
    the end. Used by one thread at a time.

    methods: names that the server ships or Method messages; every method that calls will use, so that
    their summaries are kept. method: what calls use; None is the context's default, the first of
    `methods`, else dense. Change it between calls, or for a block with `using`. kv_dtype: "fp32",
    "fp16" or "bf16"; None is the model's own type. `spec` reaches Client.make_spec.

    A call that fails may leave layers of unequal length; truncate(cache.committed_length) evens them.
    """

    def __init__(
        self,
        client: Client,
        model,
        methods: typing.Sequence[str | Method] = (),
        method: str | Method | None = None,
        kv_dtype: str | None = None,
        **spec,
    ):
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = {
            "num_layers": config.num_hidden_layers,
            "num_query_heads": heads,
            "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": head_dim,
            "kv_dtype": kv_dtype or _KV_DTYPES[model.dtype],
            "scale": _scale_of(model) or head_dim**-0.5,
            "soft_cap": getattr(config, "attn_logit_softcapping", None),
        }
        context = client.create_context(methods=methods, **shape, **spec)
        self._adopt(context, shape["scale"], shape["soft_cap"], [0] * shape["num_layers"], method)

    def _adopt(self, context, scale, soft_cap, lengths, method) -> None:
        super().__init__(layers=[_RemoteLayer(self, i, n) for i, n in enumerate(lengths)])
        self.context: Context = context
        self.method = method
        self._scale = scale
        self._soft_cap = soft_cap

    def __enter__(self) -> LongspanCache:
        return self

    def __exit__(self, *_) -> None:
        self.delete()

    def __repr__(self) -> str:
        return f"LongspanCache({self.context.id!r}, {self.committed_length} tokens)"

    @property
    def committed_length(self) -> int:
        """Tokens that every layer holds."""
        return min(layer.length for layer in self.layers)

    @contextlib.contextmanager
    def using(self, method: str | Method | None):
        """Calls inside the block use `method`."""
        previous, self.method = self.method, method
        try:
            yield self
        finally:
            self.method = previous

    def fork(self, num_tokens: int | None = None) -> LongspanCache:
        """A new cache that shares the first `num_tokens` (all of them by default) copy-on-write."""
        num_tokens = self.committed_length if num_tokens is None else num_tokens
        child = LongspanCache.__new__(LongspanCache)
        lengths = [num_tokens] * len(self.layers)
        context = self.context.fork(num_tokens)
        child._adopt(context, self._scale, self._soft_cap, lengths, self.method)
        return child

    def truncate(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens`."""
        self.context.truncate(num_tokens)
        for layer in self.layers:
            layer.length = num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; what Transformers calls, with a negative number, after rejected
        speculation."""
        if tokens_to_remove:
            self.truncate(self.committed_length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.truncate(0)

    def delete(self) -> None:
        """Frees the context on the server."""
        self.context.delete(allow_missing=True)

    def attend(self, layer: _RemoteLayer, query, key, value, scale, soft_cap) -> torch.Tensor:
        """query [1, query_heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim]:
        stores the rows and returns their attention [1, tokens, query_heads, head_dim]."""
        if query.shape[0] != 1:
            raise ValueError(f"a batch of {query.shape[0]}; one LongspanCache is one sequence")
        if scale is not None and abs(scale - self._scale) > 1e-6 * self._scale:
            raise ValueError(f"layer {layer.index} scales by {scale}, the context by {self._scale}")
        if (soft_cap or None) != (self._soft_cap or None):
            raise ValueError(f"layer {layer.index} caps at {soft_cap}, not at {self._soft_cap}")
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        call = self.context.decode if len(rows[0]) == 1 else self.context.prefill
        result = call(layer.index, *rows, start_pos=layer.length, method=self.method)
        layer.length = result.length
        return result.output.unsqueeze(0)


class _RemoteLayer(CacheLayerMixin):
    """What Transformers sees of one layer: its length. The attention function sends the rows."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: LongspanCache, index: int, length: int):
        super().__init__()
        self.cache = cache
        self.index = index
        self.length = length

    def __repr__(self) -> str:
        return f"layer {self.index}: {self.length} tokens"

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing is allocated here."""

    def update(self, key_states, value_states, *_, **__):
        """Marks the new rows and returns them alone; the older ones are on the server."""
        setattr(key_states, _ROWS_OF, self)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """What Transformers calls in place of its own attention."""
    layer = getattr(key, _ROWS_OF, None)
    if layer is None:
        raise RuntimeError("attn_implementation='longspan' needs past_key_values=LongspanCache(...)")
    unserved = {
        "an attention mask": attention_mask is not None,
        "dropout": bool(dropout),
        "a sliding window": options.get("sliding_window") is not None,
        "attention sinks": options.get("s_aux") is not None,
    }
    if any(unserved.values()):
        names = ", ".join(name for name, present in unserved.items() if present)
        raise NotImplementedError(f"the Longspan adapter does not serve {names}")
    soft_cap = options.get("softcap")
    return layer.cache.attend(layer, query, key, value, scaling, soft_cap), None


def _mask(*, batch_size, mask_function, attention_mask=None, **_) -> None:
    """No mask is made, the server masks causally; refuses what that does not express."""
    if batch_size != 1:
        raise ValueError(f"a batch of {batch_size}; one LongspanCache is one sequence")
    if attention_mask is not None and not attention_mask.all():
        raise ValueError("attention_mask hides tokens; pass the sequence without padding")
    if mask_function is not causal_mask_function:
        raise NotImplementedError("the Longspan adapter serves plain causal attention only")


def _scale_of(model) -> float | None:
    """The factor of the attention logits, where the model's attention modules tell it."""
    scales = (getattr(module, "scaling", None) for module in model.modules())
    return next((scale for scale in scales if isinstance(scale, float)), None)
