"""A small language of tales: facts planted far back, a topic that colours what is said, filler, questions.

Takes a seed; gives words, prompts and training texts, the same for the same seed on every machine.
A fact reads `red suits alice .`, a question `colour of alice`, and its answer is the next word: `red`. A topic is
set by `talk turns to weather .` and asked for by `so they say`, whose answer is the word that goes with the topic.
Filler is a grammar of sentences whose next word is mostly known from the last few. So a model needs short memory for
the filler, and two kinds of long memory for the rest: one looks for an equal word, the other for a kind of word.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PAD, BOS, UNKNOWN = "<pad>", "<s>", "<unk>"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "alice bob carol david emma frank grace henry irene jack karen leo maria nina oscar paul "
    "quinn rosa simon tina ursula victor wendy xenia yusuf zoe amir bella cyrus diana elias fatima "
    "george hanna ivan julia kofi lena milan noor omar petra rafael sofia tomas uma vera walter"
)
COLOURS = _words(
    "red blue green yellow black white brown pink purple orange grey gold "
    "silver teal olive navy coral amber violet crimson ivory khaki maroon lime"
)
# Each noun has one verb, each adjective may stand before any noun.
NOUNS = _words("dog cat bird horse river wind clock train farmer baker cloud fire")
VERBS = _words("barks sleeps sings runs flows blows ticks leaves works smiles drifts burns")
ADJECTIVES = _words("old small quiet bright slow cold")
GLUE = _words("the near every day suits colour of .")

# A topic has one mood, what `they say` of it: the same place in both.
TOPICS = _words("weather music history cooking travel sport science art money health games law")
MOODS = _words("stormy tuneful dusty tasty distant sweaty exact pretty costly sound merry strict")
TOPIC_GLUE = _words("talk turns to so they say")

VOCABULARY = (PAD, BOS, UNKNOWN, *GLUE, *NAMES, *COLOURS, *NOUNS, *VERBS, *ADJECTIVES)  # of tales without topics
WITH_TOPICS = (*VOCABULARY, *TOPIC_GLUE, *TOPICS, *MOODS)
# Words that the word before all but decides.
FOLLOWERS = frozenset((*VERBS, "day", "suits", "of", "turns", "to", "they", "say"))
INDEX = {word: i for i, word in enumerate(WITH_TOPICS)}

SHORTEST, LONGEST = 4, 9  # words in a filler sentence, the stop included
QUESTION_WORDS, FACT_WORDS = 3, 4
ANSWER, KNOWN, CHOSEN = 1.0, 0.2, 0.02  # weights of words in training


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question over a long text. `text` ends with the name asked for; `answer` is the word that must follow.

    `distance`: words from the name in its fact to the name at the end.
    """

    text: str
    name: str
    answer: str
    distance: int


def sentence(rng: random.Random, words: int) -> list[str]:
    """One filler sentence of exactly `words` words (4 to 9), the stop included."""
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    first, second = rng.choice(ADJECTIVES), rng.choice(ADJECTIVES)
    verb = VERBS[NOUNS.index(noun)]
    return {
        4: ["the", noun, verb, "."],
        5: ["the", first, noun, verb, "."],
        6: ["the", noun, verb, "every", "day", "."],
        7: ["the", noun, verb, "near", "the", other, "."],
        8: ["the", first, noun, verb, "near", "the", other, "."],
        9: ["the", first, noun, verb, "near", "the", second, other, "."],
    }[words]


def filler(rng: random.Random, words: int) -> list[list[str]]:
    """Filler sentences of exactly `words` words in all. Raises ValueError where that cannot be done (1 to 3)."""
    if words and words < SHORTEST:
        raise ValueError(f"no filler of {words} words: a sentence has at least {SHORTEST}")
    sentences = []
    while words:
        # What is left over must again be fillable: nothing, or at least one short sentence.
        fits = [n for n in range(SHORTEST, LONGEST + 1) if words == n or words - n >= SHORTEST]
        sentences.append(sentence(rng, rng.choice(fits)))
        words -= len(sentences[-1])
    return sentences


def facts(rng: random.Random, count: int) -> dict[str, str]:
    """`count` names, each with a colour of its own choice (two names may share one)."""
    return {name: rng.choice(COLOURS) for name in rng.sample(NAMES, count)}


