"""The English summaries of the sample: gov_report, qmsum and multi_news.

The text marks its key sentences, and the summary is those sentences in the order of the text.
"""

from collections.abc import Callable

from sparsecache.demo import words
from sparsecache.demo.build import Draft, Rng, estimate_tokens, fill, paragraphs, parts, share

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
_DECISIONS = (
    "{p} will order a {t} from {o}",
    "the {t} goes to {c} before {m}",
    "we pay {v} coins to {o} for the {t}",
    "{p} writes to the {o} about the {t}",
    "the {t} will be painted by {p} in {m}",
)
_TALK = (
    "I saw the {t} on my way here.",
    "Could somebody close the window by the {n}?",
    "We talked about the {n} last {m} already.",
    "Sorry, I was still reading about the {t}.",
    "Let us come back to the {n} after the break.",
)


def _decision(rng: Rng) -> str:
    return rng.pick(_DECISIONS).format(
        p=words.person(rng),
        t=words.thing(rng),
        o=words.company(rng),
        c=words.town(rng),
        m=rng.pick(words.MONTHS),
        v=words.number(rng),
    )


def qmsum(rng: Rng, room: float) -> Draft:
    """A meeting; the answer is every decision on the topic that is asked about."""
    used: set[str] = set()
    topic = rng.fresh(words.thing, used)
    others = [rng.fresh(words.thing, used) for _ in range(parts(room, 250, 2, 8))]
    query = f"What was decided about the {topic}?"
    decisions = [_sentence(_decision(rng)) for _ in range(parts(room, 300, 1, 4))]

    def line(text: str) -> str:
        return f"{rng.pick(_ROLES)}: {text}"

    def decided(about: str, decision: str) -> str:
        return line(f"Decision on the {about}: {decision}")

    def chatter() -> str:
        if rng.chance(0.35):
            return decided(rng.pick(others), _sentence(_decision(rng)))
        talk = rng.pick(_TALK)
        return line(talk.format(t=words.thing(rng), n=rng.pick(words.NOUNS), m=rng.pick(words.MONTHS)))

    own = [decided(topic, decision) for decision in decisions]
    distractor = decided(others[0], _sentence(_decision(rng)))
    lines = fill(room - sum(map(estimate_tokens, [query, distractor, *own])), chatter)
    rng.insert(lines, distractor)
    rng.insert(lines, *own)
    return Draft("\n".join(lines), query, [" ".join(decisions)])
