"""Counting and finding paragraphs: passage_count and passage_retrieval, the latter in any language."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsecache.synthetic import words
from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, fill, mark, parts, share
from sparsecache.synthetic.facts import Relation, World


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


def paragraph(rng: Rng, world: World, used: set[str], room: float) -> tuple[str, list[str], list[str]]:
    """A place, the sentences of a paragraph about it, two facts at least and scenery; and the facts as clauses.

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
    return name, sentences, clauses


def passage_count(rng: Rng, room: float) -> Draft:
    """Numbered paragraphs, some of them twice or more; the answer is how many different ones there are, 2 to 20.

    Further questions ask for those up to an earlier paragraph.
    """
    count = parts(room, 80, 4, 26)
    unique = rng.span(2, min(20, count - 1))
    order = rng.several([*range(unique), *(rng.below(unique) for _ in range(count - unique))], count)
    used: set[str] = set()
    texts: dict[int, str] = {}

    def writer(number: int, which: int) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = f"Paragraph {number}: "
            if which not in texts:
                _, text, _ = paragraph(rng, PLACES, used, tokens - estimate_tokens(head))
                texts[which] = PLACES.blank.join(text)
            return head + texts[which] + "\n\n"

        return write

    written = share(room, [writer(*item) for item in enumerate(order, 1)])
    ends = rng.drawn(range(2, count))
    more = ((f"Count only paragraphs 1 to {end}.", str(len(set(order[:end])))) for end in ends)
    return Draft("".join(written).rstrip("\n"), "", [str(unique)], more=more)


@dataclass(frozen=True)
class Wording:
    """How paragraphs are headed and asked for: `{n}` is a number, `{e}` a place, `{c}` what is said of it."""

    heading: str
    named: str
    unnamed: str
    conjunction: str
    reminder: str


ENGLISH = Wording(
    "Paragraph {n}: ", "{e} {c}.", "The text tells of a place that {c}.", " and ", "This is still part of {heading}."
)


def retrieve(rng: Rng, world: World, wording: Wording, room: float, repeats: float) -> Draft:
    """Up to 30 headed paragraphs, and an abstract of two facts of one of them, in other words.

    Half of the abstracts name the place. The answer is the heading without its colon. A third of the further
    abstracts are quotations. With chance `repeats`, a sentence is followed by a reminder of its heading.
    """
    count = parts(room - 30, 33, 3, 30)
    used: set[str] = set()
    abstracts: list[Question] = []
    quotations: list[Question] = []

    def writer(index: int) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = wording.heading.format(n=index + 1)
            heading = head.rstrip(":： ")
            place, sentences, clauses = paragraph(rng, world, used, tokens - estimate_tokens(head))
            said = wording.conjunction.join(rng.several(clauses, 2))
            abstract = (wording.named if rng.chance(0.5) else wording.unnamed).format(e=place, c=said)
            abstracts.append((abstract[0].upper() + abstract[1:], heading))
            start = rng.below(len(sentences) - 1)
            quotations.append((world.blank.join(sentences[start : start + 2]), heading))
            reminder = wording.reminder.format(heading=mark(heading))
            text = [part for each in sentences for part in ((each, reminder) if rng.chance(repeats) else (each,))]
            return head + world.blank.join(text) + "\n\n"

        return write

    context = "".join(share(room - 30, [writer(index) for index in range(count)])).rstrip("\n")
    asked, *others = rng.several(range(count), count)
    more = (rng.pick((abstracts, abstracts, quotations))[other] for other in others)
    summary, answer = abstracts[asked]
    return Draft(context, summary, [answer], more=more)


def passage_retrieval_en(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """Which paragraph is the abstract from?"""
    return retrieve(rng, PLACES, ENGLISH, room, repeats)
