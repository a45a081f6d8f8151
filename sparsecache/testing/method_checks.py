"""The checks that a cache method keeps the contract of the engine, on tiny models with random weights.

They need only the method. `contract.py` is the command that runs them, and the project's tests run them for every
built-in method. `cache_checks.py` has those of a method's caches alone.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsecache.cache.base import CacheMethod
from sparsecache.cache.budget import Budget
from sparsecache.cache.sparse import SparseMethod
from sparsecache.cache.stats import SequenceStats
from sparsecache.engine.base import Request
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.families import load_family
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import Checkpoint
from sparsecache.engine.prefill_cache import PrefillCache, PrefillCachingDecoder
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights
from sparsecache.methods import load_method, method_options, parse_options
from sparsecache.testing.cache_checks import (
    CPU,
    check_counts,
    check_free_empty_slot,
    check_scores,
    check_shapes,
    require,
)
from sparsecache.testing.method_under_test import MethodUnderTest, Options

PROMPT_LENGTHS = (90, 5, 33, 14)
NEW_TOKENS = (20, 9, 15, 5)  # different ones, so that batches lose rows
Check = tuple[str, Callable[[], None]]


class DecodingError(AssertionError):
    """A prompt could not be decoded. Arguments: the error, and what the engine printed, with the traceback."""

    def __str__(self) -> str:
        return str(self.args[0])


def make_decoder(checkpoint: Path, method: CacheMethod, prompts: PrefillCache | None = None) -> Decoder:
    """Return a decoder of a checkpoint over a method, calibrated if it needs to be.

    prompts: a prefill cache that the decoder takes prompts from.
    """
    found, architecture, weights = _read(checkpoint)
    model = architecture, weights, Rope(found.config, CPU), method
    decoder = Decoder(*model) if prompts is None else PrefillCachingDecoder(*model, prompts)
    method.check(decoder.shape)
    text = method.calibration_text()
    if text is not None:
        with torch.inference_mode():
            token_ids = found.tokenizer(text)["input_ids"][:300]
            decoder.calibrate(torch.tensor(token_ids), lambda layers: None)
    return decoder


@cache
def _read(checkpoint: Path) -> tuple[Checkpoint, Architecture, Weights]:
    """Read what all decoders of a checkpoint share. None of them changes it."""
    found = Checkpoint(checkpoint)
    architecture = load_family(found.model_type).architecture(found.config)
    return found, architecture, found.load(architecture, CPU, torch.float32)


def prompts() -> list[list[int]]:
    """Return prompts of random tokens, longer and shorter than a budget, a window and a page."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def texts(engine: Generator, order: list[int]) -> dict[int, list[int]]:
    """Return the new tokens of prompts by number, decoded in an order; fail on an error or an odd report."""
    tokens, found = prompts(), {}
    with redirect_stderr(io.StringIO()) as printed:
        for each in engine.generate(Request(at, tokens[at], NEW_TOKENS[at], ()) for at in order):
            if each.error:
                raise DecodingError(each.error, printed.getvalue())
            json.dumps(each.report, allow_nan=False)
            found[each.key] = each.token_ids
    return found


def check_options(subject: MethodUnderTest) -> None:
    """Options can be recorded and compared, and there are options that show something."""
    for name, value in parse_options(subject.method, {}).items():
        plain = value is None or isinstance(value, bool | int | str | float)
        require(plain and value == value, f"the default {name}={value!r} cannot be recorded")  # nan equals nothing
    require(
        subject.lossless is not None or bool(subject.tight),
        "the checks need options that drop nothing (--lossless) or options that drop tokens of a short prompt "
        "(--tight); without both they show nothing",
    )
    known = method_options(load_method(subject.method))
    for options in (subject.lossless or {}, subject.tight):
        unknown = ", ".join(options.keys() - known.keys())
        require(not unknown, f"the method has no option {unknown}")


