"""Multi-hop questions: each fact leads to the passage that states the next one.

The question asks for every hop, and the answer names the values in order: `Ida Pelbestad, The Rusty Window`.
"""

from collections.abc import Callable, Iterator
from itertools import islice

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
from sparsecache.synthetic.facts import Fact, FactWriter, Link, Relation, World


def multi_hop_draft(rng: Rng, world: World, tokens: float, hops: int, heading: str, repeat_prob: float = 0.0) -> Draft:
    """Passages, and a question that needs `hops` of them, one after the other.

    `heading` is the line above a passage, with {n} and {title}. Every fact names its entity. The last answer is stated
    once, and only one passage names the entity of the question.
    """
    writer = FactWriter(rng, world, max_relations=len(world.relations) + len(world.links))
    links, last = rng.sample(world.links, hops - 1), rng.choice(world.relations)
    asked = _chain(writer, links, last)
    writer.reserved_values.add(asked[-1].value)
    question, answer = _ask(world, asked)
    tokens -= estimate_tokens(question)
    count = num_parts(tokens, 60, hops + 1, 24)
    evidence = list(asked)
    while len(evidence) < count:
        evidence += _chain(writer, links, last)
    # This may cut a distractor chain short; the chain of the question comes first.
    evidence = evidence[:count]
    others = [fact.entity for fact in evidence[hops:]]

    def passage_writer(number: int, fact: Fact) -> Callable[[float], str]:
        head = heading.format(n=number, title=fact.entity)

        def write(tokens: float) -> str:
            items = _passage(writer, fact, others, tokens - estimate_tokens(head))
            return head + join_paragraphs(rng, writer.to_sentences(items, repeat_prob), world.separator)

        return write

    texts = write_parts(tokens, [passage_writer(*item) for item in enumerate(rng.sample(evidence, count), 1)])
    return Draft("\n".join(texts), question, [answer], follow_ups=_follow_ups(writer, asked))


def _chain(writer: FactWriter, links: list[Link], last: Relation) -> list[Fact]:
    """Return one fact per link between new entities, and a `last` fact about the last entity."""
    world = writer.world
    relations = [*world.relations, *(link for link in world.links if not link.make_source)]
    make_source = links[0].make_source
    entity = writer.add_entity(make_source, ()) if make_source else writer.add_entity(world.make_entity, relations)
    facts: list[Fact] = []
    for link in links:
        following = writer.add_entity(world.make_entity, relations)
        facts.append(writer.make_fact(entity, link, following))
        entity = following
    return [*facts, writer.make_fact(entity, last)]


def _passage(writer: FactWriter, evidence: Fact, others: list[str], tokens: float) -> list[Fact | str]:
    """Return the evidence among other facts about its entity and others, and filler."""
    rng, entity = writer.rng, evidence.entity
    linkable = [other for other in others if other != entity]

    def item() -> Fact | str:
        unused = writer.unused_relations(entity)
        if unused and rng.chance(0.7):
            value = rng.choice(linkable) if linkable and isinstance(unused[-1], Link) else ""
            return writer.make_fact(entity, unused[-1], value)
        if rng.chance(0.5):
            return writer.world.make_filler(rng)
        return writer.make_fact(writer.new_entity(), rng.choice(writer.world.relations))

    items = fill(tokens - estimate_tokens(str(evidence)), item)
    rng.insert(items, evidence)
    return items


def _ask(world: World, facts: list[Fact]) -> QAPair:
    """Return a question about every hop of a chain of facts, and its answer."""
    questions: list[str] = []
    subject = facts[0].entity
    for fact in facts:
        template = fact.relation.question
        if questions:
            template = template[0].lower() + template[1:]
        questions.append(template.format(e=subject))
        subject = fact.relation.reference if isinstance(fact.relation, Link) else ""
    *first, last = questions
    question = world.list_separator.join(part[:-1] for part in first) + world.conjunction + last  # one question mark
    return question, world.list_separator.join(fact.value for fact in facts)


def _follow_ups(writer: FactWriter, asked: list[Fact]) -> Iterator[QAPair]:
    """Yield questions about other chains of the stated facts, mixed with single facts."""
    singles = writer.follow_ups(asked[-1])
    for facts in writer.rng.shuffled(_chains_of(writer.stated, len(asked))):
        if writer.rng.chance(0.3):
            yield from islice(singles, 1)
        if facts != asked:
            yield _ask(writer.world, facts)
    yield from singles


def _chains_of(stated: list[Fact], hops: int) -> list[list[Fact]]:
    """Return all chains of `hops` stated facts with different links and without cycles."""
    by_entity: dict[str, list[Fact]] = {}
    for fact in stated:
        by_entity.setdefault(fact.entity, []).append(fact)
    chains = [[fact] for fact in stated if isinstance(fact.relation, Link)]
    for hop in range(1, hops):
        chains = [
            [*chain, fact]
            for chain in chains
            for fact in by_entity.get(chain[-1].value, ())
            if isinstance(fact.relation, Link) == (hop < hops - 1)
            and all(fact.relation is not other.relation and fact.value != other.entity for other in chain)
        ]
    return chains