def fact(name: str, colour: str) -> list[str]:
    """The sentence that tells a name's colour."""
    return [colour, "suits", name, "."]


def topic_told(topic: int) -> list[str]:
    """The sentence that sets a topic, given by its place in `TOPICS`."""
    return ["talk", "turns", "to", TOPICS[topic], "."]


def planted(rng: random.Random, told: list[list[str]], room: int, front: int) -> list[list[str]]:
    """Sentences: those of `told` in random order among filler in the first `front` words, or so, then filler alone.

    `room` words of filler in all. Raises ValueError where that cannot be done (1 to 3).
    """
    early = max(0, front - sum(map(len, told)))
    before = filler(rng, early if early >= SHORTEST else 0)
    after = filler(rng, room - sum(map(len, before)))
    mixed = before + told
    rng.shuffle(mixed)
    return mixed + after


def at_depth(sentences: list[list[str]], needle: list[str], depth: float) -> list[list[str]]:
    """The sentences with one more put in where nearest to that part of all words stands before it."""
    total = sum(map(len, sentences)) + len(needle)
    before = [0]
    for sentence in sentences:
        before.append(before[-1] + len(sentence))
    place = min(range(len(before)), key=lambda i: abs(before[i] - depth * total))
    return [*sentences[:place], needle, *sentences[place:]]


def prompt(rng: random.Random, length: int, n_facts: int = 12, part: float = 0.4) -> Prompt:
    """A text of exactly `length` tokens (the tokenizer's start token included) that ends in one question.

    All facts stand in the first `part` of it, in random order among filler; filler alone follows.
    """
    known = facts(rng, n_facts)
    room = length - 1 - QUESTION_WORDS - n_facts * FACT_WORDS
    told = [fact(name, colour) for name, colour in known.items()]
    words = [word for piece in planted(rng, told, room, int(length * part)) for word in piece]
    name = rng.choice(list(known))
    words += ["colour", "of", name]
    place = next(i for i, word in enumerate(words) if word == name)
    return Prompt(" ".join(words), name, known[name], len(words) - 1 - place)


def prompts(count: int, length: int = 640, n_facts: int = 12, seed: int = 0) -> list[Prompt]:
    """`count` prompts of exactly `length` tokens each; the same ones for the same arguments."""
    rng = random.Random(f"prompts {seed} {length} {n_facts}")
    return [prompt(rng, length, n_facts) for _ in range(count)]


def training_text(rng: random.Random, length: int, n_facts: int, mentions: int = 0) -> tuple[list[str], list[float]]:
    """A text of exactly `length` tokens in which two facts of three are asked for, and the weight of each word.

    mentions: how often the mood of a topic is told, which is set in the first part; 0 for a tale without topic.
    The weight says how much predicting a word counts: `ANSWER`; `KNOWN` where the word before decides it
    (nearly); `CHOSEN` where chance did, so that what nobody can know does not drown what can be learned.
    """
    known = facts(rng, n_facts)
    told = [fact(name, colour) for name, colour in known.items()]
    # Not all are asked: else an answer could be guessed as a colour that was told and not yet asked for.
    asked = [["colour", "of", name, known[name], "."] for name in rng.sample(list(known), 2 * n_facts // 3)]
    if mentions:
        topic = rng.randrange(len(TOPICS))
        told.append(topic_told(topic))
        asked += [["so", "they", "say", MOODS[topic], "."]] * mentions
    plain = filler(rng, length - 1 - sum(map(len, told + asked)))
    cut = rng.randint(0, len(plain))
    early, late = told + plain[:cut], asked + plain[cut:]
    rng.shuffle(early)
    rng.shuffle(late)
    words = [BOS] + [word for piece in early + late for word in piece]
    weights = [0.0] + [KNOWN if word in FOLLOWERS else CHOSEN for word in words[1:]]
    for i, word in enumerate(words[3:], 3):
        if (word in COLOURS and words[i - 2] == "of") or word in MOODS:
            weights[i] = ANSWER
    return words, weights


def encode(words: list[str]) -> list[int]:
    """Token ids of words, as the shipped tokenizer gives them."""
    return [INDEX.get(word, INDEX[UNKNOWN]) for word in words]
