"""A user's own folder in LibriSpeech's layout: `<name>.trans.txt` beside recordings, one `<id> <text>` a line."""

import hashlib
import wave as wav
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kdtrainer.errors import RunError
from kdtrainer.speech import features, text

KINDS = (".wav", ".flac")
BYTES: dict[int, Any] = {1: np.uint8, 2: np.dtype("<i2"), 4: np.dtype("<i4")}  # of a sample


@dataclass(frozen=True)
class Recording:
    """One file, what is said in it, and a digest of its bytes: a file that was changed is another recording."""

    path: str
    text: str
    digest: str


def recordings(root: Path) -> list[dict[str, Any]]:
    """All of a folder, by name, as plain values. Raises RunError, naming what is wrong with which file."""
    if not root.is_dir():
        raise RunError(f"--data {root} is no folder")
    found = []
    for listing in sorted(root.rglob("*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, said = line.strip().partition(" ")
            if not name:
                continue
            paths = [listing.parent / f"{name}{kind}" for kind in KINDS]
            path = next((path for path in paths if path.exists()), None)
            if path is None:
                raise RunError(f"{listing} names {name}, but no {name}.wav or {name}.flac is beside it")
            if not text.normalised(said):
                raise RunError(f"{listing} has no words for {name}")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.append(asdict(Recording(str(path.resolve()), text.normalised(said), digest)))
    if not found:
        raise RunError(f"--data {root} has no .trans.txt file with recordings, in it or in a folder within")
    return found


def read(recording: dict[str, Any]) -> tuple[np.ndarray, int]:
    """(samples,) float32 within ±1, all channels in one, and the samples of a second."""
    path = Path(recording["path"])
    samples, rate = read_wav(path) if path.suffix == ".wav" else read_flac(path)
    if rate < features.SLOWEST:
        raise RunError(f"{path} has {rate} samples a second, but must have at least {features.SLOWEST:.0f}")
    if len(samples) == 0:
        raise RunError(f"{path} has no samples")
    return samples.mean(1, dtype=np.float32), rate


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(samples, channels) and the samples of a second."""
    try:
        with wav.open(str(path)) as file:
            kind, rate, channels = file.getsampwidth(), file.getframerate(), file.getnchannels()
            content = file.readframes(file.getnframes())
    except (wav.Error, EOFError) as error:
        raise RunError(f"{path} is no WAV file of whole numbers: {error}") from error
    if kind not in BYTES:
        raise RunError(f"{path} has samples of {8 * kind} bits, but must have 8, 16 or 32")
    samples = np.frombuffer(content, BYTES[kind]).astype(np.float32).reshape(-1, channels)
    return (samples - 128) / 128 if kind == 1 else samples / 2 ** (8 * kind - 1), rate


def read_flac(path: Path) -> tuple[np.ndarray, int]:
    """(samples, channels) and the samples of a second."""
    if find_spec("soundfile") is None:
        raise RunError(f"{path}: soundfile must be installed for .flac: pip install soundfile, or give .wav files")
    import soundfile

    try:
        return soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
