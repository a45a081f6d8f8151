"""The English few-shot sets of the sample: trec, triviaqa and samsum.

Two line ends before the last example, one between the others, tell that the answer is to end there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from sparsecache.synthetic import words
from sparsecache.synthetic.build import Draft, Question, Rng, estimate_tokens, fill, mark, parts, share
from sparsecache.synthetic.english import PEOPLE
from sparsecache.synthetic.facts import article

T = TypeVar("T")


class Shot(NamedTuple):
    """An example: a text up to where its answer begins, and the answer."""

    text: str
    answer: str

    def __str__(self) -> str:
        return f"{self.text} {self.answer}"


# No label is part of another one: the classification metric looks for labels inside the prediction.
_CLASSES = {
    "Calendar day": ("On what day did {p} leave {c}?", "When did the {t} of {c} fall?"),
    "Person's name": ("Who built the {t} in {c}?", "Who was the first to paint a {t}?"),
    "Settlement": ("Which town lies north of {c}?", "In which town was {p} raised?"),
    "Sum of money": ("How much does a {t} cost in {c}?", "What did {p} pay for the {n}?"),
    "Count of things": ("How many steps lead up to the {n} of {c}?", "How many letters did {p} write?"),
    "Animal kind": ("What beast guards the {t}?", "Which bird nests in the {n} of {c}?"),
    "Meal": ("What is {f} served with?", "What did {p} eat in {c}?"),
    "Colour": ("What colour is the {n} of {c}?", "Which shade has the {t}?"),
    "Cause": ("Why did {p} sell the {n}?", "Why is the {t} in {c} famous?"),
    "Procedure": ("How does one repair a {t}?", "How did {p} reach {c}?"),
    "Sense of a word": ("What is meant by a {t}?", "What does the name {c} mean?"),
    "Length or height": ("How far is {c} from the {n}?", "How tall is the {t} of {c}?"),
    "Firm": ("Which company made the {t}?", "For whom does {p} work?"),
    "Musical tool": ("Which instrument did {p} play?", "What is a {t} tuned with?"),
    "Book title": ("What book did {p} write about {c}?", "In which book is there a {t}?"),
    "Tongue": ("Which language is spoken in {c}?", "In what language did {p} write?"),
    "Plant": ("Which tree grows by the {n} of {c}?", "What flower did {p} plant?"),
    "Game": ("What sport did {p} teach in {c}?", "What is played with a {t}?"),
}


def dealt(rng: Rng, kinds: Iterable[str]) -> dict[str, str]:
    """Some of the kinds (six at least), each with a label: its own name or, half the time, the name of any kind.

    Labels never come from outside `kinds`: a dataset has one class list, by which all of its rows are scored.
    """
    kinds = list(kinds)
    chosen = rng.several(kinds, rng.span(6, len(kinds)))
    return dict(zip(chosen, chosen if rng.chance(0.5) else rng.several(kinds, len(chosen)), strict=True))


def labelled(texts: Iterable[str], labels: Iterable[str]) -> list[str]:
    """Each text with its label after it, which is marked from the second time on."""
    seen: set[str] = set()
    shown = []
    for text, label in zip(texts, labels, strict=True):
        shown.append(text + (mark(label) if label in seen else label))
        seen.add(label)
    return shown


def endless(rng: Rng, make: Callable[[T], Question], items: Sequence[T]) -> Iterator[Question]:
    """Questions made of any of the items, without end."""
    while True:
        yield make(rng.pick(items))


def _typed(rng: Rng, kind: str, label: str) -> Shot:
    question = rng.pick(_CLASSES[kind]).format(
        p=words.person(rng), c=words.town(rng), t=words.thing(rng), n=rng.pick(words.NOUNS), f=words.dish(rng)
    )
    return Shot(f"Question: {question}\nType:", label)


def trec(rng: Rng, room: float) -> Draft:
    """Questions with their type, the asked type among them; half the time only they tell what a type is called."""
    labels = dealt(rng, _CLASSES)
    kinds = list(labels.items())
    asked = rng.pick(kinds)
    query, sure = _typed(rng, *asked), _typed(rng, *asked)
    shots = fill(room - estimate_tokens(query.text + str(sure)), lambda: _typed(rng, *rng.pick(kinds)))
    rng.insert(shots, sure)
    shown = labelled([shot.text + " " for shot in shots], [shot.answer for shot in shots])
    answers = {shot.answer for shot in shots}
    more = endless(rng, lambda kind: _typed(rng, *kind), [kind for kind in kinds if kind[1] in answers])
    return Draft("\n".join(shown) + "\n", query.text, [query.answer], list(_CLASSES), more)


def _quiz(rng: Rng, room: float) -> Shot:
    """A passage with its question up to `Answer:`, and the answer."""
    quiz = article(rng, PEOPLE, room - estimate_tokens("Passage:\n\nQuestion:\n\nAnswer: and all it takes"))
    return Shot(f"Passage:\n{quiz.context}\nQuestion:\n{quiz.input}\nAnswer:", quiz.answers[0])


def triviaqa(rng: Rng, room: float) -> Draft:
    """Passages with a question and its answer; the last one's answer is wanted."""
    return _shots(rng, room, _quiz, parts(room, 400, 3, 24))


