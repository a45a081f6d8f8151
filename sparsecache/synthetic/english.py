"""The English questions: narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa and musique."""

from collections.abc import Iterator

from sparsecache.synthetic import words
from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, paragraphs
from sparsecache.synthetic.chains import hops
from sparsecache.synthetic.facts import Fact, Link, Relation, Tale, World, article, surround

_LIVES = (
    Relation(
        words.year,
        ("{e} was born in {v}.", "The birth of {e} was entered in the year {v}."),
        "In which year was {e} born?",
        clause="was born in {v}",
    ),
    Relation(
        words.town,
        ("{e} grew up in {v}.", "The childhood of {e} was spent in {v}."),
        "In which town did {e} grow up?",
        clause="grew up in {v}",
    ),
    Relation(
        words.trade,
        ("{e} earns a living as a {v}.", "For a living {e} works as a {v}."),
        "What does {e} do for a living?",
        clause="earns a living as a {v}",
    ),
    Relation(
        words.company,
        ("{e} is employed by {v}.", "Since last spring {e} has been employed by {v}."),
        "Which company employs {e}?",
        clause="is employed by {v}",
    ),
    Relation(
        words.instrument,
        ("{e} plays the {v}.", "In the evenings {e} plays the {v}."),
        "Which instrument does {e} play?",
        clause="plays the {v}",
    ),
    Relation(
        words.dish,
        ("{e} likes {v} best.", "The favourite dish of {e} is {v}."),
        "What is the favourite dish of {e}?",
        clause="likes {v} best",
    ),
    Relation(
        words.pet,
        ("{e} keeps a {v}.", "At home {e} looks after a {v}."),
        "Which animal does {e} keep?",
        clause="keeps a {v}",
    ),
    Relation(
        words.work,
        ("{e} is the author of the book {v}.", "{e} wrote the book {v}."),
        "What is the title of the book by {e}?",
        clause="is the author of the book {v}",
    ),
    Relation(
        words.prize,
        ("{e} was honoured with the {v}.", "The jury gave {e} the {v}."),
        "Which honour was given to {e}?",
        clause="was honoured with the {v}",
    ),
    Relation(
        words.date,
        ("{e} moved house on {v}.", "The move of {e} took place on {v}."),
        "On which day did {e} move house?",
        clause="moved house on {v}",
    ),
)


def _link(noun: str, *says: str) -> Link:
    return Link(words.person, says, f"Who is the {noun} of {{e}}?", that=f"that {noun}")


def _maker(noun: str, work: str, verb: str) -> Link:
    says = (f"{{e}} is a {work} {verb} by {{v}}.", f"The {noun} of the {work} {{e}} is {{v}}.")
    return Link(words.person, says, f"Who is the {noun} of the {work} {{e}}?", that=f"that {noun}", source=words.work)


_LINKS = (
    _link("mentor", "{e} learned everything from a mentor, {v}.", "The mentor of {e} is {v}."),
    _link("neighbour", "{e} lives next door to a neighbour, {v}.", "The neighbour of {e} is {v}."),
    _link("business partner", "{e} trades with a business partner, {v}.", "The business partner of {e} is {v}."),
    _link("rival", "{e} has a rival, {v}.", "The rival of {e} is {v}."),
    _link("landlord", "{e} rents a room from the landlord {v}.", "The landlord of {e} is {v}."),
)
_MAKERS = (
    _maker("director", "film", "directed"),
    _maker("composer", "song", "composed"),
    _maker("translator", "novel", "translated"),
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
        ("The labels for {e} were checked by {v} annotators.", "{e} has labels that were checked by {v} annotators."),
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


def narrativeqa(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """A story in which many people do much the same, and a question about one of them."""
    return article(rng, STORY, room, repeats)


def multifieldqa_en(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """A chronicle of many lives, and a question about one of them."""
    return article(rng, PEOPLE, room, repeats)


_KINDS = ("value", "value", "value", "value", "value", "value", "confirm", "unanswerable")


def qasper(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """A paper on many systems; one question in eight is yes or no, one in eight is about a system not in it."""
    tale = Tale(rng, PAPER)
    kind = rng.pick(_KINDS)
    entity = tale.enter(PAPER.name, ()) if kind == "unanswerable" else tale.newcomer()
    fact = tale.tell(entity, rng.pick(PAPER.relations))
    question, answer = _examine(rng, fact, kind)
    items = surround(tale, fact, room - estimate_tokens(question), stated=kind != "unanswerable")
    text = paragraphs(rng, tale.written(items, repeats), " ")
    return Draft(text, question, [answer], more=_exam(tale, fact))


def _exam(tale: Tale, asked: Fact) -> Iterator[Question]:
    """Questions of every kind about other facts than the asked one."""
    for fact in tale.rng.drawn(tale.told):
        kind = tale.rng.pick(_KINDS)
        if kind == "unanswerable":
            fact = tale.tell(tale.enter(PAPER.name, ()), fact.relation)
        if fact is not asked:
            yield _examine(tale.rng, fact, kind)


def _examine(rng: Rng, fact: Fact, kind: str) -> Question:
    """A question about the fact and its answer; both answers to a yes/no question are equally likely."""
    question, answer = fact.question
    if kind == "unanswerable":
        return question, "unanswerable"
    if kind == "confirm":
        yes = rng.chance(0.5)
        value = answer if yes else rng.fresh(fact.relation.value, {answer})
        return fact.relation.confirms.format(e=fact.entity, v=value), "yes" if yes else "no"
    return question, answer


_PASSAGE = "Passage {n}:\n{title}\n"


def hotpotqa(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """Two steps, from a person over another person to a fact."""
    return hops(rng, PEOPLE, room, 2, _PASSAGE, repeats)


def two_wiki(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """Two steps, from a film, song or novel over its maker to a fact."""
    return hops(rng, WORKS, room, 2, _PASSAGE, repeats)


def musique(rng: Rng, room: float, repeats: float = 0.0) -> Draft:
    """Three steps, from a person over two others to a fact."""
    return hops(rng, PEOPLE, room, 3, _PASSAGE, repeats)
