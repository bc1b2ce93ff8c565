"""scikit-learn's bundled handwritten digits: 1797 images of 8 x 8 in ten classes."""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from kdtrainer.errors import RunError

CLASSES = 10
TEST_SHARE = 0.3
SPLIT_SEED = 0  # one test set for all runs: no seed of a run may move an image into or out of it


@dataclass(frozen=True)
class Digits:
    """Images are (N, 64) in [0, 1]; labels are (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    labelled: Tensor  # indices of the training images whose labels the student may use, as many of each class


def load(labels_per_class: int, seed: int) -> Digits:
    """The fixed stratified split; `seed` draws which training images are labelled for the student.

    Raises RunError where some class has fewer training images than `labels_per_class`.
    """
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    train_labels = torch.from_numpy(train_labels)
    return Digits(
        torch.from_numpy(train_images),
        train_labels,
        torch.from_numpy(test_images),
        torch.from_numpy(test_labels),
        few_of_each_class(train_labels, CLASSES, labels_per_class, seed),
    )


def few_of_each_class(labels: Tensor, classes: int, count: int, seed: int) -> Tensor:
    """The places of `count` labels of each class. Raises RunError where some class has fewer."""
    most = int(torch.bincount(labels, minlength=classes).min())
    if count > most:
        raise RunError(f"--labels is {count}, but must be at most {most}: some class has no more training examples")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    return torch.cat([order[shuffled == label][:count] for label in range(classes)])
