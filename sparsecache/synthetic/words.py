"""English names and values, combined from word lists."""

from sparsecache.synthetic.draft import Rng

GIVEN = """
    Ada Agnes Albin Alma Anselm Arvid Beatrix Benno Bruno Cecily Clara Cosmo Dagmar Delia Edgar
    Edith Elias Elsa Emil Felix Flora Freya Gideon Greta Hanno Hedda Henrik Hugo Ida Ines Irma Ivo
    Jasper Joel Judith Karin Klaus Laszlo Leda Leon Lotte Lucas Magda Marius Mina Nadia Nils Nora
    Oskar Otto Paula Pavel Petra Quentin Ralph Regina Rhoda Roman Rosa Ruben Selma Silas Sonia
    Stellan Tessa Theo Tilda Ulrich Ursula Vera Viktor Wanda Zeno
""".split()
_SURNAME = (
    """
        Bar Bel Cal Cor Dan Dor El Fal Fen Gar Gil Hal Hol Jor Kel Kor Lan Lor Mar Mel Nor Or Pel
        Pol Quin Ros Sal Sel Tam Tor Ul Ven Wal Wen Yar Zel
    """.split(),
    "a be da fi go ke li mi no ra so ti va".split(),
    "ck dell dric fax gan hurst lin lock mont nard ner rick shaw stad thorn ton ver wick worth zak".split(),
)
_TOWN = (
    """
        Alder Ash Birch Black Bram Brock Cold Crane Dun East Elm Fair Fern Glen Gold Grim Hart Haw
        Hazel Heath Iron Kings Lang Leather Maple Mill Moss North Oak Otter Pike Quill Raven Red
        Rook Salt Silver Stone Swan Thorn West Whit Wild Wind Wolf Yew
    """.split(),
    """
        bank bourne bridge brook burn bury cliffe combe cross dale den don field ford gate ham haven
        hill holm hurst ley market mere minster mouth ness port stead stow ton vale wall well wick
        wood worth
    """.split(),
)
ADJECTIVES = """
    bright broken bronze calm cedar copper crimson curious distant double faded frozen gentle gilded
    golden granite green hidden hollow humble jaded late little lonely lost lucky marble misty
    narrow northern painted pale patient plain proud quiet restless round rusty scarlet second
    secret silent silver simple slate sleepy small solemn southern striped sunken tall tidy velvet
    western wild winding
""".split()
NOUNS = """
    anchor arch arrow barrel basket beacon bell boat bottle bridge bucket button candle carpet chain
    chestnut clock cloud column compass crown curtain door drum eagle engine falcon feather fence
    field fountain fox garden gate glove hammer harbour harp heron hinge horn island kettle key kite
    ladder lamp lantern lever lion loom map meadow mirror needle oak orchard otter owl palace pebble
    pine plough quarry raven ribbon ridge river robin rope saddle sail shell shield spoon stable
    star stove stream swan table tailor temple thistle thread tiger tower tunnel valley vase violin
    wagon watch wheel whistle willow window wolf
""".split()
_CRAFTS = """
    boat bread bridge clock cloth coin copper fish forest glass grain harbour horse lamp leather
    letter map paper rail river road salt silk stone tea timber water wine wool
""".split()
_TRADES = "buyer carrier clerk dealer guard keeper lawyer maker painter planner porter teacher trader".split()
_FIRMS = """
    Bakery Bank Brewery Foundry Insurance Laboratory Library Mills Motors Museum Press Railways
    Theatre Works
""".split()
_INSTRUMENTS = """
    accordion bagpipe banjo bassoon cello clarinet fiddle flute harp horn lute oboe organ piano
    zither
""".split()
_COOKED = "baked boiled braised cold fried grilled pickled roasted salted smoked spiced stuffed sweet".split()
_PLANTS = """
    almond barley cabbage carrot cherry chestnut ginger leek lentil mushroom onion plum pumpkin
    turnip
""".split()
_DISHES = "cake dumplings noodles pancakes pie porridge pudding rolls salad soup stew tart".split()
_ANIMALS = """
    badger cat donkey duck ferret goat goose hamster hound lizard llama parrot pigeon pony rabbit
    tortoise
""".split()
_PRIZES = "Award Cup Medal Prize Ribbon Trophy".split()
MONTHS = "January February March April May June July August September October November December".split()


def person(rng: Rng) -> str:
    """Return one of about 700,000 names: `Hedda Kormiwick`."""
    return rng.choice(GIVEN) + " " + "".join(rng.choice(part) for part in _SURNAME)


def town(rng: Rng) -> str:
    """Return one of about 8,000 town names."""
    name = "".join(rng.choice(part) for part in _TOWN)
    return rng.choice(("Upper ", "Port ", "New ", "Great ")) + name if rng.chance(0.3) else name


def year(rng: Rng) -> str:
    return str(rng.randint(1500, 2019))


def date(rng: Rng) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {year(rng)}"


def number(rng: Rng) -> str:
    return f"{rng.randint(1, 98)},{rng.randint(100, 999)}"


def occupation(rng: Rng) -> str:
    return f"{rng.choice(_CRAFTS)} {rng.choice(_TRADES)}"


def thing(rng: Rng) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def title_words(rng: Rng) -> str:
    """Return two capitalized words: `Silent Otter`."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}".title()


def title(rng: Rng) -> str:
    """Return the title of a book, film or song."""
    return rng.choice(("The {t}", "{t}", "The {t} of {c}", "A {t} in {c}")).format(t=title_words(rng), c=town(rng))


def company(rng: Rng) -> str:
    return f"{title_words(rng)} {rng.choice(_FIRMS)}"


def instrument(rng: Rng) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(_INSTRUMENTS)}"


def dish(rng: Rng) -> str:
    return f"{rng.choice(_COOKED)} {rng.choice(_PLANTS)} {rng.choice(_DISHES)}"


def animal(rng: Rng) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(_ANIMALS)}"


def prize(rng: Rng) -> str:
    return f"{title_words(rng)} {rng.choice(_PRIZES)}"


_FILLER = (
    "A {t} hung above the {n} for many years.",
    "Visitors still ask about the {t} by the {n}.",
    "In {m} the road past the {n} is closed to carts.",
    "Nobody could say why the {n} was so {a}.",
    "The {t} has been repaired more than once since then.",
    "On clear days one can see the {n} from the {t}.",
    "Most of the old papers about the {n} were lost in a flood.",
    "Rain fell on the {n} until the end of {m}.",
    "It was said that the {t} brought luck to travellers.",
    "A path leads from the {n} down to the {t}.",
    "The rest of the day passed as quietly as any other in {m}.",
    "Behind the {n} stood a {t} that few people noticed.",
)


def filler(rng: Rng) -> str:
    """Return a sentence that states no fact."""
    return rng.choice(_FILLER).format(t=thing(rng), n=rng.choice(NOUNS), a=rng.choice(ADJECTIVES), m=rng.choice(MONTHS))
