"""The English questions: narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa and musique."""

from sparsecache.demo import words
from sparsecache.demo.build import Draft, Rng, estimate_tokens, paragraphs
from sparsecache.demo.facts import Fact, Link, Relation, World, article, hops, make_fact, surround

_LIVES = (
    Relation(
        words.year,
        ("{e} was born in {v}.", "The birth of {e} was entered in the year {v}."),
        "In which year was {e} born?",
    ),
    Relation(
        words.town,
        ("{e} grew up in {v}.", "The childhood of {e} was spent in {v}."),
        "In which town did {e} grow up?",
    ),
    Relation(
        words.trade,
        ("{e} earns a living as a {v}.", "For a living {e} works as a {v}."),
        "What does {e} do for a living?",
    ),
    Relation(
        words.company,
        ("{e} is employed by {v}.", "Since last spring {e} has been employed by {v}."),
        "Which company employs {e}?",
    ),
    Relation(
        words.instrument,
        ("{e} plays the {v}.", "In the evenings {e} plays the {v}."),
        "Which instrument does {e} play?",
    ),
    Relation(
        words.dish,
        ("{e} likes {v} best.", "The favourite dish of {e} is {v}."),
        "What is the favourite dish of {e}?",
    ),
    Relation(words.pet, ("{e} keeps a {v}.", "At home {e} looks after a {v}."), "Which animal does {e} keep?"),
    Relation(
        words.work,
        ("{e} is the author of the book {v}.", "The book {v} was written by {e}."),
        "What is the title of the book by {e}?",
    ),
    Relation(
        words.prize,
        ("{e} was honoured with the {v}.", "The jury gave {e} the {v}."),
        "Which honour was given to {e}?",
    ),
    Relation(
        words.date,
        ("{e} moved house on {v}.", "The move of {e} took place on {v}."),
        "On which day did {e} move house?",
    ),
)
_LINKS = (
    Link("the mentor of {e}", ("{e} learned everything from a mentor, {v}.", "The mentor of {e} is {v}.")),
    Link("the neighbour of {e}", ("{e} lives next door to a neighbour, {v}.", "The neighbour of {e} is {v}.")),
    Link(
        "the business partner of {e}",
        ("{e} trades with a business partner, {v}.", "The business partner of {e} is {v}."),
    ),
    Link("the rival of {e}", ("{e} has a rival, {v}.", "The rival of {e} is {v}.")),
    Link("the landlord of {e}", ("{e} rents a room from the landlord {v}.", "The landlord of {e} is {v}.")),
)
_MAKERS = (
    Link(
        "the director of the film {e}",
        ("{e} is a film directed by {v}.", "{e} is a film. Its director was {v}."),
        words.work,
    ),
    Link(
        "the composer of the song {e}",
        ("{e} is a song composed by {v}.", "{e} is a song. Its composer was {v}."),
        words.work,
    ),
    Link(
        "the translator of the novel {e}",
        ("{e} is a novel translated by {v}.", "{e} is a novel. Its translator was {v}."),
        words.work,
    ),
)
_STORY = (
    Relation(
        words.thing,
        (
            "Before dawn {e} took the {v} out of the chest.",
            "{e} carried the {v} out of the chest and told nobody.",
        ),
        "What did {e} take out of the chest?",
    ),
    Relation(
        words.town,
        ("That night {e} fled to {v}.", "{e} packed a bag and fled to {v}."),
        "To which town did {e} flee?",
    ),
    Relation(
        words.person,
        ("On the bridge {e} met {v} for the first time.", "{e} first met {v} on the bridge."),
        "Whom did {e} meet on the bridge?",
    ),
    Relation(
        words.dish,
        ("{e} asked the cook for {v}.", "Tired and hungry, {e} asked for {v}."),
        "Which dish did {e} ask for?",
    ),
    Relation(
        words.pet,
        ("All winter {e} was afraid of the {v}.", "{e} never lost the fear of the {v}."),
        "Which animal was {e} afraid of?",
    ),
    Relation(
        words.trade,
        ("{e} went about disguised as a {v}.", "No one knew {e}, who was disguised as a {v}."),
        "As what was {e} disguised?",
    ),
    Relation(
        words.thing,
        ("{e} hid the letter behind the {v}.", "The letter of {e} lay hidden behind the {v}."),
        "Behind what did {e} hide the letter?",
    ),
    Relation(
        words.instrument,
        ("In the tavern {e} lost a wager and the {v}.", "{e} sold the {v} to pay the innkeeper."),
        "Which instrument did {e} give away?",
    ),
)


def _system(rng: Rng) -> str:
    """The name of a made-up method: `Kormiwick-3`."""
    return words.person(rng).split()[1] + "-" + str(rng.span(1, 9))


