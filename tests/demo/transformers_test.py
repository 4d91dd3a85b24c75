"""The Transformers adapter through a real server: dense equals PyTorch's attention, sparse methods are really
used, and what the adapter does not serve is refused.

The models are small random ones; deploy/demo runs a real one (main_job_test.py).
"""

import os
import pathlib
import random
import sys

import pytest
import torch
import transformers

import longspan
from longspan.transformers import NAME, LongspanCache, register

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))

from server import Server

VOCABULARY = 512
# (query heads, KV heads, head size)
SHAPES = [(4, 4, 64), (9, 3, 64), (8, 2, 128)]


@pytest.fixture(scope="module")
def client():
    with Server("--ranks", 2) as server, longspan.Client(server.address) as connection:
        yield connection


@pytest.fixture(autouse=True)
def seed():
    value = int(os.environ.get("LONGSPAN_TEST_SEED", random.randrange(1 << 31)))
    print(f"LONGSPAN_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    register()
    return value


def make_model(shape=SHAPES[1], dtype=torch.float32, **options):
    heads, kv_heads, head_dim = shape
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12 * heads,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        # Larger than usual, so that attention is far from uniform and a wrong key shows.
        initializer_range=0.2,
        **options,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def make_ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, num_tokens))


def window_method(window: int, sinks: int = 0) -> longspan.Method:
    return longspan.parse_method(
        f'name: "w{window}" branches {{ mask {{ window_tokens: {window} sink_tokens: {sinks} }} }}'
    )


def top_k_method(blocks: int) -> longspan.Method:
    return longspan.parse_method(
        f"""name: "top{blocks}" branches {{
          summary {{ kind: KIND_MIN_MAX block_tokens: 16 }}
          search {{ score: SCORE_BOUND }}
          selection {{ kind: KIND_TOP_K block_tokens: 16 forced_last_blocks: 1 }}
          budget {{ both {{ blocks: {blocks} }} }} }}"""
    )


def chunks(ids: torch.Tensor, *lengths: int):
    return ids.split([*lengths, ids.shape[1] - sum(lengths)], dim=1)


def logits_of(model, parts, **options) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(part, **options).logits for part in parts], dim=1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_logits_equal_sdpa_over_chunks_and_single_tokens(client, shape):
    model, ids = make_model(shape), make_ids(300)
    expected = logits_of(model, [ids])
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache:
        found = logits_of(model, chunks(ids, 1, 170, 1, 1), past_key_values=cache)
        assert cache.committed_length == 300
        assert cache.context.info().committed_length == 300
    assert relative(found, expected) < 1e-4


def test_bf16_model_keeps_bf16_keys(client):
    model, ids = make_model(), make_ids(200)
    expected = logits_of(model, [ids])
    model.to(torch.bfloat16).set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache:
        found = logits_of(model, [ids], past_key_values=cache)
        assert found.dtype == torch.bfloat16
    # bf16 throughout three random layers; a wrong key or position gives an error near 1.
    assert relative(found, expected) < 0.1


def test_generation_is_that_of_sdpa(client):
    model, ids = make_model(), make_ids(90)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, **options)
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache:
        found = model.generate(ids, past_key_values=cache, **options)
        # The last token is generated, never attended from.
        assert cache.committed_length == 101
    assert torch.equal(found, expected)


def test_generation_with_a_sparse_method_runs(client):
    model, ids = make_model(), make_ids(200)
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model, methods=[top_k_method(2)]) as cache:
        found = model.generate(
            ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert found.shape == (1, 208)


def test_window_equals_masked_sdpa(client):
    """The method decides which keys a row sees: held against PyTorch with the same mask."""
    model, ids = make_model(), make_ids(160)
    rows, columns = torch.arange(160).unsqueeze(1), torch.arange(160).unsqueeze(0)
    seen = (columns <= rows) & ((columns > rows - 40) | (columns < 3))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    expected = logits_of(model, [ids], attention_mask=mask)
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model, methods=[window_method(40, 3)]) as cache:
        found = logits_of(model, chunks(ids, 100, 1), past_key_values=cache)
    assert relative(found, expected) < 1e-4


