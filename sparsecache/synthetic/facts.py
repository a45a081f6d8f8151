"""Facts about made-up entities, the texts that state them, and questions about one fact.

A `World` gives the entities, relations and wording in its own language; this module contains no wording.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparsecache.synthetic.draft import Draft, QAPair, Rng, estimate_tokens, fill, join_paragraphs, mark

MakeText = Callable[[Rng], str]


@dataclass(frozen=True, eq=False)
class Relation:
    """A property of an entity. Templates hold `{e}` for the entity and `{v}` for the value.

    `make_value` draws a value; `statements` are wordings of the fact; `question` asks for the value; `confirmation` is
    the yes/no question; `clause` states the fact without its entity, for abstracts.
    """

    make_value: MakeText
    statements: tuple[str, ...]
    question: str = ""
    confirmation: str = ""
    clause: str = ""

    def state(self, rng: Rng, entity: str, value: str) -> str:
        return rng.choice(self.statements).format(e=entity, v=value)


@dataclass(frozen=True, eq=False)
class Link(Relation):
    """A relation whose value is another entity, to which a question can refer (`that mentor`).

    `make_source` draws the first entity of a chain where it is not of the world's own kind (a film, not a person).
    """

    reference: str = ""
    make_source: MakeText | None = None


@dataclass(frozen=True)
class World:
    """Entities, their relations, and the wording of one language.

    `make_filler` draws a sentence that states no fact. `repeat_frames` introduce a sentence `{s}` that is repeated.
    `separator` joins sentences, `list_separator` joins answers, `conjunction` precedes the last of several questions,
    and `pronoun` refers to the entity named before.
    """

    make_entity: MakeText
    relations: tuple[Relation, ...]
    make_filler: MakeText
    repeat_frames: tuple[str, ...] = ("As noted before, {s}", "Once more: {s}", "To recall, {s}")
    separator: str = " "
    list_separator: str = ", "
    conjunction: str = ", and "
    pronoun: str = ""
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A relation of an entity with its value, and the sentence that states it."""

    entity: str
    relation: Relation
    value: str
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    @property
    def qa_pair(self) -> QAPair:
        return self.relation.question.format(e=self.entity), self.value


class FactWriter:
    """Makes the facts of one text.

    No relation of an entity is used twice, so no two facts contradict each other.

    `reserved_values` are never drawn as values: they answer questions. `stated` lists the facts written so far.
    """

    def __init__(self, rng: Rng, world: World, max_relations: int = 8) -> None:
        """Each entity gets at most `max_relations` relations."""
        self.rng, self.world, self.max_relations = rng, world, max_relations
        self.reserved_values: set[str] = set()
        self.stated: list[Fact] = []
        self._unused: dict[str, list[Relation]] = {}
        self._open: list[str] = []

    def add_entity(self, make_entity: MakeText, relations: Sequence[Relation]) -> str:
        """Return a new entity that may have facts of the given relations."""
        while (entity := make_entity(self.rng)) in self._unused:
            pass
        self._unused[entity] = self.rng.sample(relations, self.max_relations)
        return entity

    def new_entity(self) -> str:
        """Return a new entity of the world, which `random_fact` may use again."""
        self._open.append(self.add_entity(self.world.make_entity, self.world.relations))
        return self._open[-1]

    def unused_relations(self, entity: str) -> list[Relation]:
        """Return the relations of an entity that have no fact yet, in random order."""
        return self._unused[entity]

    def make_fact(self, entity: str, relation: Relation, value: str = "") -> Fact:
        """Return a new fact. Draws a value if none is given, or if the given one is reserved."""
        unused = self._unused[entity]
        if relation in unused:
            unused.remove(relation)
        while not value or value in self.reserved_values:
            value = relation.make_value(self.rng)
        return Fact(entity, relation, value, relation.state(self.rng, entity, value))

    def random_fact(self) -> Fact:
        """Return a fact about an earlier entity (70 % of the calls, if any) or about a new one."""
        if not self._open or self.rng.chance(0.3):
            self.new_entity()
        index = self.rng.randbelow(len(self._open))
        entity = self._open[index]
        fact = self.make_fact(entity, self._unused[entity][-1])
        if not self._unused[entity]:
            self._open[index] = self._open[-1]
            self._open.pop()
        return fact

    def random_item(self) -> Fact | str:
        """Return a random fact (75 %) or a filler sentence (25 %)."""
        return self.world.make_filler(self.rng) if self.rng.chance(0.25) else self.random_fact()

    def to_sentences(self, items: Iterable[Fact | str], repeat_prob: float) -> list[str]:
        """Return the items as sentences.

        After a fact, an earlier one is repeated with probability `repeat_prob`.
        """
        sentences: list[str] = []
        for item in items:
            sentences.append(str(item))
            if isinstance(item, Fact):
                if self.stated and self.rng.chance(repeat_prob):
                    sentences.append(self._repeat(self.rng.choice(self.stated)))
                self.stated.append(item)
        return sentences

    def follow_ups(self, asked: Fact) -> Iterator[QAPair]:
        """Return questions about the stated facts other than `asked`, in random order."""
        return (fact.qa_pair for fact in self.rng.shuffled(self.stated) if fact is not asked)

    def _repeat(self, fact: Fact) -> str:
        statement = self.rng.choice(fact.relation.statements)
        sentence = (statement[0].lower() + statement[1:]).format(e=fact.entity, v=mark(fact.value))
        return self.rng.choice(self.world.repeat_frames).format(s=sentence)


def add_distractors(writer: FactWriter, fact: Fact, tokens: float, stated: bool = True) -> list[Fact | str]:
    """Return about `tokens` tokens of facts and filler, with `fact` at a random position if `stated`.

    At least one distractor has the relation of `fact`.
    """
    rng = writer.rng
    writer.reserved_values.add(fact.value)
    distractor = writer.make_fact(writer.new_entity(), fact.relation)
    tokens -= estimate_tokens(str(distractor) + str(fact) * stated)
    items = fill(tokens, writer.random_item)
    rng.insert(items, distractor)
    if stated:
        rng.insert(items, fact)
    return items


def single_fact_draft(rng: Rng, world: World, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return a text about many entities, and a question that one sentence answers."""
    writer = FactWriter(rng, world)
    fact = writer.make_fact(writer.new_entity(), rng.choice(world.relations))
    question, answer = fact.qa_pair
    items = add_distractors(writer, fact, tokens - estimate_tokens(question))
    text = join_paragraphs(rng, writer.to_sentences(items, repeat_prob), world.separator)
    return Draft(text, question, [answer], follow_ups=writer.follow_ups(fact))
