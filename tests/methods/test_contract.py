"""Every built-in method keeps the contract (testing/method_checks.py), and its checks find methods that do not.

A new file below methods/ is tested here without being named.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsecache.cache.base import queries_read
from sparsecache.engine.families import family_names
from sparsecache.methods import method_names
from sparsecache.testing.method_checks import check_lossless, checks
from sparsecache.testing.method_under_test import MethodUnderTest

CHECKS = [(method, name) for method in method_names() for name, _ in checks(MethodUnderTest.of(method), Path())]
FIRST, *OTHERS = family_names()


def _families(at: int, method: str) -> list[str]:
    """Return the families to test a method with: all if it takes more of a model than q, k and v, else one in turn."""
    made = MethodUnderTest.of(method).make({})
    takes_more = made.uses_rope or made.calibration_text() is not None
    return OTHERS if takes_more else [OTHERS[at % len(OTHERS)]]


READ_ALL = {"h2o", "expected_attention", "lrqk"}


def test_few_methods_read_all_queries_of_a_prompt() -> None:
    made = {method: MethodUnderTest.of(method).make({}) for method in method_names()}
    assert {method for method, each in made.items() if each.prompt_queries is None} == READ_ALL
    assert made["composed"].prompt_queries == made["snapkv"].prompt_queries == 32

    class Derived(type(made["oracle"])):  # type: ignore[misc]
        """A method outside the package may read more than its base class."""

    assert queries_read(Derived()) is None


PAIRS = [(method, family) for at, method in enumerate(method_names()) for family in _families(at, method)]


@pytest.mark.parametrize(("method", "name"), CHECKS)
def test_built_in_methods_keep_the_contract(method, name, checkpoint: Callable[[str], Path]) -> None:
    dict(checks(MethodUnderTest.of(method), checkpoint(FIRST)))[name]()


@pytest.mark.parametrize(("method", "model_type"), PAIRS)
def test_lossless_options_give_the_text_of_transformers_in_other_families(method, model_type, checkpoint) -> None:
    """Families differ in how q, k and v are computed, which no other check depends on."""
    subject = MethodUnderTest.of(method)
    assert subject.lossless is not None
    check_lossless(subject, checkpoint(model_type))
