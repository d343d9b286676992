"""A tiny English language in which facts (needles) are hidden, asked for and checked.

Spaces separate all words and punctuation marks. Each is one token of the bundled model
(`NEEDLE_MODEL`), so lengths are exact there. Other tokenizers read the text as plain English.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDLE_MODEL: Path = Path(__file__).parents[1] / "assets" / "needle_moe"
"""Folder of the bundled checkpoint, for `from_pretrained`."""

KINDS = ("magic number", "secret word")
REPLY_ROOM = 4
"""Tokens of the bundled model's reply: two for a number, the full stop, end of sequence."""


def _words(text: str) -> list[str]:
    return text.split()


TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
ONES = _words("one two three four five six seven eight nine")
NAMES = _words("""
anna bruno clara david emma felix greta hugo irene jonas karla louis marta nils olga paul quinn
rosa simon tessa ulrich vera walter xenia yannick zoe
""")
ADJECTIVES = _words("""
ancient big black blue bright broken brown calm cheap clean cold curious dark deep dry dusty empty
famous flat fresh gentle golden gray green heavy hidden hollow huge large light little lonely long
loud lovely narrow new noisy odd old pale plain pretty proud quiet rare red rough round rusty sad
shiny short silent silver simple small smooth soft square steep strange strong tall thick thin tiny
warm wet white wide wild wooden yellow young
""")
MOVES = _words("falls glows grows hides moves rests rises shakes shines sinks sleeps turns waits")
STANDS = _words("appears hangs lies remains sits stands stays")
PLACES = _words("above before behind below beside beyond near over past under")
DEEDS = _words("""
bought carried cleaned drew dropped dreamed found fixed held kept likes lost loves made moved needs
noticed painted praised pulled pushed remembers saw sold sees touched used wants watched
""")
NOUNS = _words("""
acorn actor airport album anchor angel ankle apple apron arch arm armor arrow artist atlas attic
autumn axe baby badge bag baker ball balloon bamboo banana band bank banner barn barrel basket bath
battery beach beacon bead beam bean bear beard beaver bed bee bell belt bench berry bicycle bird
biscuit blanket block blossom board boat bone book boot bottle boulder bow bowl box bracelet branch
brass bread brick bridge broom brush bubble bucket buckle bull bus bush butter button cabin cable
cactus cage cake camel camera camp canal candle cannon canoe canvas canyon cap captain car card
carpet carrot cart castle cat cave cedar ceiling cellar chain chair chalk chapel cheese cherry
chess chest chicken chimney church circle circus city clay cliff clock cloth cloud clover clown
coast coat coconut coffee coin collar comb comet compass cook copper coral cork corn cottage cotton
couch cow crab crane crate crayon creek cricket crown crystal cup curtain cushion daisy dam dancer
deer desert desk diamond diary dish doctor dog doll dolphin donkey door dove dragon drawer dress
drum duck eagle ear earth easel echo egg elbow elephant elm emerald engine envelope eraser falcon
fan farm farmer feather fence fern ferry fiddle field fig finger fire fish flag flame flask flower
flute foam fog forest fork fossil fountain fox frame frog fruit garden garlic gate ghost giant
ginger giraffe glacier glass globe glove goat goose grape grass guitar hall hammer hand harbor harp
hat hawk hazel heart hedge helmet hen heron hill honey hook horn horse hotel house ice iron island
ivory ivy jacket jam jar jewel journal judge jug juice jungle kettle key king kitchen kite kitten
knee knife knight knot ladder lady lake lamb lamp lantern leaf leather lemon letter library lily
lime lion lizard lobster lock locket log lotus lute machine magnet mailbox mango map maple marble
market mask mast meadow medal melon mill mint mirror mitten monkey moon moss motor mountain mouse
mug mushroom music nail napkin nest net night noodle notebook nurse nut oak oar oasis ocean olive
onion orange orchard organ otter oven owl oyster paddle page palace palm pan panda paper parcel
park parrot path peach peacock pear pearl pebble pen pencil pepper piano pigeon pillow pilot pine
pipe planet plant plate plum pocket pond pony poppy potato prince prism puppet purse puzzle queen
quilt rabbit radio raft railway rain ranch raven ribbon rice ring river road robin robot rock
rocket roof rope rose ruby rug saddle sail salad salmon salt sand scarf school shell shield ship
shirt shoe shop shore shovel silk singer skate sled snail snow soap sofa soldier soup spider spoon
spring stable stair star statue stone stool stork stove straw stream street sugar sun swan sword
table tailor tea teacher temple tent theater thread throne thunder tiger tile toast tomato tool
torch tower toy train tree trumpet trunk tulip tunnel turkey turtle umbrella valley vase velvet
village vine violet violin wagon wall walnut watch water wave wax well whale wheat wheel whistle
willow wind window wing winter wolf wool yacht yard zebra
""")

_SLOTS = {
    "name": NAMES,
    "adjective": ADJECTIVES,
    "moves": MOVES,
    "stands": STANDS,
    "place": PLACES,
    "did": DEEDS,
    "noun": NOUNS,
    "ten": TENS,
    "one": ONES,
}
# Templates of every length from 4 to 9 exist, so sentences fill any room of 4 words or more.
_TEMPLATES = [
    template.split()
    for template in (
        "the noun moves .",
        "the adjective noun moves .",
        "name did the noun .",
        "name did the adjective noun .",
        "the noun stands place the noun .",
        "the adjective noun stands place the noun .",
        "the adjective noun stands place the adjective noun .",
        "name and name met place the adjective noun .",
        "name counted ten one stars place the noun .",  # a distractor: nobody asks for it
    )
]
_TEMPLATE_WEIGHTS = [12.0] * 8 + [4.0]
_SHORTEST = min(map(len, _TEMPLATES))


