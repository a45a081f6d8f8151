"""The checks of the contract find methods that break it, each by the check that names its fault.

In one file because every broken method is a case of one test.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sparsecache.cache import (
    DecodingEvictionCache,
    EvictionMethod,
    FullCache,
    SelectionCache,
    SelectionMethod,
    SparseMethod,
)
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.contract import main
from sparsecache.testing.method_checks import check_options, checks
from sparsecache.testing.method_under_test import MethodUnderTest
from sparsecache.testing.random_checkpoint import make_random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that the command makes."""
    folder = tmp_path_factory.mktemp("contract") / "llama"
    return make_random_checkpoint(folder, initializer_range=0.25, num_hidden_layers=3)


@dataclass(frozen=True)
class _OfClass(MethodUnderTest):
    """The subject of a class of this file."""

    kind: type[Any]

    def make(self, options: dict[str, Any]) -> Any:
        return self.kind(**options)


def _subject(kind: type[Any]) -> MethodUnderTest:
    if issubclass(kind, Vanilla):
        return _OfClass("vanilla", {}, {}, kind)
    return _OfClass("streaming", {"budget": 1.0, "dense_layers": 0}, {"budget": 4.0, "dense_layers": 0}, kind)


def _full(cache: type[FullCache]) -> type[Vanilla]:
    """Return a method whose layers have caches of this class."""

    class Method(Vanilla):
        def make_cache(self, layer, config):
            return cache(config)

    return Method


class _ChangesItsInput(FullCache):
    def attend(self, q, k, v, slots):
        out = super().attend(q, k, v, slots)
        k.zero_()
        return out


class _WrongShape(FullCache):
    def attend(self, q, k, v, slots):
        return super().attend(q, k, v, slots)[:, :, 0]


class _NotFinite(FullCache):
    def attend(self, q, k, v, slots):
        return super().attend(q, k, v, slots) * torch.nan


class _SkipsAToken(FullCache):
    """Is not sparse, and yet attends to no first token."""

    def attend(self, q, k, v, slots):
        self.kv.keys[:, :, 0] = -1e4 * q.mean(1)
        self.kv.values[:, :, 0] = 0
        return super().attend(q, k, v, slots)


class _FreesOnce(FullCache):
    def __init__(self, config):
        super().__init__(config)
        self.used = {0, 1, 2}

    def free_slot(self, slot):
        self.used.remove(slot)


class _KeepsAnEarlierSequence(FullCache):
    """Leaves the first keys of a slot as they are once it was used."""

    def __init__(self, config):
        super().__init__(config)
        self.used = set()

    def prefill(self, slot, q, k, v):
        before = self.kv.keys[slot, :, :2].clone()
        super().prefill(slot, q, k, v)
        if slot in self.used:
            self.kv.keys[slot, :, :2] = before
        self.used.add(slot)


class _ChangesAfterTheFirstSequence(FullCache):
    num_freed = 0

    def free_slot(self, slot):
        self.num_freed += 1

    def attend(self, q, k, v, slots):
        return super().attend(q, k, v, slots) * (1.0 if self.num_freed else 0.5)


class _ReadsEverySlot(FullCache):
    def attend(self, q, k, v, slots):
        return super().attend(q, k, v, slots) + 0.1 * self.kv.values.sum()


class _TakesRowsForSlots(FullCache):
    def attend(self, q, k, v, slots):
        return super().attend(q, k, v, torch.arange(len(slots)))


class _FailsWhenFull(FullCache):
    def attend(self, q, k, v, slots):
        if int(self.seq_lens[slots].max()) >= self.kv.keys.shape[2]:
            raise IndexError("a slot is full")
        return super().attend(q, k, v, slots)


class _ReportsASet(Vanilla):
    def report(self, stats):
        return {"seen": {1, 2}}


class _ReportsNan(Vanilla):
    def report(self, stats):
        return {"share": torch.nan}


@dataclass
class _DropsOneToken(EvictionMethod):
    """Drops a token even with a budget of everything."""

    def score(self, q, k, v):
        return k.norm(dim=2)

    def keep(self, scores, count, width):
        return super().keep(scores, max(1, count - 1), width)


@dataclass
class _IgnoresTheBudget(SelectionMethod):
    def select(self, q, cache, slots):
        width = cache.width(slots)
        past = cache.seq_lens[slots][:, None].expand(-1, cache.config.shape.kv_heads)
        return torch.arange(width).expand(*past.shape, -1), past


class _TwiceTheBudget(_IgnoresTheBudget):
    def select(self, q, cache, slots):
        positions, past = super().select(q, cache, slots)
        most = 2 * cache.budgets[cache.seq_lens[slots]]
        return positions, past.minimum(most[:, None])