def _corpus(rng: Rng) -> str:
    return "the " + words.titled(rng) + " corpus"


def _score(rng: Rng) -> str:
    return f"{rng.span(30, 98)}.{rng.span(10, 99)}"


_PAPER = (
    Relation(
        _corpus,
        ("{e} is trained on {v}.", "As training data for {e} we use {v}."),
        "On which corpus is {e} trained?",
        "Is {e} trained on {v}?",
    ),
    Relation(
        _corpus,
        ("{e} is evaluated on {v}.", "We evaluate {e} on {v}."),
        "On which corpus is {e} evaluated?",
        "Is {e} evaluated on {v}?",
    ),
    Relation(
        _score,
        ("{e} reaches an F1 score of {v}.", "With {e} we obtain an F1 score of {v}."),
        "What F1 score does {e} reach?",
        "Does {e} reach an F1 score of {v}?",
    ),
    Relation(
        words.number,
        ("The labels for {e} were checked by {v} annotators.", "{v} annotators checked the labels for {e}."),
        "How many annotators checked the labels for {e}?",
        "Did {v} annotators check the labels for {e}?",
    ),
    Relation(
        words.person,
        ("{e} extends earlier work by {v}.", "The idea behind {e} goes back to {v}."),
        "Whose work does {e} extend?",
        "Does {e} extend the work of {v}?",
    ),
    Relation(
        words.number,
        ("{e} has a vocabulary of {v} words.", "The vocabulary of {e} holds {v} words."),
        "How many words are in the vocabulary of {e}?",
        "Does the vocabulary of {e} hold {v} words?",
    ),
    Relation(
        words.town,
        ("The recordings for {e} were made in {v}.", "For {e} speakers were recorded in {v}."),
        "Where were the recordings for {e} made?",
        "Were the recordings for {e} made in {v}?",
    ),
)
_REMARKS = (
    "The error analysis in the appendix covers the {t} subset.",
    "We leave a study of the {n} feature to future work.",
    "All differences on the {t} task are significant.",
    "The {n} layer is shared between encoder and decoder.",
    "Following common practice, the {t} examples are removed.",
    "Removing the {n} module hurts only slightly.",
    "Figure {d} shows the effect of the {n} penalty.",
    "Results vary little between runs with {d} different seeds.",
    "Table {d} lists the settings for the {t} baseline.",
)


def _remark(rng: Rng) -> str:
    return rng.pick(_REMARKS).format(t=words.thing(rng), n=rng.pick(words.NOUNS), d=rng.span(2, 30))


PEOPLE = World(words.person, _LIVES, words.scenery, links=_LINKS)
WORKS = World(words.person, _LIVES, words.scenery, links=_MAKERS)
STORY = World(words.person, _STORY, words.scenery)
PAPER = World(_system, _PAPER, _remark)


def narrativeqa(rng: Rng, room: float) -> Draft:
    """A story in which many people do much the same, and a question about one of them."""
    return article(rng, STORY, room)


def multifieldqa_en(rng: Rng, room: float) -> Draft:
    """A chronicle of many lives, and a question about one of them."""
    return article(rng, PEOPLE, room)


def qasper(rng: Rng, room: float) -> Draft:
    """A paper on many systems; one question in five is yes or no, one in five cannot be answered."""
    fact = make_fact(rng, PAPER)
    kind = rng.pick(("value", "value", "value", "confirm", "unanswerable"))
    question, answer = fact.relation.asks.format(e=fact.entity), fact.value
    if kind == "confirm":
        question, answer = _confirm(rng, fact)
    elif kind == "unanswerable":
        answer = "unanswerable"
    sentences = surround(rng, PAPER, fact, room - estimate_tokens(question), stated=kind != "unanswerable")
    return Draft(paragraphs(rng, sentences, " "), question, [answer])


def _confirm(rng: Rng, fact: Fact) -> tuple[str, str]:
    """A yes/no question about a fact, and its answer; both answers are equally likely."""
    yes = rng.chance(0.5)
    value = fact.value if yes else rng.fresh(fact.relation.value, {fact.value})
    return fact.relation.confirms.format(e=fact.entity, v=value), "yes" if yes else "no"


_PASSAGE = "Passage {n}:\n{title}\n"


def hotpotqa(rng: Rng, room: float) -> Draft:
    """Two steps, from a person over another person to a fact."""
    return hops(rng, PEOPLE, room, 2, _PASSAGE)


def two_wiki(rng: Rng, room: float) -> Draft:
    """Two steps, from a film, song or novel over its maker to a fact."""
    return hops(rng, WORKS, room, 2, _PASSAGE)


def musique(rng: Rng, room: float) -> Draft:
    """Three steps, from a person over two others to a fact."""
    return hops(rng, PEOPLE, room, 3, _PASSAGE)