def vocabulary() -> list[str]:
    """Return all words of the language, in a fixed order and without repetition."""
    plain = _words(". ; ? the and met counted stars what is for") + _words(" ".join(KINDS))
    return list(dict.fromkeys(plain + [word for words in _SLOTS.values() for word in words]))


@dataclass(frozen=True)
class Needle:
    """One fact: the `kind` ("magic number" or "secret word") of `key` is `value`."""

    kind: str
    key: str
    value: str

    @property
    def statement(self) -> str:
        return f"the {self.kind} for {self.key} is {self.value} ."

    @property
    def question(self) -> str:
        """The question and the start of its answer, which the value completes."""
        return f"what is the {self.kind} for {self.key} ? the {self.kind} for {self.key} is"


@dataclass(frozen=True)
class Haystack:
    """A text and questions about it; `answers[i]` continues `prompt(i)`."""

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def prompt(self, index: int = 0) -> str:
        return f"{self.text} {self.questions[index]}"

    def is_exact(self, generated: str, index: int = 0) -> bool:
        """Return True if the newly generated text, without its prompt, starts with the answer."""
        return is_exact(generated, self.answers[index])


def is_exact(generated: str, answer: str) -> bool:
    """Return True if `generated` starts with the words of `answer`; ignore case, punctuation."""
    expected = answer.split()
    return re.findall(r"\w+", generated.lower())[: len(expected)] == expected


def draw_number(rng: random.Random) -> str:
    return f"{rng.choice(TENS)} {rng.choice(ONES)}"


def draw_needles(rng: random.Random, count: int, kinds: Sequence[str] = KINDS) -> list[Needle]:
    """Return `count` random needles with different keys."""
    needles = []
    for key in rng.sample(NOUNS, count):
        kind = rng.choice(kinds)
        value = draw_number(rng) if kind == "magic number" else rng.choice(NOUNS)
        needles.append(Needle(kind, key, value))
    return needles


def draw_filler(rng: random.Random, room: int) -> list[str]:
    """Return random sentences of `room` words in all; `room` is 0, or at least 4."""
    sentences = []
    while room:
        fits = [len(t) == room or room - len(t) >= _SHORTEST for t in _TEMPLATES]
        weights = [w * fit for w, fit in zip(_TEMPLATE_WEIGHTS, fits, strict=True)]
        template = rng.choices(_TEMPLATES, weights)[0]
        words = [rng.choice(_SLOTS[word]) if word in _SLOTS else word for word in template]
        sentences.append(" ".join(words))
        room -= len(template)
    return sentences


def bury(
    rng: random.Random, needles: Sequence[Needle], room: int, depth: float | None = None
) -> list[str | Needle]:
    """Return filler sentences with `needles` at random depths among them, `room` words in all.

    `depth` (0 = start, 1 = end) fixes the depth of the first needle.
    """
    taken = sum(len(needle.statement.split()) for needle in needles)
    if room != taken and room - taken < _SHORTEST:
        raise ValueError(
            f"{len(needles)} needles take {taken} words, but there is room for {room}: "
            "ask for fewer needles or a longer text"
        )
    filler = draw_filler(rng, room - taken)
    places = [rng.randint(0, len(filler)) for _ in needles]
    if depth is not None and places:
        places[0] = round(depth * len(filler))
    pieces: list[str | Needle] = list(filler)
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda p: -p[0]):
        pieces.insert(place, needle)
    return pieces


def make_haystack(
    *,
    length: int,
    needles: int = 4,
    seed: int = 0,
    depth: float | None = None,
    kinds: Sequence[str] = ("magic number",),
    count: Callable[[str], int] | None = None,
) -> Haystack:
    """Hide `needles` facts in filler text and ask for each of them. `seed` determines the text.

    A prompt (the text and one question) and its reply of `REPLY_ROOM` tokens take exactly `length`
    tokens of the bundled model. For another tokenizer pass `count`, which returns the number of
    tokens of a text: prompt and reply then take at most `length` tokens, and nearly as many.
    `depth` (0 = start, 1 = end) fixes where the needle of question 0 lies.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth is a share of the text from 0 to 1, got {depth}")
    if not 1 <= needles <= len(NOUNS):
        raise ValueError(f"needles must be from 1 to {len(NOUNS)}, got {needles}")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds are among {KINDS}, got {sorted(unknown)}")
    words = length
    while True:
        haystack = _haystack_of(words, needles, seed, depth, kinds)
        tokens = words
        if count is not None:
            tokens = max(count(haystack.prompt(i)) for i in range(needles)) + REPLY_ROOM
        if tokens <= length:
            return haystack
        words = min(words - 1, words * length // tokens)


def _haystack_of(
    words: int, needles: int, seed: int, depth: float | None, kinds: Sequence[str]
) -> Haystack:
    rng = random.Random(seed)
    hidden = draw_needles(rng, needles, kinds)
    room = words - len(hidden[0].question.split()) - REPLY_ROOM
    pieces = bury(rng, hidden, room, depth)
    return Haystack(
        text=" ".join(p.statement if isinstance(p, Needle) else p for p in pieces),
        questions=tuple(needle.question for needle in hidden),
        answers=tuple(needle.value for needle in hidden),
    )
