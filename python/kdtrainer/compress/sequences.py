"""Images as sequences of pixels: scikit-learn's digits, Debian's copy of Fashion-MNIST, and files of the user's own."""

import gzip
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrainer import data
from kdtrainer.errors import RunError

DIGITS, FASHION_MNIST = "digits", "fashion-mnist"
PACKAGE = "dataset-fashion-mnist"
KEYS = ("x_train", "y_train", "x_test", "y_test")
IDX_UINT8 = 0x08
MOST_CLASSES = 100_000  # a label above is no class: it would make a head of as many rows


@dataclass(frozen=True)
class Sequences:
    """Inputs are (N, T, c), of mean 0 and mean square 1 over the training set; labels are (N,) from 0."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(torch.cat([self.train_labels, self.test_labels]).max()) + 1


def load(name: str, length: int, others: Sequence[str] = ()) -> Sequences:
    """`digits`, `fashion-mnist` or the path of a .npz file. Raises RunError, naming what is wrong.

    `others` are names that the caller knows besides.
    """
    if name == DIGITS:
        return digits(length)
    if name == FASHION_MNIST:
        return fashion_mnist()
    if not Path(name).is_file():
        known = ", ".join((DIGITS, FASHION_MNIST, *others))
        raise RunError(f"--data is {name!r}, but must be {known} or a .npz file that is there")
    return from_file(Path(name))


def digits(length: int) -> Sequences:
    """8 × 8 pixels one after the other, or as many by bilinear interpolation."""
    side = round(length**0.5)
    if side * side != length or side < 2:
        raise RunError(f"--length is {length}, but must be the square of a whole number of at least 2, as images are")
    found = data.load(1, seed=0)

    def resized(images: Tensor) -> Tensor:
        square = images.view(-1, 1, 8, 8)
        if side != 8:
            square = F.interpolate(square, (side, side), mode="bilinear", align_corners=False)
        return square.reshape(len(images), length, 1)

    return standardised(resized(found.train_images), found.train_labels, resized(found.test_images), found.test_labels)


def fashion_mnist() -> Sequences:
    """The four gzipped IDX files of Debian's package."""
    wanted = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    files = packaged(PACKAGE, wanted, ", or give a .npz file")
    train, train_labels, test, test_labels = (read_idx(path) for path in files)
    return checked(FASHION_MNIST, train, train_labels, test, test_labels)


def packaged(package: str, wanted: Sequence[str], instead: str = "") -> list[Path]:
    """Files that a Debian package has put somewhere, by their names. Raises RunError where one is missing."""
    listed = ""
    if shutil.which("dpkg"):
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False).stdout
    paths = {Path(line).name: Path(line) for line in listed.splitlines()}
    for file in wanted:
        if file not in paths:
            raise RunError(f"{file} of Debian's package {package} is not here: apt-get install {package}{instead}")
    return [paths[file] for file in wanted]


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes: two zero bytes, the type, the number of dimensions, each as four bytes, then the data."""
    try:
        content = gzip.decompress(path.read_bytes())
        if len(content) < 4 or content[:2] != b"\0\0" or content[2] != IDX_UINT8:
            raise ValueError("it does not start as an IDX file of bytes does")
        dimensions = content[3]
        shape = np.frombuffer(content, ">u4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def from_file(path: Path) -> Sequences:
    """x_train, y_train, x_test and y_test of a .npz file, as Keras's mnist.npz has them."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                raise RunError(f"{path} has no array {missing[0]!r}: it must have {', '.join(KEYS)}")
            arrays = [file[key] for key in KEYS]
    except (OSError, ValueError, BadZipFile, EOFError, RuntimeError, zlib.error) as error:
        raise RunError(f"{path} is no .npz file of arrays: {error}") from error
    return checked(str(path), *arrays)


def checked(name: str, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Sequences:
    """Raise RunError unless the arrays are (N, T), (N, H, W) or (N, H, W, c) numbers with a label each."""
    for key, array in zip(KEYS, (x, y, x_test, y_test), strict=True):
        if array.dtype.kind not in "uif":
            raise RunError(f"{key} of {name} holds {array.dtype}, but must hold numbers")
        if not array.size:
            raise RunError(f"{key} of {name} is empty")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32)).all()
        if not finite:
            raise RunError(f"{key} of {name} holds numbers that are not finite")
    for key, array, labels in (("x_train", x, y), ("x_test", x_test, y_test)):
        if array.ndim not in (2, 3, 4):
            raise RunError(f"{key} of {name} has shape {array.shape}, but must be (N, T), (N, H, W) or (N, H, W, c)")
        if array.shape[1:] != x.shape[1:]:
            raise RunError(
                f"x_test of {name} has shape {array.shape}, but must be (N, {', '.join(map(str, x.shape[1:]))})"
            )
        if labels.size != len(array):
            raise RunError(f"y_{key[2:]} of {name} has {labels.size} labels for {len(array)} inputs")
        if labels.min() < 0 or (labels != labels.astype(np.int64)).any():
            raise RunError(f"y_{key[2:]} of {name} must hold whole numbers from 0 on")
        if labels.max() >= MOST_CLASSES:
            raise RunError(
                f"y_{key[2:]} of {name} has the label {labels.max()}, but must have less than {MOST_CLASSES}"
            )

    def sequences(array: np.ndarray) -> Tensor:
        flat = torch.from_numpy(np.array(array, np.float32, order="C"))  # a copy: not all byte orders are torch's
        return flat.flatten(1, 2) if array.ndim == 4 else flat.flatten(1).unsqueeze(-1)

    def labels_of(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.reshape(-1).astype(np.int64))

    found = standardised(sequences(x), labels_of(y), sequences(x_test), labels_of(y_test))
    for key, moved in (("x_train", found.train), ("x_test", found.test)):
        if not bool(moved.isfinite().all()):
            raise RunError(f"{key} of {name} cannot be scaled by x_train's mean and standard deviation")
    return found


def standardised(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Sequences:
    """One mean and one scale for all inputs, of the training set alone; no scale where its numbers are all the same."""
    mean, deviation = train.mean(), train.std(correction=min(train.numel() - 1, 1))
    scale = torch.where(deviation > 0, deviation, 1)
    moved: list[Any] = [((x - mean) / scale) for x in (train, test)]
    return Sequences(moved[0], train_labels, moved[1], test_labels)
