"""The first job: the model reads several thousand tokens with a fact hidden in them and answers a
question about it, dense and with each sparse method that suits an ordinary model.

The prompt is prefilled but for its last token, then the answer decoded. Methods that are made for decoding
prefill densely: they fork one shared dense context. Beside its answer, every method is compared with the
model's own attention (PyTorch SDPA) on the next-token distributions of the same positions: the prompt's last
tokens and the reference's answer, all fed one by one.
"""

import dataclasses
import time

import progress
import torch
import variants
from engine import Engine
from longspan.transformers import NAME, LongspanCache, register
from service import Service
from transformers import DynamicCache

_FACT = "The name of the red ship in the harbour is Marigold."
_QUESTION = "What is the name of the red ship in the harbour? Answer with the name only."
_ANSWER = "Marigold"
_FACT_DEPTH = 0.35
_PREFILL_CHUNK = 2048


@dataclasses.dataclass
class Reading:
    """What one method did. logits [positions, vocabulary] stay out of the report."""

    label: str
    family: str
    answer: str
    right: bool
    prefill_seconds: float | None  # None: shares the dense prefill
    decode_tokens_per_second: float
    fraction_read: float | None  # of the keys that its decode steps could see
    top1_agreement: float | None = None
    kl_nats: float | None = None
    logits: torch.Tensor | None = None
    answer_ids: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Prompt:
    """ids [1, tokens]; on the last `num_compared` of them distributions are compared."""

    ids: torch.Tensor
    num_compared: int
    answer_tokens: int

    @property
    def prefilled(self) -> torch.Tensor:
        return self.ids[:, :-1]

    @property
    def last(self) -> int:
        return int(self.ids[0, -1])

    @property
    def compared(self) -> list[int]:
        return self.ids[0, -self.num_compared :].tolist()


def make_prompt(engine: Engine, verses: list[str], num_tokens: int, quick: bool) -> Prompt:
    """About num_tokens of text with the fact at a third of it, and the question behind."""
    body, total = [], 0
    for verse in verses:
        total += len(engine.encode(verse)) + 1
        if total > num_tokens:
            break
        body.append(verse)
    body.insert(int(len(body) * _FACT_DEPTH), _FACT)
    ids = engine.chat("\n".join(body) + "\n\n" + _QUESTION)
    return Prompt(ids, num_compared=24 if quick else 64, answer_tokens=16)


def _prefill(engine: Engine, cache, ids: torch.Tensor, bar: progress.Progress) -> None:
    for chunk in ids.split(_PREFILL_CHUNK, dim=1):
        engine.model.model(chunk, past_key_values=cache)
        bar.advance(chunk.shape[1])


def _decode(engine: Engine, cache, token: int) -> torch.Tensor:
    """Logits [vocabulary] after one more token."""
    return engine.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].float()


def _forced(engine: Engine, cache, tokens: list[int]) -> list[torch.Tensor]:
    return [_decode(engine, cache, token) for token in tokens]


def _answer(engine: Engine, cache, logits: torch.Tensor, limit: int) -> tuple[list[int], float]:
    """Greedy decoding from the logits of the prompt's last token; tokens and tokens a second."""
    answer: list[int] = []
    start = time.monotonic()
    while len(answer) < limit:
        token = int(logits.argmax())
        if token == engine.tokenizer.eos_token_id:
            break
        answer.append(token)
        logits = _decode(engine, cache, token)
    return answer, len(answer) / (time.monotonic() - start)


def _answer_and_compare(
    engine: Engine, cache, prompt: Prompt, reference: list[int] | None
) -> tuple[list[torch.Tensor], list[int], float]:
    """From a cache of the prefilled prompt: logits of the compared positions, the method's own answer, and
    its tokens a second. `reference`: the answer to compare on; None: the method's own."""
    answer, speed = _answer(engine, cache, _decode(engine, cache, prompt.last), prompt.answer_tokens)
    cache.crop(prompt.ids.shape[1] - prompt.num_compared - cache.get_seq_length())
    logits = _forced(engine, cache, prompt.compared)
    logits += _forced(engine, cache, answer if reference is None else reference)
    return logits, answer, speed


def read_with_own_attention(engine: Engine, prompt: Prompt) -> Reading:
    """The reference: PyTorch's attention, keys and values in the engine."""
    engine.model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=engine.model.config)
    with progress.Progress("Prefill, PyTorch SDPA", prompt.prefilled.shape[1], "tokens") as bar:
        _prefill(engine, cache, prompt.prefilled, bar)
        seconds = bar.seconds
    logits, answer, speed = _answer_and_compare(engine, cache, prompt, None)
    return _reading(engine, "PyTorch SDPA", "sdpa", seconds, logits, answer, speed, 1.0)


