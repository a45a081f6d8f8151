"""The English few-shot sets of the sample: trec, triviaqa and samsum."""

from collections.abc import Callable

from sparsecache.demo import words
from sparsecache.demo.build import Draft, Rng, estimate_tokens, fill, paragraphs, parts, share
from sparsecache.demo.english import PEOPLE
from sparsecache.demo.facts import make_fact, surround

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


def _ask(rng: Rng, label: str) -> str:
    question = rng.pick(_CLASSES[label]).format(
        p=words.person(rng), c=words.town(rng), t=words.thing(rng), n=rng.pick(words.NOUNS), f=words.dish(rng)
    )
    return f"Question: {question}\nType:"


def trec(rng: Rng, room: float) -> Draft:
    """Questions with their type; the asked type is among the examples."""
    label = rng.pick(list(_CLASSES))
    query = _ask(rng, label)
    sure = f"{_ask(rng, label)} {label}"

    def shot() -> str:
        other = rng.pick(list(_CLASSES))
        return f"{_ask(rng, other)} {other}"

    shots = fill(room - estimate_tokens(query + sure), shot)
    rng.insert(shots, sure)
    return Draft("\n".join(shots), query, [label], list(_CLASSES))


def _quiz(rng: Rng, room: float) -> tuple[str, str]:
    """A passage with its question up to `Answer:`, and the answer."""
    fact = make_fact(rng, PEOPLE)
    question = fact.relation.asks.format(e=fact.entity)
    frame = "Passage:\n{}\nQuestion:\n" + question + "\nAnswer:\n"
    sentences = surround(rng, PEOPLE, fact, room - estimate_tokens(frame + fact.value))
    return frame.format(paragraphs(rng, sentences, " ")), fact.value


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


def _dialogue(rng: Rng, style: str, room: float) -> tuple[str, str]:
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

    frame = "Dialogue: {}\nSummary: "
    for line in fill(room - estimate_tokens(frame + "\r\n".join(lines) + summary), chat):
        # Small talk goes around the plan or between its lines, never before the greeting.
        lines.insert(rng.span(1, len(lines)), line)
    return frame.format("\r\n".join(lines)), summary


def samsum(rng: Rng, room: float) -> Draft:
    """Dialogues with summaries of one style; the last one's summary is wanted."""
    style = rng.pick(_SUMMARIES)
    return _shots(rng, room, lambda rng, tokens: _dialogue(rng, style, tokens), parts(room, 110, 2, 400))


def _shots(rng: Rng, room: float, make: Callable[[Rng, float], tuple[str, str]], count: int) -> Draft:
    """`count` pairs of text and answer that fill the room; one of them is the row's input and answer."""
    answers: list[str] = []

    def query(tokens: float) -> str:
        text, answer = make(rng, tokens)
        answers.append(answer)
        return text

    def shot(tokens: float) -> str:
        return "".join(make(rng, tokens)) + "\n"

    asked, *shots = share(room, [query, *[shot] * (count - 1)])
    return Draft("".join(shots), asked, answers)
