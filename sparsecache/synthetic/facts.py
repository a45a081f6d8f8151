"""Questions about facts, in any language: one fact among look-alikes, and chains of two or three facts.

A `World` says in its own language who the facts are about and how they are put; this module knows none.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, fill, mark, paragraphs

Make = Callable[[Rng], str]


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class Link(Relation):
    """A relation whose value is another entity, which a question can go on with as `that mentor`.

    `source` names the first entity where it is of another kind than the world's own (a film, not a person).
    """

    that: str = ""
    source: Make | None = None


@dataclass(frozen=True)
class World:
    """A made-up world: its entities, what is known of them, and its scenery.

    `blank` stands between two sentences, `comma` between two answers, `conjunction` before the last question,
    `pronoun` for an entity that was just named. `recalls` are frames for a sentence `{s}` that is said again.
    """

    name: Make
    relations: tuple[Relation, ...]
    scenery: Make
    recalls: tuple[str, ...] = ("As noted before, {s}", "Once more: {s}", "To recall, {s}")
    blank: str = " "
    comma: str = ", "
    conjunction: str = ", and "
    pronoun: str = ""
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A fact of a world, and the sentence that states it."""

    entity: str
    relation: Relation
    value: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    @property
    def question(self) -> Question:
        return self.relation.asks.format(e=self.entity), self.value


class Tale:
    """The facts of a text in the making: one value at most for each relation of an entity.

    A value that is asked for is kept from all other facts: add it to `kept`. `told` are the facts written so far.
    """

    def __init__(self, rng: Rng, world: World, most: int = 8) -> None:
        """`most` relations at most are told of an entity."""
        self.rng, self.world, self.most = rng, world, most
        self.kept: set[str] = set()
        self.told: list[Fact] = []
        self._untold: dict[str, list[Relation]] = {}
        self._open: list[str] = []

    def enter(self, name: Make, relations: Sequence[Relation]) -> str:
        """A new entity, of which the given relations may be told."""
        while (entity := name(self.rng)) in self._untold:
            pass
        self._untold[entity] = self.rng.several(relations, self.most)
        return entity

    def newcomer(self) -> str:
        """A new entity of the world, of which `another` may go on to tell."""
        self._open.append(self.enter(self.world.name, self.world.relations))
        return self._open[-1]

    def untold(self, entity: str) -> list[Relation]:
        """The relations of an entity that may still be told, in random order."""
        return self._untold[entity]

    def tell(self, entity: str, relation: Relation, value: str = "") -> Fact:
        """A fact that is not told yet; its value is drawn unless it is given."""
        left = self._untold[entity]
        if relation in left:
            left.remove(relation)
        while not value or value in self.kept:
            value = relation.value(self.rng)
        return Fact(entity, relation, value, relation.state(self.rng, entity, value))

    def another(self) -> Fact:
        """A fact about a newcomer, or more often about one who came earlier."""
        if not self._open or self.rng.chance(0.3):
            self.newcomer()
        place = self.rng.below(len(self._open))
        entity = self._open[place]
        fact = self.tell(entity, self._untold[entity][-1])
        if not self._untold[entity]:
            self._open[place] = self._open[-1]
            self._open.pop()
        return fact

    def aside(self) -> Fact | str:
        """Another fact, or a sentence about nobody."""
        return self.world.scenery(self.rng) if self.rng.chance(0.25) else self.another()

    def written(self, items: Iterable[Fact | str], repeats: float) -> list[str]:
        """The items as sentences; with chance `repeats`, a fact is followed by an earlier one, said again."""
        sentences: list[str] = []
        for item in items:
            sentences.append(str(item))
            if isinstance(item, Fact):
                if self.told and self.rng.chance(repeats):
                    sentences.append(self._again(self.rng.pick(self.told)))
                self.told.append(item)
        return sentences

    def questions(self, asked: Fact) -> Iterator[Question]:
        """Questions about the other facts that were told."""
        return (fact.question for fact in self.rng.drawn(self.told) if fact is not asked)

    def _again(self, fact: Fact) -> str:
        says = self.rng.pick(fact.relation.says)
        sentence = (says[0].lower() + says[1:]).format(e=fact.entity, v=mark(fact.value))
        return self.rng.pick(self.world.recalls).format(s=sentence)


def surround(tale: Tale, fact: Fact, room: float, stated: bool = True) -> list[Fact | str]:
    """About `room` tokens: the fact (if `stated`) at a uniform place, and one look-alike at least."""
    rng = tale.rng
    tale.kept.add(fact.value)
    first = tale.tell(tale.newcomer(), fact.relation)
    room -= estimate_tokens(str(first) + str(fact) * stated)
    items = fill(room, tale.aside)
    rng.insert(items, first)
    if stated:
        rng.insert(items, fact)
    return items


def article(rng: Rng, world: World, room: float, repeats: float = 0.0) -> Draft:
    """A running text and a question that one sentence of it answers."""
    tale = Tale(rng, world)
    fact = tale.tell(tale.newcomer(), rng.pick(world.relations))
    question, answer = fact.question
    items = surround(tale, fact, room - estimate_tokens(question))
    text = paragraphs(rng, tale.written(items, repeats), world.blank)
    return Draft(text, question, [answer], more=tale.questions(fact))
