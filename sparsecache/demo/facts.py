"""Questions about facts, in any language: one fact among look-alikes, and chains of two or three facts.

A `World` says in its own language who the facts are about and how they are put; this module knows none.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sparsecache.demo.build import Draft, Rng, estimate_tokens, fill, paragraphs, parts, share

Make = Callable[[Rng], str]


@dataclass(frozen=True)
class Relation:
    """One thing that can be said of an entity `{e}`: its value `{v}`.

    `says` are ways to state it, `asks` the question whose answer is the value, `confirms` the yes/no
    question, `clause` the same fact without its entity, for an abstract.
    """

    value: Make
    says: tuple[str, ...]
    asks: str = ""
    confirms: str = ""
    clause: str = ""

    def state(self, rng: Rng, entity: str, value: str) -> str:
        return rng.pick(self.says).format(e=entity, v=value)


@dataclass(frozen=True)
class Link:
    """A relation whose value is another entity; `phrase` names that one by the first, `the mentor of {e}`.

    `source` names the first entity where it is of another kind than the world's own (a film, not a person).
    """

    phrase: str
    says: tuple[str, ...]
    source: Make | None = None


@dataclass(frozen=True)
class World:
    """A made-up world: its entities, what is known of them, and its scenery.

    `blank` stands between two sentences, `pronoun` for an entity that was just named.
    """

    name: Make
    relations: tuple[Relation, ...]
    scenery: Make
    blank: str = " "
    pronoun: str = ""
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A stated fact of a world."""

    entity: str
    relation: Relation
    value: str
    sentence: str


def make_fact(rng: Rng, world: World) -> Fact:
    """A random fact about a random entity of the world."""
    relation, entity = rng.pick(world.relations), world.name(rng)
    value = relation.value(rng)
    return Fact(entity, relation, value, relation.state(rng, entity, value))


def lookalike(rng: Rng, world: World, fact: Fact) -> str:
    """A sentence of the same relation about another entity, with another value."""
    entity = rng.fresh(world.name, {fact.entity})
    return fact.relation.state(rng, entity, rng.fresh(fact.relation.value, {fact.value}))


def aside(rng: Rng, world: World, fact: Fact) -> str:
    """A sentence that does not answer the question about `fact`: a look-alike, other facts or scenery."""
    if rng.chance(0.35):
        return lookalike(rng, world, fact)
    if rng.chance(0.55):
        return world.scenery(rng)
    relation = rng.pick([other for other in world.relations if other is not fact.relation])
    entity = fact.entity if rng.chance(0.1) else world.name(rng)
    return relation.state(rng, entity, rng.fresh(relation.value, {fact.value}))


def surround(rng: Rng, world: World, fact: Fact, room: float, stated: bool = True) -> list[str]:
    """About `room` tokens: the fact (if `stated`) at a uniform place, and one look-alike at least."""
    first = lookalike(rng, world, fact)
    room -= estimate_tokens(first + fact.sentence * stated)
    sentences = fill(room, lambda: aside(rng, world, fact))
    rng.insert(sentences, first)
    if stated:
        rng.insert(sentences, fact.sentence)
    return sentences


def article(rng: Rng, world: World, room: float) -> Draft:
    """A running text and a question that one sentence of it answers."""
    fact = make_fact(rng, world)
    question = fact.relation.asks.format(e=fact.entity)
    room -= estimate_tokens(question)
    return Draft(paragraphs(rng, surround(rng, world, fact, room), world.blank), question, [fact.value])


@dataclass(frozen=True)
class Passage:
    """A passage about one entity, before it is written out: the sentences that it must hold."""

    title: str
    evidence: str


def chain(rng: Rng, world: World, links: list[Link], last: Relation, used: set[str]) -> tuple[list[Passage], str]:
    """Passages that lead over `links` from entity to entity to a fact of relation `last`, and its value."""
    passages: list[Passage] = []
    entity = rng.fresh(links[0].source or world.name, used)
    for link in links:
        following = rng.fresh(world.name, used)
        passages.append(Passage(entity, rng.pick(link.says).format(e=entity, v=following)))
        entity = following
    value = rng.fresh(last.value, used)
    return [*passages, Passage(entity, last.state(rng, entity, value))], value


def hops(rng: Rng, world: World, room: float, steps: int, heading: str) -> Draft:
    """A question that takes `steps` passages, each found by the one before, among chains of other people.

    `heading` is the line above a passage, with {n} and {title}. The answer is stated once, and no
    entity is in two passages unless a link leads there.
    """
    last = rng.pick(world.relations)
    links = rng.several(world.links, steps - 1)
    used: set[str] = set()
    passages, value = chain(rng, world, links, last, used)
    phrase = passages[0].title
    for link in links:
        phrase = link.phrase.format(e=phrase)
    question = last.asks.format(e=phrase)
    room -= estimate_tokens(question)
    count = parts(room, 50, steps + 2, 20)
    while len(passages) < count:
        passages += chain(rng, world, links, last, used)[0]
    # A distractor chain may be cut short: the chain that is asked about is the first.
    ordered = rng.several(passages[:count], count)

    def writer(number: int, passage: Passage) -> Callable[[float], str]:
        head = heading.format(n=number, title=passage.title)
        return lambda tokens: head + _passage_text(rng, world, passage, value, used, tokens - estimate_tokens(head))

    texts = share(room, [writer(number, passage) for number, passage in enumerate(ordered, 1)])
    return Draft("\n".join(texts), question, [value])


def _passage_text(rng: Rng, world: World, passage: Passage, answer: str, used: set[str], room: float) -> str:
    """The passage's evidence among scenery and facts about people outside `used`, who are added there."""

    def side() -> str:
        if rng.chance(0.6):
            return world.scenery(rng)
        relation = rng.pick(world.relations)
        return relation.state(rng, rng.fresh(world.name, used), rng.fresh(relation.value, {answer}))

    sentences = fill(room - estimate_tokens(passage.evidence), side)
    rng.insert(sentences, passage.evidence)
    return paragraphs(rng, sentences, world.blank)