_SUMMARIES = (
    "{x} and {y} will meet at the {p} on {d} at {t} to {a}.",
    "On {d} at {t}, {x} and {y} will {a} at the {p}.",
    "{x} wants to {a} with {y}. They agree on {d} at {t} at the {p}.",
)
_PLANS = ("repair a {t}", "cook {f}", "visit {c}", "read {w}", "practise the {i}", "sell the {t}")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_CHAT = (
    "did you see the {t}?",
    "I still have your {t}",
    "the {t} is gone again",
    "lol",
    "how is {q}?",
    "fine",
    "not yet",
)


def _dialogue(rng: Rng, style: str, room: float) -> Shot:
    """A dialogue up to `Summary:`, and its summary in the given style."""
    x, y = rng.several(words.GIVEN, 2)
    plan = rng.pick(_PLANS).format(
        t=words.thing(rng), f=words.dish(rng), c=words.town(rng), w=words.work(rng), i=words.instrument(rng)
    )
    days, place = rng.several(_DAYS, 2), words.thing(rng)
    time = f"{rng.span(1, 12)} {rng.pick(('am', 'pm'))}"
    lines = [
        f"{x}: hi {y}, do you want to {plan} with me?",
        f"{y}: sure, on {days[1]}?",
        f"{x}: I am busy then, {days[0]} would be better. At {time}?",
        f"{y}: ok! Where?",
        f"{x}: at the {place}",
    ]
    summary = style.format(x=x, y=y, a=plan, d=days[0], t=time, p=place)

    def chat() -> str:
        line = rng.pick(_CHAT).format(t=words.thing(rng), q=rng.pick(words.GIVEN))
        return f"{rng.pick((x, y))}: {line}"

    frame = "Dialogue: {}\nSummary:"
    for line in fill(room - estimate_tokens(frame + "\r\n".join(lines) + summary), chat):
        # Small talk goes around the plan or between its lines, never before the greeting.
        lines.insert(rng.span(1, len(lines)), line)
    return Shot(frame.format("\r\n".join(lines)), summary)


def samsum(rng: Rng, room: float) -> Draft:
    """Dialogues with summaries of one style; the last one's summary is wanted."""
    style = rng.pick(_SUMMARIES)
    return _shots(rng, room, lambda rng, tokens: _dialogue(rng, style, tokens), parts(room, 110, 2, 400))


def _shots(rng: Rng, room: float, make: Callable[[Rng, float], Shot], count: int) -> Draft:
    """`count` examples that fill the room; one of them is the row's input and answer, the first shows the format."""
    made: list[Shot] = []

    def text(tokens: float) -> str:
        made.append(make(rng, tokens - 1))
        return str(made[-1])

    share(room, [text] * count)
    asked, first, *others = made
    shown = [str(first), *(f"{shot.text} {mark(shot.answer)}" for shot in others)]
    more = endless(rng, lambda size: make(rng, size), [room / count])
    return Draft("\n".join(shown), asked.text, [asked.answer], more=more)