def _reading(engine, label, family, seconds, logits, answer, speed, fraction) -> Reading:
    text = engine.decode(answer)
    return Reading(
        label=label,
        family=family,
        answer=text,
        right=_ANSWER in text,
        prefill_seconds=seconds,
        decode_tokens_per_second=speed,
        fraction_read=fraction,
        logits=torch.stack(logits),
        answer_ids=answer,
    )


class _Reader:
    """Reads one prompt through the service with one method after the other. Methods that prefill densely
    fork one shared dense context; the others fill their own."""

    def __init__(self, engine: Engine, service: Service, prompt: Prompt, all_variants):
        self._engine = engine
        self._service = service
        self._prompt = prompt
        self._methods = [variant.method for variant in all_variants]
        self._dense: LongspanCache | None = None
        self._dense_seconds = 0.0

    def _filled(self, variant: variants.Variant) -> tuple[LongspanCache, float]:
        cache = LongspanCache(
            self._service.client, self._engine.model, methods=self._methods, method=variant.method
        )
        title = f"Prefill, {variant.label}"
        with progress.Progress(title, self._prompt.prefilled.shape[1], "tokens") as bar:
            _prefill(self._engine, cache, self._prompt.prefilled, bar)
            return cache, bar.seconds

    def read(self, variant: variants.Variant, reference: Reading) -> Reading:
        shares_dense = variants.keeps_dense_prefill(variant.method)
        if shares_dense and self._dense is None:
            self._dense, self._dense_seconds = self._filled(variant)
        if shares_dense:
            cache = self._dense.fork()
            cache.method = variant.method
            seconds = self._dense_seconds if variant.family == "dense" else None
        else:
            cache, seconds = self._filled(variant)
        with cache:
            before = self._service.tokens_read()
            logits, answer, speed = _answer_and_compare(
                self._engine, cache, self._prompt, reference.answer_ids
            )
            fraction = self._service.tokens_read().fraction_since(before)
        return _compared(
            _reading(
                self._engine,
                variant.label,
                variant.family,
                seconds,
                logits,
                answer,
                speed,
                fraction,
            ),
            reference,
        )

    def close(self) -> None:
        if self._dense is not None:
            self._dense.delete()


def _compared(reading: Reading, reference: Reading) -> Reading:
    """Fills the agreement of the next-token distributions with the reference's."""
    expected = reference.logits.double().log_softmax(-1)
    found = reading.logits.double().log_softmax(-1)
    reading.top1_agreement = float((expected.argmax(-1) == found.argmax(-1)).double().mean())
    reading.kl_nats = float((expected.exp() * (expected - found)).sum(-1).mean())
    return reading


def _print(prompt: Prompt, readings: list[Reading]) -> None:
    def optional(value, form) -> str:
        return "-" if value is None else form.format(value)

    num_positions = len(readings[0].logits)
    progress.say(f"  Question: {_QUESTION}")
    for reading in readings:
        mark = "right" if reading.right else "WRONG"
        progress.say(f"    {reading.label:28} {mark}  {reading.answer!r}")
    progress.say(
        f"  Agreement with PyTorch SDPA on {num_positions} next-token distributions; "
        f"{prompt.ids.shape[1]:,} tokens of prompt:"
    )
    progress.table(
        ["method", "prefill s", "decode tok/s", "keys read", "top-1", "KL (nats)"],
        [
            [
                reading.label,
                optional(reading.prefill_seconds, "{:.1f}"),
                f"{reading.decode_tokens_per_second:.1f}",
                optional(reading.fraction_read, "{:.1%}"),
                optional(reading.top1_agreement, "{:.1%}"),
                optional(reading.kl_nats, "{:.2g}"),
            ]
            for reading in readings
        ],
    )


def run(engine: Engine, service: Service, verses: list[str], quick: bool) -> dict:
    """The job's figures."""
    progress.headline("Reading a text and answering a question about it")
    prompt = make_prompt(engine, verses, 1200 if quick else 6000, quick)
    all_variants = variants.reading_variants(quick)
    with torch.inference_mode():
        reference = read_with_own_attention(engine, prompt)
        readings = [reference]
        register()
        engine.model.set_attn_implementation(NAME)
        reader = _Reader(engine, service, prompt, all_variants)
        for variant in all_variants:
            readings.append(reader.read(variant, reference))
        reader.close()
        engine.model.set_attn_implementation("sdpa")
    _print(prompt, readings)
    hidden = {"logits", "answer_ids"}
    return {
        "prompt_tokens": prompt.ids.shape[1],
        "prefill_tokens": prompt.prefilled.shape[1],
        "compared_positions": len(reference.logits),
        "fact": _FACT,
        "fact_depth": _FACT_DEPTH,
        "question": _QUESTION,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "methods": [
            {
                field.name: getattr(reading, field.name)
                for field in dataclasses.fields(reading)
                if field.name not in hidden
            }
            for reading in readings
        ],
    }