class _HalvesItsCounts(SelectionCache):
    def attend(self, q, k, v, slots):
        out = super().attend(q, k, v, slots)
        self.stats.record(self.config.stats.counts[slots] // 2, slots)
        return out


class _ForgetsTheNewToken(SelectionCache):
    def attend(self, q, k, v, slots):
        return super().attend(q, k, torch.zeros_like(v), slots)


def _selecting(cache: type[SelectionCache]) -> type[SelectionMethod]:
    """Return a method that selects by the first channel of the keys, with caches of this class."""

    @dataclass
    class Method(SelectionMethod):
        def make_sparse_cache(self, layer, config):
            return cache(self, layer, config)

        def select(self, q, cache, slots):
            return cache.select_topk(cache.keys_of(slots)[..., 0].float(), slots)

    return Method


@dataclass
class _VotesOfAWindow(EvictionMethod):
    """States to read fewer queries than it reads."""

    prompt_queries = 2

    def score(self, q, k, v):
        return (q[:, -3:].mean((0, 1)) * k).sum(2)


@dataclass
class _DividesByZero(EvictionMethod):
    """Normalises its scores, which is 0 / 0 if all tokens are equal."""

    def score(self, q, k, v):
        k = k[..., 0]
        lowest, highest = k.amin(1, keepdim=True), k.amax(1, keepdim=True)
        return (k - lowest) / (highest - lowest)


@dataclass
class _SelectsByNan(SelectionMethod):
    def select(self, q, cache, slots):
        scores = cache.keys_of(slots)[..., 0] * torch.tensor([1.0, torch.nan])[:, None]
        return cache.select_topk(scores, slots)


class _StepsOfNan(DecodingEvictionCache):
    def prompt_scores(self, q, k, count):
        return torch.arange(count).expand(len(k), -1), torch.ones(len(k), count)

    def step_scores(self, q, slots, new_seq_lens):
        return (self.scores[slots] * torch.nan,) * 2


@dataclass
class _EvictsByNan(SparseMethod):
    def make_sparse_cache(self, layer, config):
        return _StepsOfNan(self, layer, config)


@dataclass
class _DropsByInfinity(EvictionMethod):
    """Infinite scores are allowed."""

    def score(self, q, k, v):
        return torch.where(k[..., 0] > 0, torch.inf, -torch.inf)


INPUTS = "inputs are unchanged, outputs fit, with the defaults"
COUNTS = "counts are those of the tokens attended to, with the defaults"
ALONE = "a text depends on its prompt alone, with the defaults"
FREE = "free slots change nothing, with the defaults"
SCORES = "scores are never NaN, with the defaults"
QUERIES = "no more than prompt_queries are read, with the defaults"


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (_full(_ChangesItsInput), INPUTS, "q, k or v was changed"),
        (_full(_WrongShape), INPUTS, r"attend returned \(1, 4, 8\)"),
        (_full(_NotFinite), INPUTS, "not finite"),
        (_ReportsASet, INPUTS, "set is not JSON serializable"),
        (_ReportsNan, INPUTS, "not JSON compliant"),
        (_full(_SkipsAToken), COUNTS, r"not sparse and so must attend to \[40, 40\].*attends to \[39, 39\] of 40"),
        (_selecting(_HalvesItsCounts), COUNTS, r"records \[4, 4\] past tokens per KV head, but attends to \[8, 8\]"),
        (_selecting(_ForgetsTheNewToken), COUNTS, "does not attend to the new token"),
        (_DividesByZero, SCORES, r"NaN for 40 of 40 tokens of KV head 0\. Scores must[^$]*equal tokens"),
        (_SelectsByNan, SCORES, r"layer 2 after .*random tokens attends to \[8, 0\] past tokens per KV head"),
        (_EvictsByNan, SCORES, "layer 2 after a prompt of random tokens leaves scores that are NaN"),
        (_DropsByInfinity, SCORES, None),
        (_full(_FreesOnce), "freeing a free slot does nothing, with the defaults", "0"),
        (_full(_KeepsAnEarlierSequence), ALONE, "a text differs from its own"),
        (_full(_ChangesAfterTheFirstSequence), ALONE, "a text differs from its own"),
        (_full(_ReadsEverySlot), ALONE, "a text differs from its own"),
        (_full(_TakesRowsForSlots), ALONE, "a text differs from its own"),
        (_full(_ReadsEverySlot), FREE, "changes the logits of another one"),
        (_full(_FailsWhenFull), FREE, "a slot is full"),
        (_VotesOfAWindow, QUERIES, "prompt_queries=2, but a text changes"),
        (_DropsOneToken, "lossless options give the text of transformers", "the text differs from transformers'"),
        (_IgnoresTheBudget, "tight options change the text", "the text is that of the full cache"),
        (_IgnoresTheBudget, "no step exceeds the budget", r"1\.0 of the past tokens are attended to"),
        (_TwiceTheBudget, "no step exceeds the budget", "the budget allows above 0 up to"),
        (_selecting(_HalvesItsCounts), "no step exceeds the budget", None),
    ],
)
def test_a_broken_method_fails_the_check_that_names_its_fault(kind, check, message, checkpoint) -> None:
    run = dict(checks(_subject(kind), checkpoint))[check]
    if message is None:
        run()
        return
    with pytest.raises(Exception, match=message) as raised:
        run()
    assert isinstance(raised.value, AssertionError | KeyError | TypeError | ValueError | IndexError)


