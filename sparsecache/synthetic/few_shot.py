"""Generators of the English few-shot datasets trec, triviaqa and samsum.

One newline separates the examples and two precede the last one, which shows a model where the answer ends.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from sparsecache.synthetic import words
from sparsecache.synthetic.draft import Draft, QAPair, Rng, estimate_tokens, fill, mark, num_parts, write_parts
from sparsecache.synthetic.english import PEOPLE
from sparsecache.synthetic.facts import single_fact_draft

T = TypeVar("T")


class Shot(NamedTuple):
    """A few-shot example: its text up to the answer, and the answer."""

    text: str
    answer: str

    def __str__(self) -> str:
        return f"{self.text} {self.answer}"


# No label contains another one: the classification metric searches for labels in the prediction.
CLASSES = {
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


def draw_labels(rng: Rng, kinds: Iterable[str]) -> dict[str, str]:
    """Draw at least six of the class names `kinds`, each with its label in the examples.

    In half of the rows the labels are the class names; in the other half they are permuted, so that only the examples
    tell which label a class has. Labels always come from `kinds`, the class list by which all rows are scored.
    """
    kinds = list(kinds)
    chosen = rng.sample(kinds, rng.randint(6, len(kinds)))
    return dict(zip(chosen, chosen if rng.chance(0.5) else rng.sample(kinds, len(chosen)), strict=True))


def append_labels(texts: Iterable[str], labels: Iterable[str]) -> list[str]:
    """Append its label to each text. A label that occurred before is marked."""
    seen: set[str] = set()
    shown = []
    for text, label in zip(texts, labels, strict=True):
        shown.append(text + (mark(label) if label in seen else label))
        seen.add(label)
    return shown


def endless_questions(rng: Rng, make: Callable[[T], QAPair], items: Sequence[T]) -> Iterator[QAPair]:
    """Yield questions about random items, forever."""
    while True:
        yield make(rng.choice(items))


def _classification(rng: Rng, kind: str, label: str) -> Shot:
    question = rng.choice(CLASSES[kind]).format(
        p=words.person(rng), c=words.town(rng), t=words.thing(rng), n=rng.choice(words.NOUNS), f=words.dish(rng)
    )
    return Shot(f"Question: {question}\nType:", label)


def trec(rng: Rng, tokens: float) -> Draft:
    """Return labelled questions, and one to classify.

    At least one example has the label asked for.
    """
    labels = draw_labels(rng, CLASSES)
    kinds = list(labels.items())
    asked = rng.choice(kinds)
    query, same_label = _classification(rng, *asked), _classification(rng, *asked)
    tokens -= estimate_tokens(query.text + str(same_label))
    shots = fill(tokens, lambda: _classification(rng, *rng.choice(kinds)))
    rng.insert(shots, same_label)
    shown = append_labels([shot.text + " " for shot in shots], [shot.answer for shot in shots])
    seen = {shot.answer for shot in shots}
    answerable = [kind for kind in kinds if kind[1] in seen]
    follow_ups = endless_questions(rng, lambda kind: _classification(rng, *kind), answerable)
    return Draft("\n".join(shown) + "\n", query.text, [query.answer], list(CLASSES), follow_ups)


def _reading(rng: Rng, tokens: float) -> Shot:
    """Return a passage with a question up to `Answer:`, and the answer."""
    tokens -= estimate_tokens("Passage:\n\nQuestion:\n\nAnswer: and all it takes")  # the frame and a typical answer
    draft = single_fact_draft(rng, PEOPLE, tokens)
    return Shot(f"Passage:\n{draft.context}\nQuestion:\n{draft.input}\nAnswer:", draft.answers[0])


def triviaqa(rng: Rng, tokens: float) -> Draft:
    """Return passages with questions and answers; the last answer is missing."""
    return _few_shot_draft(rng, tokens, _reading, num_parts(tokens, 400, 3, 24))


_SUMMARIES = (
    "{x} and {y} will meet at the {p} on {d} at {t} to {a}.",
    "On {d} at {t}, {x} and {y} will {a} at the {p}.",
    "{x} wants to {a} with {y}. They agree on {d} at {t} at the {p}.",
)
_PLANS = ("repair a {t}", "cook {f}", "visit {c}", "read {w}", "practise the {i}", "sell the {t}")
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_SMALL_TALK = (
    "did you see the {t}?",
    "I still have your {t}",
    "the {t} is gone again",
    "lol",
    "how is {q}?",
    "fine",
    "not yet",
)


def _dialogue(rng: Rng, style: str, tokens: float) -> Shot:
    """Return a dialogue up to `Summary:`, and its summary in the given style."""
    x, y = rng.sample(words.GIVEN, 2)
    plan = rng.choice(_PLANS).format(
        t=words.thing(rng), f=words.dish(rng), c=words.town(rng), w=words.title(rng), i=words.instrument(rng)
    )
    days, place = rng.sample(_DAYS, 2), words.thing(rng)
    time = f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}"
    lines = [
        f"{x}: hi {y}, do you want to {plan} with me?",
        f"{y}: sure, on {days[1]}?",
        f"{x}: I am busy then, {days[0]} would be better. At {time}?",
        f"{y}: ok! Where?",
        f"{x}: at the {place}",
    ]
    summary = style.format(x=x, y=y, a=plan, d=days[0], t=time, p=place)

    def small_talk() -> str:
        line = rng.choice(_SMALL_TALK).format(t=words.thing(rng), q=rng.choice(words.GIVEN))
        return f"{rng.choice((x, y))}: {line}"

    frame = "Dialogue: {}\nSummary:"
    for line in fill(tokens - estimate_tokens(frame + "\r\n".join(lines) + summary), small_talk):
        lines.insert(rng.randint(1, len(lines)), line)  # never before the greeting
    return Shot(frame.format("\r\n".join(lines)), summary)


def samsum(rng: Rng, tokens: float) -> Draft:
    """Return dialogues with summaries of one style; the last summary is missing."""
    style = rng.choice(_SUMMARIES)
    count = num_parts(tokens, 110, 2, 400)
    return _few_shot_draft(rng, tokens, lambda rng, tokens: _dialogue(rng, style, tokens), count)


def _few_shot_draft(rng: Rng, tokens: float, make: Callable[[Rng, float], Shot], count: int) -> Draft:
    """Return `count` examples of about `tokens` tokens in all; one becomes the row's question."""
    shots: list[Shot] = []

    def text(tokens: float) -> str:
        shots.append(make(rng, tokens - 1))
        return str(shots[-1])

    write_parts(tokens, [text] * count)
    asked, first, *others = shots
    shown = [str(first), *(f"{shot.text} {mark(shot.answer)}" for shot in others)]
    follow_ups = endless_questions(rng, lambda size: make(rng, size), [tokens / count])
    return Draft("\n".join(shown), asked.text, [asked.answer], follow_ups=follow_ups)
