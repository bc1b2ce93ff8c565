"""Speech by espeak-ng, in this process: each utterance is a function of its own description, bit for bit."""

import _ctypes
import ctypes
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import espeakng_loader
import numpy as np

from kdtrainer.errors import RunError

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
)
FEWEST_WORDS, MOST_WORDS = 3, 7
ACCENTS = (
    *("en", "en-us", "en-us-nyc", "en-029", "en-gb-scotland"),
    *("en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
)
VARIANTS = (
    *("Alex", "Andrea", "Annie", "Gene", "Hugo", "Jacky", "Lee", "Mario", "Michael", "Mike", "adam", "anika"),
    *("announcer", "belinda", "david", "edward", "f1", "f2", "f3", "f4", "grandma", "ian", "iven", "john"),
    *("linda", "m1", "m2", "m3", "m4", "m5", "m6", "max", "norbert", "pablo", "quincy", "rob", "steph", "travis"),
)
UNHEARD = ("Andy", "antonio", "aunty", "benjamin", "caleb", "f5", "m7", "m8", "paul", "robert")
RATES, PITCHES, DECIBELS = (110, 180), (30, 70), (10.0, 30.0)  # words a minute, espeak's scale, signal to noise

SYNCHRONOUS, UTF8 = 2, 1  # espeak_AUDIO_OUTPUT, espeakCHARS_UTF8
RATE, PITCH = 1, 3  # espeak_PARAMETER
SEED = 1  # of what espeak-ng draws, which is the time otherwise

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Utterance:
    """What is said, and how."""

    text: str
    accent: str
    variant: str  # "" for none
    rate: int
    pitch: int
    decibels: float | None  # of the signal above the noise
    colour: float  # of the noise: its power falls with frequency to this power
    seed: int  # of the noise


def draw(split: str, index: int, seed: int) -> Utterance:
    """The utterance of this number: `clean` has one voice and no noise, `test` has voices that `train` has not."""
    chance = random.Random(f"{seed}/{split}/{index}")
    text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(FEWEST_WORDS, MOST_WORDS)))
    if split == "clean":
        return Utterance(text, chance.choice(ACCENTS), "", chance.randint(*RATES), 50, None, 0.0, 0)
    return Utterance(
        text,
        chance.choice(ACCENTS),
        chance.choice(UNHEARD if split == "test" else VARIANTS),
        chance.randint(*RATES),
        chance.randint(*PITCHES),
        chance.uniform(*DECIBELS),
        chance.uniform(0.0, 2.0),
        zlib.crc32(f"{seed}/{split}/{index}/noise".encode()),
    )


def render(utterance: Utterance) -> tuple[np.ndarray, int]:
    """(samples,) float32 within ±1 or so, and the samples of a second."""
    samples, rate = speak(utterance)
    wave = samples.astype(np.float32) / 2**15
    if utterance.decibels is not None:
        wave += noise(len(wave), utterance) * loudness(wave) * 10 ** (-utterance.decibels / 20)
    return wave, rate


def loudness(wave: np.ndarray) -> np.float32:
    return np.sqrt(np.mean(wave**2))


def noise(count: int, utterance: Utterance) -> np.ndarray:
    """(count,) of mean square 1, its power as frequency to the power -colour."""
    white = np.random.default_rng(utterance.seed).standard_normal(count)
    spectrum = np.fft.rfft(white)
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-utterance.colour / 2)
    coloured = np.fft.irfft(spectrum, count)
    return (coloured / np.sqrt(np.mean(coloured**2))).astype(np.float32)


def speak(utterance: Utterance) -> tuple[np.ndarray, int]:
    """(samples,) int16 of espeak-ng. The library keeps a state from one sentence to the next: it is loaded anew."""
    check_voice(utterance.accent, utterance.variant)
    parts: list[np.ndarray] = []

    def receive(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if samples and count:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = Callback(receive)  # a name of its own: it must live as long as the library may call it
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if rate <= 0:
            raise RunError(f"espeak-ng does not start with the data in {espeakng_loader.get_data_path()}")
        library.espeak_SetSynthCallback(callback)
        voice = f"{utterance.accent}+{utterance.variant}" if utterance.variant else utterance.accent
        if library.espeak_SetVoiceByName(voice.encode()):
            raise RunError(f"espeak-ng has no voice {voice!r}")
        library.espeak_SetParameter(RATE, utterance.rate, 0)
        library.espeak_SetParameter(PITCH, utterance.pitch, 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
        ctypes.CDLL(None).srand(SEED)  # a few voices draw from the C library
        text = utterance.text.encode()
        if library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, UTF8, None, None):
            raise RunError(f"espeak-ng cannot say {utterance.text!r}")
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    if not parts:
        raise RunError(f"espeak-ng says nothing for {utterance.text!r}")
    return np.concatenate(parts), rate


def check_voice(accent: str, variant: str) -> None:
    """Raise RunError where espeak-ng has no such variant: it would take another in silence."""
    if variant and variant not in variants():
        raise RunError(f"espeak-ng has no variant {variant!r} for {accent}: espeakng-loader 0.2.4 has it")


@lru_cache(1)
def variants() -> frozenset[str]:
    return frozenset(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())
