"""English sentences without end, from a seed: a small grammar, so that what is said is not a list of words."""

import random

NOUNS = (
    *("doctor", "teacher", "farmer", "sailor", "child", "neighbour", "captain", "stranger", "baker", "student"),
    *("letter", "window", "garden", "river", "table", "bridge", "horse", "picture", "story", "machine"),
    *("kitchen", "village", "mountain", "train", "basket", "lamp", "coat", "book", "door", "song"),
)
ADJECTIVES = (
    *("old", "young", "quiet", "bright", "little", "heavy", "strange", "happy", "broken", "green"),
    *("tall", "warm", "clever", "empty", "simple", "narrow", "famous", "gentle", "dark", "wooden"),
)
VERBS = (
    *("found", "opened", "carried", "painted", "remembered", "followed", "watched", "bought", "described", "finished"),
    *("lost", "kept", "moved", "needed", "noticed", "repaired", "sold", "showed", "touched", "wanted"),
)
PLACES = ("in", "near", "behind", "under", "beside", "across from")
TIMES = (
    *("yesterday", "this morning", "last week", "after dinner", "before the storm", "on Sunday", "in the winter"),
    *("at midnight", "for the first time", "without a word"),
)
LINKS = ("because", "although", "while", "and", "but")


def draw(chance: random.Random) -> str:
    """One of 4 to 16 words."""
    form = chance.randrange(4)
    if form == 0:
        said = f"{clause(chance)} {chance.choice(TIMES)}"
    elif form == 1:
        said = f"{clause(chance)} {chance.choice(PLACES)} {thing(chance)}"
    elif form == 2:
        said = f"{clause(chance)} {chance.choice(LINKS)} {clause(chance)}"
    else:
        said = f"{chance.choice(TIMES)}, {clause(chance)}"
    return f"{said[0].upper()}{said[1:]}."


def clause(chance: random.Random) -> str:
    return f"{thing(chance)} {chance.choice(VERBS)} {thing(chance)}"


def thing(chance: random.Random) -> str:
    words = [chance.choice(("the", "a", "my", "our", "her", "every"))]
    if chance.random() < 0.5:
        words.append(chance.choice(ADJECTIVES))
    words.append(chance.choice(NOUNS))
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)
