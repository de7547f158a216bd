"""Where things lie in the accelerator's memory.

Offset 0 begins the image: constants (weight tiles, step tables, parameters), then the program; the tensors follow.
Tensors lie as [image][channel group][row][column][position in group], int8; a **unit** is one pixel of one group. A
group's first ``group_channels`` positions are channels, the rest is padding.
"""
from dataclasses import dataclass

import numpy as np

from spec.derive import ceil_div
from spec.errors import InputError

#: Every tensor begins on such a boundary, so that no burst of a tensor's first row crosses 4 KiB.
TENSOR_ALIGN_BYTES = 4096
#: Alignment of constants: at least a beat, and a whole number of them for every bus width up to 1024 bits.
CONSTANT_ALIGN_BYTES = 128


def align(value, step):
    """Smallest multiple of ``step`` not below ``value``."""
    return ceil_div(value, step) * step


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One tensor in memory: ``images`` copies of ``planes`` x ``height`` x ``width`` units."""

    name: str
    #: Byte offset of the first unit.
    offset: int
    images: int
    #: Channel groups; the last one is padded to a whole group.
    planes: int
    height: int
    width: int
    channels: int
    #: Bytes of a unit: positions in a group, the first ``group_channels`` of which are channels (0: all of them).
    unit_bytes: int
    zero_point: int
    group_channels: int = 0

    def __post_init__(self):
        if not self.group_channels:
            object.__setattr__(self, "group_channels", self.unit_bytes)

    @property
    def image_units(self):
        """Units from one image to the next."""
        return self.planes * self.height * self.width

    @property
    def bytes(self):
        """Bytes of all images."""
        return self.images * self.image_units * self.unit_bytes

    def relative(self, image, plane, row, col):
        """Byte distance of a unit from the tensor's first unit."""
        return (((image * self.planes + plane) * self.height + row) * self.width + col) * self.unit_bytes

    def write(self, memory, array):
        """Put int8 [images, height, width, channels] (or one image without its axis) into a uint8 memory.

        Channel c lies in group ``c // group_channels`` at position ``c % group_channels``. All other positions are set
        to the tensor's zero point.
        """
        array = np.asarray(array)
        array = array[None] if array.ndim == 3 else array
        shape = (self.images, self.height, self.width, self.channels)
        if array.shape != shape or array.dtype != np.int8:
            raise InputError(f"must be int8 of shape {shape}", field=f"tensor {self.name}",
                             value=(str(array.dtype), array.shape))
        padded = np.full((*shape[:3], self.planes * self.group_channels), self.zero_point, np.int8)
        padded[..., :self.channels] = array
        units = np.full((*shape[:3], self.planes, self.unit_bytes), self.zero_point, np.int8)
        units[..., :self.group_channels] = padded.reshape(*shape[:3], self.planes, self.group_channels)
        units = units.transpose(0, 3, 1, 2, 4)
        memory[self.offset:self.offset + self.bytes] = np.ascontiguousarray(units).reshape(-1).view(np.uint8)

    def read(self, memory, *, padded=False):
        """int8 [images, height, width, channels] from a uint8 memory; ``padded`` keeps the last group whole.

        Positions of a unit beyond ``group_channels`` are no channels and never read.
        """
        raw = np.asarray(memory[self.offset:self.offset + self.bytes]).view(np.int8)
        units = raw.reshape(self.images, self.planes, self.height, self.width, self.unit_bytes)
        array = units[..., :self.group_channels].transpose(0, 2, 3, 1, 4)
        array = array.reshape(self.images, self.height, self.width, -1)
        return array.copy() if padded else array[..., :self.channels].copy()


class Constants:
    """Byte blobs in the order they were added, each aligned."""

    def __init__(self):
        self._blobs, self.bytes = [], 0

    def add(self, blob):
        """Append a uint8 array; returns its byte offset."""
        offset = align(self.bytes, CONSTANT_ALIGN_BYTES)
        self._blobs.append((offset, blob))
        self.bytes = offset + blob.size
        return offset

    def image(self, size):
        """uint8 array of ``size`` bytes that holds all blobs."""
        out = np.zeros(size, np.uint8)
        for offset, blob in self._blobs:
            out[offset:offset + blob.size] = blob
        return out