def check_lossless(subject: MethodUnderTest, checkpoint: Path) -> None:
    """With options that drop nothing, the text is that of transformers."""
    if subject.lossless is None:
        return
    method = subject.make(subject.lossless)
    found = texts(Generator(make_decoder(checkpoint, method), 2), [0, 1, 2, 3])
    for at, expected in enumerate(_reference_texts(checkpoint)):
        require(found[at] == expected, f"with {subject.lossless} the text differs from transformers'")
        require(len(set(expected)) > NEW_TOKENS[at] // 3, "the checkpoint repeats itself, so the check shows nothing")


@cache
def _reference_texts(checkpoint: Path) -> list[list[int]]:
    """Return the new tokens of all prompts by transformers' generate."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    expected = []
    for prompt, new_tokens in zip(prompts(), NEW_TOKENS, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    return expected


def check_independence(new_engine: Callable[[int], Generator]) -> None:
    """A text depends only on its prompt: not on the slot, earlier sequences, or others in the batch.

    new_engine: makes an engine of so many slots.
    """
    alone = {at: texts(new_engine(1), [at])[at] for at in range(len(PROMPT_LENGTHS))}
    for slots, orders in ((1, ([3, 0, 1],)), (3, ([0, 1, 2, 3], [3, 1, 1, 0, 2]))):
        engine = new_engine(slots)
        for order in orders:
            same = texts(engine, order) == {at: alone[at] for at in order}
            require(same, f"with {slots} slots and the prompts in the order {order}, a text differs from its own")


@torch.inference_mode()
def check_free_slots(decoder: Decoder) -> None:
    """Steps that name a free slot, until it has run full, change nothing for the slots in flight."""
    prompt = torch.tensor(prompts()[2])
    tokens = torch.arange(5, 5 + 60)

    def logits(rows: list[int]) -> list[Tensor]:
        decoder.allocate(3, 40, 40)
        cache = decoder.cache
        assert cache is not None
        slots = torch.tensor(rows)
        for slot in (1, 2):  # the free slot held something once
            decoder.prefill(prompt[:9], slot)
            cache.free_slot(slot)
        found = []
        for start in (0, 3, 6):  # several sequences, while the free slot goes on
            found.append(decoder.prefill(prompt, 1))
            for at in range(start, start + 6):
                positions = torch.full((len(rows),), len(prompt) + at - start)
                step = decoder.step(tokens[at].expand(len(rows)), positions, slots)
                found.append(step[rows.index(1)])
            cache.free_slot(1)
        for _ in range(24 if len(rows) > 1 else 0):
            decoder.step(tokens[:2], torch.tensor([39, 39]), torch.tensor([2, 0]))
        found.append(decoder.prefill(prompt, 2))
        found.append(decoder.step(tokens[:1], torch.tensor([len(prompt)]), torch.tensor([2]))[0])
        return found

    for with_free, without in zip(logits([2, 1]), logits([1]), strict=True):
        close = torch.allclose(with_free, without, rtol=1e-4, atol=1e-4)
        require(close, "a step that names a free slot changes the logits of another one")


def check_prompt_queries(checkpoint: Path, new: Callable[[], CacheMethod]) -> None:
    """Texts do not depend on the queries of a prompt that a method states not to read."""
    count = new().prompt_queries
    if count is None:
        return
    expected = texts(Generator(make_decoder(checkpoint, new(), PrefillCache()), 2), [0, 2])
    try:
        found = texts(Generator(make_decoder(checkpoint, new(), PrefillCache(queries=count)), 2), [0, 2])
    except AssertionError:  # a score is NaN
        found = {}
    require(found == expected, f"prompt_queries={count}, but a text changes if a prompt's earlier queries are NaN")


def check_tight_changes(subject: MethodUnderTest, checkpoint: Path) -> None:
    """Options that drop tokens change the text; without that the other checks show little."""
    if subject.tight:
        found = texts(Generator(make_decoder(checkpoint, subject.make(subject.tight)), 2), [0, 2])
        full = _reference_texts(checkpoint)
        changed = any(text != full[at] for at, text in found.items())
        require(changed, f"with {subject.tight} the text is that of the full cache")


def check_budget(subject: MethodUnderTest, checkpoint: Path) -> None:
    """No sequence attends to more past tokens than the budget of its layers."""
    for options in subject.tested:
        method = subject.make(options)
        if not isinstance(method, SparseMethod):
            continue
        decoder = make_decoder(checkpoint, method)
        finished = _finished(Generator(decoder, 2), method)
        layers = range(method.dense_layers, decoder.shape.layers)
        budgets = [method.layer_budget(layer, decoder.shape) for layer in layers]
        for stats in finished:
            steps = range(stats.prompt_tokens, stats.prompt_tokens + stats.steps)
            most = sum(_most_share(method, budget, stats.prompt_tokens, past) for budget in budgets for past in steps)
            most /= max(1, len(budgets) * stats.steps)
            fits = stats.kept is not None and 0 < stats.kept <= most + 1e-9
            require(
                fits or not stats.sparse_layers,
                f"with budget={method.budget} and a prompt of {stats.prompt_tokens} tokens, {stats.kept} of the past "
                f"tokens are attended to; the budget allows above 0 up to {most}",
            )


def _finished(engine: Generator, method: CacheMethod) -> list[SequenceStats]:
    """Decode all prompts and return the statistics that the method's reports are made of."""
    finished: list[SequenceStats] = []
    report = method.report

    def record(stats: SequenceStats) -> dict[str, Any]:
        finished.append(stats)
        return report(stats)

    method.report = record  # type: ignore[method-assign]
    texts(engine, list(range(len(PROMPT_LENGTHS))))
    return finished


def _most_share(method: SparseMethod, budget: Budget, prompt_tokens: int, past: int) -> float:
    """Return the highest share of `past` tokens that a budget allows."""
    if method.budget_excludes_generated:
        return min(1.0, (budget.tokens(prompt_tokens) + past - prompt_tokens) / past)
    return min(1.0, budget.tokens(past) / past)


def checks(subject: MethodUnderTest, checkpoint: Path) -> Iterator[Check]:
    """Yield every check of a method on a checkpoint: what it checks, and the check, which raises AssertionError."""
    yield "options can be recorded", lambda: check_options(subject)
    yield "lossless options give the text of transformers", lambda: check_lossless(subject, checkpoint)
    yield "tight options change the text", lambda: check_tight_changes(subject, checkpoint)
    yield "no step exceeds the budget", lambda: check_budget(subject, checkpoint)
    for options in subject.tested:
        yield from _checks_with(subject, checkpoint, options)


def _checks_with(subject: MethodUnderTest, checkpoint: Path, options: Options) -> Iterator[Check]:
    """Yield the checks of a method with these options, as `checks`."""

    def new() -> CacheMethod:
        return subject.make(options)

    def new_engine(slots: int) -> Generator:
        return Generator(make_decoder(checkpoint, new()), slots)

    named = f"with {options}" if options else "with the defaults"
    yield f"inputs are unchanged, outputs fit, {named}", lambda: check_shapes(new())
    yield f"scores are never NaN, {named}", lambda: check_scores(new())
    yield f"counts are those of the tokens attended to, {named}", lambda: check_counts(new())
    yield f"freeing a free slot does nothing, {named}", lambda: check_free_empty_slot(new())
    yield f"a text depends on its prompt alone, {named}", lambda: check_independence(new_engine)
    yield f"no more than prompt_queries are read, {named}", lambda: check_prompt_queries(checkpoint, new)
    yield f"free slots change nothing, {named}", lambda: check_free_slots(make_decoder(checkpoint, new()))
