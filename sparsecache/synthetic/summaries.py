"""The English summaries of the sample: gov_report, qmsum and multi_news.

A report and the news mark their key sentences, and the summary is those sentences in the order of the text.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from sparsecache.synthetic import words
from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, fill, paragraphs, parts, share
from sparsecache.synthetic.english import PEOPLE
from sparsecache.synthetic.facts import Fact, Tale

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
    return rng.pick(_FINDINGS).format(
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
    return rng.pick(_REMARKS).format(f=_finding(rng)) if rng.chance(0.4) else words.scenery(rng)


def gov_report(rng: Rng, room: float) -> Draft:
    """A report; its summary is the sentences after `Key finding:`."""
    findings = [_sentence(_finding(rng)) for _ in range(parts(room, 120, 2, 10))]
    marked = ["Key finding: " + finding for finding in findings]
    sentences = fill(room - sum(map(estimate_tokens, marked)), lambda: _background(rng))
    rng.insert(sentences, *marked)
    return Draft(paragraphs(rng, sentences, " "), "", [" ".join(findings)])


def multi_news(rng: Rng, room: float) -> Draft:
    """Several news passages; the summary is the sentence after `In short:` of each."""
    news = [_sentence(_finding(rng)) for _ in range(parts(room, 150, 2, 8))]

    def writer(number: int, main: str) -> Callable[[float], str]:
        return lambda tokens: f"Passage {number}:\n" + _passage(rng, "In short: " + main, tokens - 3)

    return Draft("\n".join(share(room, [writer(*item) for item in enumerate(news, 1)])), "", [" ".join(news)])


def _passage(rng: Rng, main: str, room: float) -> str:
    sentences = fill(room - estimate_tokens(main), lambda: _background(rng))
    rng.insert(sentences, main)
    return paragraphs(rng, sentences, " ")


_ROLES = "Chair Treasurer Secretary Engineer Librarian Gardener Designer Archivist".split()
_TALK = (
    "I saw the {t} on my way here.",
    "Could somebody close the window by the {n}?",
    "We talked about the {n} last {m} already.",
    "Sorry, I was still reading about the {t}.",
    "Let us come back to the {n} after the break.",
)


def _talk(rng: Rng) -> str:
    return rng.pick(_TALK).format(t=words.thing(rng), n=rng.pick(words.NOUNS), m=rng.pick(words.MONTHS))


def qmsum(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """A meeting on many people; the answer is all that was said of one, always in the same order of relations."""
    tale = Tale(rng, replace(PEOPLE, scenery=_talk), most=5)
    person = tale.enter(words.person, PEOPLE.relations)
    facts = [tale.tell(person, relation) for relation in tale.untold(person)[: parts(room, 300, 2, 5)]]
    query, answer = _portrait(facts)
    room -= estimate_tokens(query) + sum(estimate_tokens(f"{fact} ") for fact in facts)
    # Each line of three sentences or more also names its speaker.
    items = fill(room / 1.05, tale.aside)
    rng.insert(items, *facts)
    lines = paragraphs(rng, tale.written(items, repeats), " ").split("\n")
    context = "\n".join(f"{rng.pick(_ROLES)}: {line}" for line in lines)
    return Draft(context, query, [answer], more=_portraits(tale, person))


def _portraits(tale: Tale, asked: str) -> Iterator[Question]:
    """Questions about the other people of whom two things or more were told."""
    about: dict[str, list[Fact]] = {}
    for fact in tale.told:
        about.setdefault(fact.entity, []).append(fact)
    for person in tale.rng.drawn(about):
        if len(about[person]) >= 2 and person != asked:
            yield _portrait(about[person])


def _portrait(facts: list[Fact]) -> Question:
    """The question about a person of whom the facts were told, and its answer."""
    person = facts[0].entity
    ordered = sorted(facts, key=lambda fact: PEOPLE.relations.index(fact.relation))
    *first, last = (fact.relation.clause.format(v=fact.value) for fact in ordered)
    return f"Summarize what was said about {person}.", f"{person} {', '.join(first)} and {last}."
