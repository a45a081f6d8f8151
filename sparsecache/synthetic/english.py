"""Generators of narrativeqa, qasper, multifieldqa_en, hotpotqa, 2wikimqa and musique."""

from collections.abc import Iterator

from sparsecache.synthetic import words
from sparsecache.synthetic.draft import Draft, QAPair, Rng, estimate_tokens, join_paragraphs
from sparsecache.synthetic.facts import Fact, FactWriter, Link, Relation, World, add_distractors, single_fact_draft
from sparsecache.synthetic.multi_hop import multi_hop_draft

_PERSON_RELATIONS = (
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
        words.occupation,
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
        words.animal,
        ("{e} keeps a {v}.", "At home {e} looks after a {v}."),
        "Which animal does {e} keep?",
        clause="keeps a {v}",
    ),
    Relation(
        words.title,
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


def _link(noun: str, *statements: str) -> Link:
    return Link(words.person, statements, f"Who is the {noun} of {{e}}?", reference=f"that {noun}")


def _creator(noun: str, work: str, verb: str) -> Link:
    statements = (f"{{e}} is a {work} {verb} by {{v}}.", f"The {noun} of the {work} {{e}} is {{v}}.")
    question = f"Who is the {noun} of the {work} {{e}}?"
    return Link(words.person, statements, question, reference=f"that {noun}", make_source=words.title)


_LINKS = (
    _link("mentor", "{e} learned everything from a mentor, {v}.", "The mentor of {e} is {v}."),
    _link("neighbour", "{e} lives next door to a neighbour, {v}.", "The neighbour of {e} is {v}."),
    _link("business partner", "{e} trades with a business partner, {v}.", "The business partner of {e} is {v}."),
    _link("rival", "{e} has a rival, {v}.", "The rival of {e} is {v}."),
    _link("landlord", "{e} rents a room from the landlord {v}.", "The landlord of {e} is {v}."),
)
_CREATORS = (
    _creator("director", "film", "directed"),
    _creator("composer", "song", "composed"),
    _creator("translator", "novel", "translated"),
)
_STORY_RELATIONS = (
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
        words.animal,
        ("All winter {e} was afraid of the {v}.", "{e} never lost the fear of the {v}."),
        "Which animal was {e} afraid of?",
    ),
    Relation(
        words.occupation,
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
    """Return the name of a made-up system: `Kormiwick-3`."""
    return words.person(rng).split()[1] + "-" + str(rng.randint(1, 9))


def _corpus(rng: Rng) -> str:
    return "the " + words.title_words(rng) + " corpus"


def _score(rng: Rng) -> str:
    return f"{rng.randint(30, 98)}.{rng.randint(10, 99)}"


_PAPER_RELATIONS = (
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
    return rng.choice(_REMARKS).format(t=words.thing(rng), n=rng.choice(words.NOUNS), d=rng.randint(2, 30))


PEOPLE = World(words.person, _PERSON_RELATIONS, words.filler, links=_LINKS)
WORKS = World(words.person, _PERSON_RELATIONS, words.filler, links=_CREATORS)
STORY = World(words.person, _STORY_RELATIONS, words.filler)
PAPER = World(_system, _PAPER_RELATIONS, _remark)


def narrativeqa(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return a story about many people, and a question about one of them."""
    return single_fact_draft(rng, STORY, tokens, repeat_prob)


def multifieldqa_en(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return a text about many people, and a question about one of them."""
    return single_fact_draft(rng, PEOPLE, tokens, repeat_prob)


_KINDS = ("value", "value", "value", "value", "value", "value", "yes_no", "unanswerable")


def qasper(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return a paper about many systems.

    One question in eight is yes/no, one in eight is unanswerable.
    """
    writer = FactWriter(rng, PAPER)
    kind = rng.choice(_KINDS)
    entity = writer.add_entity(PAPER.make_entity, ()) if kind == "unanswerable" else writer.new_entity()
    fact = writer.make_fact(entity, rng.choice(PAPER.relations))
    question, answer = _ask_about(rng, fact, kind)
    items = add_distractors(writer, fact, tokens - estimate_tokens(question), stated=kind != "unanswerable")
    text = join_paragraphs(rng, writer.to_sentences(items, repeat_prob), " ")
    return Draft(text, question, [answer], follow_ups=_follow_ups(writer, fact))


def _follow_ups(writer: FactWriter, asked: Fact) -> Iterator[QAPair]:
    """Return questions of every kind about the facts other than `asked`."""
    for fact in writer.rng.shuffled(writer.stated):
        kind = writer.rng.choice(_KINDS)
        if kind == "unanswerable":
            fact = writer.make_fact(writer.add_entity(PAPER.make_entity, ()), fact.relation)
        if fact is not asked:
            yield _ask_about(writer.rng, fact, kind)


def _ask_about(rng: Rng, fact: Fact, kind: str) -> QAPair:
    """Return a question of the given kind about the fact, and its answer.

    `yes` and `no` are equally likely.
    """
    question, answer = fact.qa_pair
    if kind == "unanswerable":
        return question, "unanswerable"
    if kind == "yes_no":
        yes = rng.chance(0.5)
        value = answer if yes else rng.unique(fact.relation.make_value, {answer})
        return fact.relation.confirmation.format(e=fact.entity, v=value), "yes" if yes else "no"
    return question, answer


_PASSAGE = "Passage {n}:\n{title}\n"


def hotpotqa(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return two hops: a person, a linked person, a fact about that person."""
    return multi_hop_draft(rng, PEOPLE, tokens, 2, _PASSAGE, repeat_prob)


def two_wiki(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return two hops: a film, song or novel, its creator, a fact about the creator."""
    return multi_hop_draft(rng, WORKS, tokens, 2, _PASSAGE, repeat_prob)


def musique(rng: Rng, tokens: float, repeat_prob: float = 0.0) -> Draft:
    """Return three hops: a person, two linked people, a fact about the last one."""
    return multi_hop_draft(rng, PEOPLE, tokens, 3, _PASSAGE, repeat_prob)
