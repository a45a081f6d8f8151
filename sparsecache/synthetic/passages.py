"""Generators of passage_count and passage_retrieval; retrieval works in any language."""

from collections.abc import Callable
from dataclasses import dataclass

from sparsecache.synthetic import words
from sparsecache.synthetic.draft import Draft, QAPair, Rng, estimate_tokens, fill, mark, num_parts, write_parts
from sparsecache.synthetic.facts import Relation, World


def _place(rng: Rng) -> str:
    kind = rng.choice(("Museum", "School", "Theatre", "Lighthouse", "Market", "Brewery", "Hospital", "Garden"))
    return f"the {words.title_words(rng)} {kind}"


PLACES = World(
    _place,
    (
        Relation(words.year, ("{e} was founded in {v}.", "Work on {e} began in {v}."), clause="dates from {v}"),
        Relation(words.person, ("{e} was designed by {v}.",), clause="goes back to the plans of {v}"),
        Relation(words.town, ("{e} stands in {v}.",), clause="can be found in {v}"),
        Relation(words.number, ("About {v} people visit {e} every year.",), clause="has {v} guests a year"),
        Relation(words.thing, ("{e} has a {v} above its door.",), clause="is known by a {v} at its door"),
        Relation(words.company, ("{e} is run by {v}.",), clause="belongs to {v}"),
        Relation(words.dish, ("{e} offers its guests {v}.",), clause="serves {v}"),
    ),
    words.filler,
    pronoun="it",
)


def paragraph(rng: Rng, world: World, used: set[str], tokens: float) -> tuple[str, list[str], list[str]]:
    """Return a place, the sentences of a paragraph about it, and its facts as clauses.

    The paragraph states at least two facts; the rest is filler. Names and values are not in `used` and are added to
    it, so that no fact belongs to two paragraphs.
    """
    name = rng.unique(world.make_entity, used)
    sentences: list[str] = []
    clauses: list[str] = []
    for relation in rng.sample(world.relations, 4):
        if len(clauses) >= 2 and tokens < 25:
            break
        value = rng.unique(relation.make_value, used)
        subject = world.pronoun if sentences else name
        sentence = relation.state(rng, subject, value)
        sentences.append(sentence[0].upper() + sentence[1:])
        clauses.append(relation.clause.format(v=value))
        tokens -= estimate_tokens(sentence + world.separator)
    for sentence in fill(tokens, lambda: world.make_filler(rng)):
        sentences.insert(rng.randint(1, len(sentences)), sentence)
    return name, sentences, clauses


def passage_count(rng: Rng, tokens: float) -> Draft:
    """Return numbered paragraphs, some repeated; the answer counts the distinct ones, 2 to 20.

    Follow-up questions count the distinct paragraphs up to an earlier one.
    """
    count = num_parts(tokens, 80, 4, 26)
    unique = rng.randint(2, min(20, count - 1))
    order = rng.sample([*range(unique), *(rng.randbelow(unique) for _ in range(count - unique))], count)
    used: set[str] = set()
    texts: dict[int, str] = {}

    def paragraph_writer(number: int, which: int) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = f"Paragraph {number}: "
            if which not in texts:
                _, text, _ = paragraph(rng, PLACES, used, tokens - estimate_tokens(head))
                texts[which] = PLACES.separator.join(text)
            return head + texts[which] + "\n\n"

        return write

    written = write_parts(tokens, [paragraph_writer(*item) for item in enumerate(order, 1)])
    ends = rng.shuffled(range(2, count))
    follow_ups = ((f"Count only paragraphs 1 to {end}.", str(len(set(order[:end])))) for end in ends)
    return Draft("".join(written).rstrip("\n"), "", [str(unique)], follow_ups=follow_ups)


@dataclass(frozen=True)
class Wording:
    """Templates of one language: `{n}` is a number, `{e}` a place, `{c}` the clauses about it."""

    heading: str
    named: str
    unnamed: str
    conjunction: str
    reminder: str


ENGLISH = Wording(
    "Paragraph {n}: ", "{e} {c}.", "The text tells of a place that {c}.", " and ", "This is still part of {heading}."
)


def retrieval_draft(rng: Rng, world: World, wording: Wording, tokens: float, repeat_prob: float) -> Draft:
    """Return up to 30 numbered paragraphs, and an abstract of two facts of one of them.

    Half of the abstracts name the place. The answer is the heading without its colon. A third of the follow-up
    questions quote two sentences instead. With probability `repeat_prob`, the heading is repeated after a sentence.
    """
    count = num_parts(tokens - 30, 33, 3, 30)
    used: set[str] = set()
    abstracts: list[QAPair] = []
    quotations: list[QAPair] = []

    def paragraph_writer(index: int) -> Callable[[float], str]:
        def write(tokens: float) -> str:
            head = wording.heading.format(n=index + 1)
            heading = head.rstrip(":： ")
            place, sentences, clauses = paragraph(rng, world, used, tokens - estimate_tokens(head))
            said = wording.conjunction.join(rng.sample(clauses, 2))
            abstract = (wording.named if rng.chance(0.5) else wording.unnamed).format(e=place, c=said)
            abstracts.append((abstract[0].upper() + abstract[1:], heading))
            start = rng.randbelow(len(sentences) - 1)
            quotations.append((world.separator.join(sentences[start : start + 2]), heading))
            reminder = wording.reminder.format(heading=mark(heading))
            text = [part for each in sentences for part in ((each, reminder) if rng.chance(repeat_prob) else (each,))]
            return head + world.separator.join(text) + "\n\n"

        return write

    context = "".join(write_parts(tokens - 30, [paragraph_writer(index) for index in range(count)])).rstrip("\n")
    asked, *others = rng.sample(range(count), count)
    follow_ups = (rng.choice((abstracts, abstracts, quotations))[other] for other in others)
    summary, answer = abstracts[asked]
    return Draft(context, summary, [answer], follow_ups=follow_ups)


def passage_retrieval_en(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return numbered paragraphs; the answer is the paragraph that the abstract summarizes."""
    return retrieval_draft(rng, PLACES, ENGLISH, tokens, repeat_prob)