def test_methods_change_from_call_to_call(client):
    model, ids = make_model(), make_ids(257)
    expected = logits_of(model, [ids])[:, -1]
    model.set_attn_implementation(NAME)
    everything, little = top_k_method(64), top_k_method(1)
    with LongspanCache(client, model, methods=["dense", everything]) as cache:
        logits_of(model, [ids[:, :-1]], past_key_values=cache)
        found = {}
        for method in ("dense", everything, little):
            with cache.fork() as fork, fork.using(method):
                found[str(method)] = logits_of(model, [ids[:, -1:]], past_key_values=fork)[:, -1]
        assert cache.method is None
    assert relative(found["dense"], expected) < 1e-4
    assert relative(found[str(everything)], expected) < 1e-4
    assert relative(found[str(little)], expected) > 1e-3


def test_fork_truncate_and_crop(client):
    model, ids = make_model(), make_ids(120)
    expected = logits_of(model, [ids])
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache:
        logits_of(model, [ids[:, :80], make_ids(30)], past_key_values=cache)
        with cache.fork(80) as fork:
            found = logits_of(model, [ids[:, 80:]], past_key_values=fork)
            assert relative(found, expected[:, 80:]) < 1e-4
        assert cache.committed_length == 110
        cache.crop(-20)
        cache.truncate(80)
        found = logits_of(model, [ids[:, 80:]], past_key_values=cache)
        assert relative(found, expected[:, 80:]) < 1e-4
        cache.reset()
        assert cache.get_seq_length() == 0
        assert relative(logits_of(model, [ids], past_key_values=cache), expected) < 1e-4


def test_a_failed_call_leaves_a_cache_that_can_go_on(client):
    model, ids = make_model(), make_ids(100)
    expected = logits_of(model, [ids])
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache:
        logits_of(model, [ids[:, :60]], past_key_values=cache)
        with cache.using("no_such_method"), pytest.raises(longspan.Error):
            logits_of(model, [ids[:, 60:]], past_key_values=cache)
        cache.truncate(cache.committed_length)
        found = logits_of(model, [ids[:, 60:]], past_key_values=cache)
    assert relative(found, expected[:, 60:]) < 1e-4


def test_what_is_not_served_is_refused(client):
    model, ids = make_model(), make_ids(20)
    model.set_attn_implementation(NAME)
    with pytest.raises(RuntimeError, match="LongspanCache"):
        logits_of(model, [ids])
    with LongspanCache(client, model) as cache:
        with pytest.raises(ValueError, match="batch of 2"):
            logits_of(model, [ids.repeat(2, 1)], past_key_values=cache)
        padded = torch.ones_like(ids)
        padded[0, :4] = 0
        with pytest.raises(ValueError, match="padding"):
            logits_of(model, [ids], past_key_values=cache, attention_mask=padded)
        model.model.layers[1].self_attn.scaling *= 2
        with pytest.raises(ValueError, match="layer 1 scales"):
            logits_of(model, [ids], past_key_values=cache)


def test_sliding_window_models_are_refused(client):
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=8,
    )
    model = transformers.MistralForCausalLM(config).eval()
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache, pytest.raises(NotImplementedError):
        logits_of(model, [make_ids(20)], past_key_values=cache)


def test_soft_cap_reaches_the_context(client):
    """Of the wrapper's models only the configuration's field is read; Gemma 2 has one, but windows too."""
    model = make_model()
    model.config.attn_logit_softcapping = 3.0
    model.set_attn_implementation(NAME)
    with LongspanCache(client, model) as cache:
        assert cache.context.info().spec.logit_soft_cap == pytest.approx(3.0)
        # The layers say nothing of a cap: refused rather than answered with another softmax.
        with pytest.raises(ValueError, match="caps at None"):
            logits_of(model, [make_ids(8)], past_key_values=cache)