SOURCE = """
from typing import Annotated
from sparsecache.methods.vanilla import Vanilla as Base

class Mine(Base):
    def __init__(self, share: Annotated[float, "a share"] = {default}):
        pass
"""


def test_options_that_show_nothing_or_cannot_be_recorded_are_found(tmp_path) -> None:
    method = str(tmp_path / "mine.py")
    Path(method).write_text(SOURCE.format(default="0.5"))
    with pytest.raises(AssertionError, match="need options that drop nothing .*--tight"):
        check_options(MethodUnderTest.of(method))
    with pytest.raises(AssertionError, match="the method has no option budgte"):
        check_options(MethodUnderTest.of(method, {}, {"budgte": 4}))
    check_options(MethodUnderTest.of(method, {}))
    Path(method).write_text(SOURCE.format(default='float("nan")'))
    with pytest.raises(AssertionError, match="the default share=nan cannot be recorded"):
        check_options(MethodUnderTest.of(method, {}))


def _command(*arguments: str) -> tuple[int, str]:
    told = CliRunner().invoke(main, arguments)
    return told.exit_code, told.output


def test_the_command_passes_the_example(repo) -> None:
    code, output = _command(str(repo / "examples" / "knorm.py"), "--model_type", "llama")
    assert code == 0 and "FAILED" not in output and "All checks passed.\nNot checked, since all ran on a" in output
    assert output.count("passed  ") == 18


def test_the_command_names_the_failed_checks(tmp_path) -> None:
    method = tmp_path / "mine.py"
    method.write_text(
        "from sparsecache.cache import FullCache\n"
        "from sparsecache.methods.vanilla import Vanilla as Base\n"
        "class Cache(FullCache):\n    def attend(self, *args):\n        return super().attend(*args) / 0\n"
        "class Mine(Base):\n    def make_cache(self, layer, config):\n        return Cache(config)\n"
    )
    code, output = _command(str(method), "--model_type", "qwen3", "--lossless", "share=1")
    assert code == 2
    assert output == f"Error: Method {method} has no option 'share'. Its options: offload=false.\n"
    code, output = _command(str(method), "--model_type", "qwen3", "--lossless", "offload=false")
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert code == 1 and f"\n{len(failed)} of 11 checks failed.\n" in output and "passed  options can be" in output
    assert any(
        "inputs are unchanged, outputs fit, with the defaults: qwen3: AssertionError: " in line for line in failed
    )


def test_the_command_prints_an_error_of_the_method_once(tmp_path) -> None:
    method = tmp_path / "mine.py"
    method.write_text(
        "from dataclasses import dataclass\nfrom sparsecache.cache import EvictionMethod\n"
        "@dataclass\nclass Mine(EvictionMethod):\n    def score(self, q, k, v):\n        return k[:, 1:, 0]\n"
    )
    code, output = _command(str(method))  # prompts of several lengths, and every family
    error = "ValueError: score returned [2, 89]. It must return a score per KV head and prompt token, [2, 90]."
    assert code == 1 and output.count("Traceback") == 1 and output.count(error) == 2  # its last line, and FAILED
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert error in failed[0] and all(line.endswith(": (the same error)") for line in failed[1:])
    assert f"\n{len({line.split(': ')[0] for line in failed})} of 18 checks failed.\n" in output
    assert "llama, mistral, qwen2, qwen3: (the same error)" in failed[-1]


def test_the_command_prints_the_traceback_of_a_constructor(tmp_path) -> None:
    method = tmp_path / "mine.py"
    method.write_text(
        "from sparsecache.methods.vanilla import Vanilla\nclass Mine(Vanilla):\n"
        "    def __init__(self, share: float = 0.5):\n        1 / 0\n"
    )
    code, output = _command(str(method), "--model_type", "llama", "--tight", "share=0.1")
    assert code == 1 and f'File "{method}", line 4, in __init__' in output and output.count("Traceback") == 1
    assert ": llama: ZeroDivisionError: division by zero\n" in output and "checks failed.\n" in output


def test_the_command_refuses_a_name_that_does_not_exist() -> None:
    code, output = _command("vanila")
    assert code == 2 and "did you mean 'vanilla'?" in output
