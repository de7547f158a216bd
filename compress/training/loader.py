"""Training data in memory: batches with random crops and flips, made by one indexed read each.

All images of a set are one uint8 tensor [N, H + 2p, W + 2p, C], padded once by the ``p`` pixels that crops may shift.
A batch is one gather of it, turned to float, normalised, and seen as [B, C, H, W] with channels last in memory, the
layout that PyTorch's CPU convolutions like. Nothing is decoded, copied between processes or padded twice.
"""
from dataclasses import dataclass
import hashlib

import numpy as np
import torch

from compress import data, demo
from compress.training import fields
from spec.errors import InputError

#: Kinds of data without files.
BUILT_IN = ("digits",)
#: kind -> (pixels that a crop may shift, whether to flip) unless the recipe says otherwise.
AUGMENTATION = {"cifar10": (4, True), "cifar100": (4, True), "fashion_mnist": (2, True), "mnist": (2, False),
                "digits": (1, False)}


class Source:
    """The mapping ``data`` of a recipe.

    Args:
        kind: ``cifar10``, ``cifar100``, ``mnist``, ``fashion_mnist`` (`compress.data`) or ``digits`` (`compress.demo`).
        path: folder or file; none for digits.
        validation: images taken out of the training set, spread evenly over the classes; they judge, never train.
        limit: most training images, spread evenly over the classes; 0 is all.
        shift, flip: crops move by up to ``shift`` pixels; flip mirrors half of the images.
        mean, std: normalisation of pixels in 0..1, one number per channel; default the set's own.
        test: split that the final accuracy is measured on.
    """

    def __init__(self, *, kind, path=None, validation=0, limit=0, shift=None, flip=None, mean=None, std=None):
        self.kind = fields.choice(kind, "kind", (*data.STATISTICS, *BUILT_IN))
        if (path is None) != (kind in BUILT_IN):
            raise InputError("must be given" if path is None else "must not be given: the data are built in",
                             field="path")
        self.path = None if path is None else fields.path(path, "path")
        self.validation = fields.whole(validation, "validation")
        self.limit = fields.whole(limit, "limit")
        for field, value in (("validation", self.validation), ("limit", self.limit)):
            if value and kind in BUILT_IN:
                raise InputError("must not be given: the splits are built in", field=field, value=value)
        default = AUGMENTATION[self.kind]
        self.shift = default[0] if shift is None else fields.whole(shift, "shift", high=16)
        self.flip = default[1] if flip is None else fields.flag(flip, "flip")
        given = data.STATISTICS.get(self.kind, ((0.0,), (1.0,)))
        self.mean = self._channels(mean, "mean", given[0], low=0)
        self.std = self._channels(std, "std", given[1], above=0)

    @staticmethod
    def _channels(value, field, default, **limits):
        if value is None:
            return tuple(float(v) for v in default)
        if not isinstance(value, (list, tuple)) or len(value) != len(default):
            raise InputError(f"must be a list of {len(default)} numbers", field=field, value=value)
        return tuple(fields.number(v, f"{field}[{n}]", **limits) for n, v in enumerate(value))

    def load(self, *, seed, cache=None):
        """`Dataset` of the source; ``seed`` decides the split. Raises: InputError for bad files."""
        if self.kind == "digits":
            sets = {name: self._digits(name) for name in ("train", "validation", "heldout")}
            return Dataset(train=sets["train"], validation=sets["validation"], test=sets["heldout"],
                           shift=self.shift, flip=self.flip, mean=self.mean, std=self.std)
        images, labels = data.load(self.kind, self.path, "train", cache=cache)
        test = data.load(self.kind, self.path, "test", cache=cache)
        rng = np.random.default_rng(seed)
        held = _spread(labels, self.validation, rng, "validation")
        rest = np.setdiff1d(np.arange(len(labels)), held)
        if self.limit and self.limit < len(rest):
            rest = rest[_spread(labels[rest], self.limit, rng, "limit")]
        train = images[rest], labels[rest]
        # without images of its own the validation is a fixed part of the training set: it shows that a run is alive
        judged = (images[held], labels[held]) if self.validation else tuple(a[:1000] for a in train)
        return Dataset(train=train, validation=judged, test=test, shift=self.shift, flip=self.flip, mean=self.mean,
                       std=self.std)

    @staticmethod
    def _digits(split):
        x, labels = demo.digits(split)
        return x.transpose(0, 2, 3, 1), labels


