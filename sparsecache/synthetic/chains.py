"""Questions over several passages, in any language: each fact leads to the passage that holds the next.

The question asks for every step, and the answer names them in order: `Ida Pelbestad, The Rusty Window`.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, fill, paragraphs, parts, share
from sparsecache.synthetic.facts import Fact, Link, Relation, Tale, World


def hops(rng: Rng, world: World, room: float, steps: int, heading: str, repeats: float = 0.0) -> Draft:
    """A question that takes `steps` passages, each found by the one before, among chains of the same kind.

    `heading` is the line above a passage, with {n} and {title}. Every sentence of a passage names whom it is
    about, the last answer is stated once, and no other passage names the one whom the question begins with.
    """
    tale = Tale(rng, world, most=len(world.relations) + len(world.links))
    links, last = rng.several(world.links, steps - 1), rng.pick(world.relations)
    asked = _chain(tale, links, last)
    tale.kept.add(asked[-1].value)
    question, answer = _ask(world, asked)
    room -= estimate_tokens(question)
    count = parts(room, 60, steps + 1, 24)
    evidence = list(asked)
    while len(evidence) < count:
        evidence += _chain(tale, links, last)
    # A distractor chain may be cut short: the chain that is asked about is the first.
    evidence = evidence[:count]
    others = [fact.entity for fact in evidence[steps:]]

    def writer(number: int, fact: Fact) -> Callable[[float], str]:
        head = heading.format(n=number, title=fact.entity)

        def write(tokens: float) -> str:
            items = _passage(tale, fact, others, tokens - estimate_tokens(head))
            return head + paragraphs(rng, tale.written(items, repeats), world.blank)

        return write

    texts = share(room, [writer(*item) for item in enumerate(rng.several(evidence, count), 1)])
    return Draft("\n".join(texts), question, [answer], more=_further(tale, asked))


def _chain(tale: Tale, links: list[Link], last: Relation) -> list[Fact]:
    """Facts that lead over `links` from a newcomer to newcomers, and of the last one a fact of relation `last`."""
    world = tale.world
    known = [*world.relations, *(link for link in world.links if not link.source)]
    source = links[0].source
    entity = tale.enter(source, ()) if source else tale.enter(world.name, known)
    facts: list[Fact] = []
    for link in links:
        following = tale.enter(world.name, known)
        facts.append(tale.tell(entity, link, following))
        entity = following
    return [*facts, tale.tell(entity, last)]


def _passage(tale: Tale, evidence: Fact, others: list[str], room: float) -> list[Fact | str]:
    """The evidence among more facts about its subject, facts about outsiders, and scenery."""
    rng, subject = tale.rng, evidence.entity
    known = [other for other in others if other != subject]

    def side() -> Fact | str:
        left = tale.untold(subject)
        if left and rng.chance(0.7):
            value = rng.pick(known) if known and isinstance(left[-1], Link) else ""
            return tale.tell(subject, left[-1], value)
        if rng.chance(0.5):
            return tale.world.scenery(rng)
        return tale.tell(tale.newcomer(), rng.pick(tale.world.relations))

    items = fill(room - estimate_tokens(str(evidence)), side)
    rng.insert(items, evidence)
    return items


def _ask(world: World, facts: list[Fact]) -> Question:
    """A question for every step of a chain of facts, and its answer."""
    asks: list[str] = []
    subject = facts[0].entity
    for fact in facts:
        ask = fact.relation.asks
        asks.append((ask[0].lower() + ask[1:] if asks else ask).format(e=subject))
        subject = fact.relation.that if isinstance(fact.relation, Link) else ""
    *first, last = (ask if ask is asks[-1] else ask[:-1] for ask in asks)
    return world.comma.join(first) + world.conjunction + last, world.comma.join(fact.value for fact in facts)


def _further(tale: Tale, asked: list[Fact]) -> Iterator[Question]:
    """Questions over other chains of the told facts; now and then, and in the end, for single facts."""
    singles = tale.questions(asked[-1])
    for facts in tale.rng.drawn(_paths(tale.told, len(asked))):
        if tale.rng.chance(0.3):
            yield from islice(singles, 1)
        if facts != asked:
            yield _ask(tale.world, facts)
    yield from singles


def _paths(told: list[Fact], steps: int) -> list[list[Fact]]:
    """All chains of `steps` of the told facts, over links that differ, back to nobody."""
    about: dict[str, list[Fact]] = {}
    for fact in told:
        about.setdefault(fact.entity, []).append(fact)
    paths = [[fact] for fact in told if isinstance(fact.relation, Link)]
    for step in range(1, steps):
        paths = [
            [*path, fact]
            for path in paths
            for fact in about.get(path[-1].value, ())
            if isinstance(fact.relation, Link) == (step < steps - 1)
            and all(fact.relation is not other.relation and fact.value != other.entity for other in path)
        ]
    return paths
