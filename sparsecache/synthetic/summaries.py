"""Generators of the English summarization datasets gov_report, qmsum and multi_news.

Reports and news mark their key sentences; the summary consists of those sentences in order.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from sparsecache.synthetic import words
from sparsecache.synthetic.draft import (
    Draft,
    QAPair,
    Rng,
    estimate_tokens,
    fill,
    join_paragraphs,
    num_parts,
    write_parts,
)
from sparsecache.synthetic.english import PEOPLE
from sparsecache.synthetic.facts import Fact, FactWriter

_FINDINGS = (
    "the {o} spent {v} coins on the {t} in {y}",
    "the {o} moved {v} crates from {c} to {d}",
    "{p} of the {o} approved the {t} without a vote",
    "the plan of {p} for the {t} in {c} was dropped in {y}",
    "the {o} cut the fees for the {t} in {c} by {v} coins",
    "the station in {c} lent {v} tools to the {o}",
)
_REMARKS = (
    "Earlier audits had claimed that {f}.",
    "A draft that was not adopted says that {f}.",
    "One official doubted that {f}.",
)


def _finding(rng: Rng) -> str:
    return rng.choice(_FINDINGS).format(
        o=words.company(rng),
        v=words.number(rng),
        t=words.thing(rng),
        y=words.year(rng),
        p=words.person(rng),
        c=words.town(rng),
        d=words.town(rng),
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _background(rng: Rng) -> str:
    return rng.choice(_REMARKS).format(f=_finding(rng)) if rng.chance(0.4) else words.filler(rng)


def gov_report(rng: Rng, tokens: float) -> Draft:
    """Return a report; the summary is the sentences after `Key finding:`."""
    findings = [_sentence(_finding(rng)) for _ in range(num_parts(tokens, 120, 2, 10))]
    key_sentences = ["Key finding: " + finding for finding in findings]
    sentences = fill(tokens - sum(map(estimate_tokens, key_sentences)), lambda: _background(rng))
    rng.insert(sentences, *key_sentences)
    return Draft(join_paragraphs(rng, sentences, " "), "", [" ".join(findings)])


def multi_news(rng: Rng, tokens: float) -> Draft:
    """Return news passages; the summary is the sentence after `In short:` of each."""
    news = [_sentence(_finding(rng)) for _ in range(num_parts(tokens, 150, 2, 8))]

    def passage_writer(number: int, main: str) -> Callable[[float], str]:
        return lambda tokens: f"Passage {number}:\n" + _passage(rng, "In short: " + main, tokens - 3)

    passages = write_parts(tokens, [passage_writer(*item) for item in enumerate(news, 1)])
    return Draft("\n".join(passages), "", [" ".join(news)])


def _passage(rng: Rng, main: str, tokens: float) -> str:
    sentences = fill(tokens - estimate_tokens(main), lambda: _background(rng))
    rng.insert(sentences, main)
    return join_paragraphs(rng, sentences, " ")


_ROLES = "Chair Treasurer Secretary Engineer Librarian Gardener Designer Archivist".split()
_TALK = (
    "I saw the {t} on my way here.",
    "Could somebody close the window by the {n}?",
    "We talked about the {n} last {m} already.",
    "Sorry, I was still reading about the {t}.",
    "Let us come back to the {n} after the break.",
)


def _talk(rng: Rng) -> str:
    return rng.choice(_TALK).format(t=words.thing(rng), n=rng.choice(words.NOUNS), m=rng.choice(words.MONTHS))


def qmsum(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return a meeting about many people; the answer lists all facts about one, in a fixed order."""
    writer = FactWriter(rng, replace(PEOPLE, make_filler=_talk), max_relations=5)
    person = writer.add_entity(words.person, PEOPLE.relations)
    relations = writer.unused_relations(person)[: num_parts(tokens, 300, 2, 5)]
    facts = [writer.make_fact(person, relation) for relation in relations]
    query, answer = _summary_of_person(facts)
    tokens -= estimate_tokens(query) + sum(estimate_tokens(f"{fact} ") for fact in facts)
    items = fill(tokens / 1.05, writer.random_item)  # speaker names add about 5 %
    rng.insert(items, *facts)
    lines = join_paragraphs(rng, writer.to_sentences(items, repeat_prob), " ").split("\n")
    context = "\n".join(f"{rng.choice(_ROLES)}: {line}" for line in lines)
    return Draft(context, query, [answer], follow_ups=_follow_ups(writer, person))


def _follow_ups(writer: FactWriter, asked: str) -> Iterator[QAPair]:
    """Return questions about the other people with at least two stated facts."""
    by_person: dict[str, list[Fact]] = {}
    for fact in writer.stated:
        by_person.setdefault(fact.entity, []).append(fact)
    for person in writer.rng.shuffled(by_person):
        if len(by_person[person]) >= 2 and person != asked:
            yield _summary_of_person(by_person[person])


def _summary_of_person(facts: list[Fact]) -> QAPair:
    """Return the question about the person of `facts`, and its answer."""
    person = facts[0].entity
    ordered = sorted(facts, key=lambda fact: PEOPLE.relations.index(fact.relation))
    *first, last = (fact.relation.clause.format(v=fact.value) for fact in ordered)
    return f"Summarize what was said about {person}.", f"{person} {', '.join(first)} and {last}."
