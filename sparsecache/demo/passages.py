"""Counting and finding paragraphs: passage_count and passage_retrieval, the latter in any language."""

from collections.abc import Callable

from sparsecache.demo import words
from sparsecache.demo.build import Draft, Rng, estimate_tokens, fill, parts, share
from sparsecache.demo.facts import Relation, World


def _house(rng: Rng) -> str:
    kind = rng.pick(("Museum", "School", "Theatre", "Lighthouse", "Market", "Brewery", "Hospital", "Garden"))
    return f"the {words.titled(rng)} {kind}"


PLACES = World(
    _house,
    (
        Relation(words.year, ("{e} was founded in {v}.", "Work on {e} began in {v}."), clause="dates from {v}"),
        Relation(words.person, ("{e} was designed by {v}.",), clause="goes back to the plans of {v}"),
        Relation(words.town, ("{e} stands in {v}.",), clause="can be found in {v}"),
        Relation(words.number, ("About {v} people visit {e} every year.",), clause="has {v} guests a year"),
        Relation(words.thing, ("{e} has a {v} above its door.",), clause="is known by a {v} at its door"),
        Relation(words.company, ("{e} is run by {v}.",), clause="belongs to {v}"),
        Relation(words.dish, ("{e} offers its guests {v}.",), clause="serves {v}"),
    ),
    words.scenery,
    pronoun="it",
)


def paragraph(rng: Rng, world: World, used: set[str], room: float) -> tuple[str, list[str]]:
    """A paragraph about a place, two facts at least and then scenery; and the facts as clauses.

    Names and values come from outside `used`, so that no fact is true of two paragraphs.
    """
    name = rng.fresh(world.name, used)
    sentences: list[str] = []
    clauses: list[str] = []
    for relation in rng.several(world.relations, 4):
        if len(clauses) >= 2 and room < 25:
            break
        value = rng.fresh(relation.value, used)
        subject = world.pronoun if sentences else name
        sentence = relation.state(rng, subject, value)
        sentences.append(sentence[0].upper() + sentence[1:])
        clauses.append(relation.clause.format(v=value))
        room -= estimate_tokens(sentence + world.blank)
    for sentence in fill(room, lambda: world.scenery(rng)):
        sentences.insert(rng.span(1, len(sentences)), sentence)
    return world.blank.join(sentences), clauses


def passage_count(rng: Rng, room: float) -> Draft:
    """Numbered paragraphs, some of them twice or more; the answer is how many different ones there are."""
    count = parts(room, 60, 4, 30)
    unique = rng.span(max(2, count // 4), count - 1)
    order = rng.several([*range(unique), *(rng.below(unique) for _ in range(count - unique))], count)
    used: set[str] = set()
    texts: dict[int, str] = {}

    def writer(number: int, which: int) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = f"Paragraph {number}: "
            if which not in texts:
                texts[which] = paragraph(rng, PLACES, used, tokens - estimate_tokens(head))[0]
            return head + texts[which] + "\n\n"

        return write

    written = share(room, [writer(*item) for item in enumerate(order, 1)])
    return Draft("".join(written).rstrip("\n"), "", [str(unique)])


def retrieve(rng: Rng, world: World, room: float, heading: str, abstract: str, conjunction: str) -> Draft:
    """Up to 30 paragraphs under `heading` ({n}) and an abstract of two facts of one of them, in other words.

    The answer is the heading without its colon.
    """
    count = parts(room - 30, 33, 3, 30)
    wanted = rng.below(count)
    used: set[str] = set()
    summary = ""

    def writer(index: int) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            nonlocal summary
            head = heading.format(n=index + 1)
            text, clauses = paragraph(rng, world, used, tokens - estimate_tokens(head))
            if index == wanted:
                summary = abstract.format(c=conjunction.join(rng.several(clauses, 2)))
            return head + text + "\n\n"

        return write

    texts = share(room - 30, [writer(index) for index in range(count)])
    return Draft("".join(texts).rstrip("\n"), summary, [heading.format(n=wanted + 1).rstrip(":： ")])


def passage_retrieval_en(rng: Rng, room: float) -> Draft:
    """Which paragraph is the abstract from?"""
    return retrieve(rng, PLACES, room, "Paragraph {n}: ", "The text tells of a place that {c}.", " and ")
