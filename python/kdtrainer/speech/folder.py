"""A user's own folder in LibriSpeech's layout: `<name>.trans.txt` beside recordings, one `<id> <text>` a line."""

import hashlib
import wave as wav
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
        for line in lines_of(listing):
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


def lines_of(listing: Path) -> list[str]:
    try:
        return listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RunError(f"{listing} is no text in UTF-8: {error}") from error


def held_back(
    found: list[dict[str, Any]], share: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those to train on, and at least that share, drawn by a seed, to test on.

    A speaker, whose name begins that of a recording (LibriSpeech's 84-121123-0000), is in one of the two. Where there
    are no two speakers, single recordings are drawn.
    """
    groups: dict[str, list[int]] = {}
    for k, recording in enumerate(found):
        groups.setdefault(Path(recording["path"]).stem.partition("-")[0], []).append(k)
    parts = list(groups.values()) if len(groups) > 1 else [[k] for k in range(len(found))]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    held: set[int] = set()
    for k in order[: max(len(parts) - 1, 1)]:
        if len(held) >= max(round(share * len(found)), 1):
            break
        held.update(parts[k])
    train, test = ([each for k, each in enumerate(found) if (k in held) is which] for which in (False, True))
    return train, test


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
        raise RunError(f"{path} is no WAV file of whole numbers: {str(error) or 'it ends too early'}") from error
    if kind not in BYTES:
        raise RunError(f"{path} has samples of {8 * kind} bits, but must have 8, 16 or 32")
    if len(content) % (kind * channels):
        raise RunError(f"{path} ends within a sample: it was cut")
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