def _spread(labels, count, rng, field):
    """Sorted indices of ``count`` images, as evenly over the classes as it goes."""
    if count >= len(labels):
        raise InputError(f"must be below the {len(labels)} training images", field=field, value=count)
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        rank[own] = np.arange(len(own))
    return np.sort(order[np.argsort(rank[order], kind="stable")[:count]])


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Three sets of (images [N, H, W, C], labels [N]): uint8, which normalisation takes as 0..1, or float32 as is."""

    train: tuple
    validation: tuple
    test: tuple
    shift: int
    flip: bool
    mean: tuple
    std: tuple

    @property
    def classes(self):
        """Number of classes."""
        return int(max(labels.max() for _, labels in (self.train, self.test))) + 1

    @property
    def shape(self):
        """(channels, height, width)."""
        height, width, channels = self.train[0].shape[1:]
        return channels, height, width

    def digest(self):
        """sha256 of all images and labels, hexadecimal: what a result was trained and measured on."""
        total = hashlib.sha256()
        for images, labels in (self.train, self.validation, self.test):
            total.update(np.ascontiguousarray(images))
            total.update(np.ascontiguousarray(labels, dtype=np.int64))
        return total.hexdigest()

    def normalized(self, images):
        """Float32 tensor [N, C, H, W], channels last in memory."""
        return _normalize(torch.from_numpy(np.ascontiguousarray(images)), *self._statistics(images))

    def _statistics(self, images):
        unit = 255.0 if images.dtype == np.uint8 else 1.0
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return 1 / (unit * std), -mean / std

    def batches(self, size, generator):
        """One epoch of (x [B, C, H, W], labels [B]) in random order, cropped and mirrored; a last batch of fewer than
        half the size is left out, since its batch statistics would be poor.

        Lazily padded: call once for each epoch.
        """
        images, labels = self.train
        padded = self._padded()
        labels = torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64))
        factor, offset = self._statistics(images)
        count, height, width = images.shape[:3]
        rows, columns = torch.arange(height), torch.arange(width)
        order = torch.randperm(count, generator=generator)
        for part in order.split(size):
            if len(part) < size / 2 and count >= size:
                continue
            top, left = (torch.randint(0, 2 * self.shift + 1, (len(part), 1), generator=generator) for _ in range(2))
            across = left + columns
            if self.flip:
                mirrored = torch.randint(0, 2, (len(part), 1), generator=generator).bool()
                across = torch.where(mirrored, left + columns.flip(0), across)
            down = top + rows
            batch = padded[part[:, None, None], down[:, :, None], across[:, None, :]]
            yield _normalize(batch, factor, offset), labels[part]

    def _padded(self):
        if "padded" not in self.__dict__:
            p = self.shift
            padded = np.pad(self.train[0], ((0, 0), (p, p), (p, p), (0, 0)))
            object.__setattr__(self, "padded", torch.from_numpy(padded))
        return self.__dict__["padded"]

    def steps(self, size):
        """Batches of an epoch."""
        count = len(self.train[1])
        whole, rest = divmod(count, size)
        return max(1, whole + (rest >= size / 2))


def _normalize(images, factor, offset):
    """NHWC images -> float32 NCHW view ``images * factor + offset``."""
    return torch.addcmul(offset, images.to(torch.float32), factor).permute(0, 3, 1, 2)
