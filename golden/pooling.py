"""Max and average pooling on raw integers."""
import numpy as np

from golden._check import image, integers, tuple_of
from golden.convolution import _pad, output_size

#: What max pooling reads outside the image: below or equal to every int8.
MAX_PAD = -128


def _reduce(function, x, window, stride, pads, value):
    window, stride = tuple_of("window", window, 2, least=1), tuple_of("stride", stride, 2, least=1)
    pads = tuple_of("pads", pads, 4, least=0)
    ho, wo = output_size(x.shape[1:3], window, stride=stride, pads=pads)
    padded, out = _pad(x, pads, value), None
    for y in range(window[0]):
        for z in range(window[1]):
            view = padded[:, y:y + (ho - 1) * stride[0] + 1:stride[0], z:z + (wo - 1) * stride[1] + 1:stride[1]]
            out = view.copy() if out is None else function(out, view, out=out)
    return out


def max_pool(x, window, stride=(1, 1), pads=(0, 0, 0, 0)):
    """``y[n, i, j, c] = max over the window of x``, padding with -128.

    Args: x: int8 [N, H, W, C]; window, stride: (vertical, horizontal); pads: (top, left, bottom, right).
    Returns: int8 [N, Ho, Wo, C]. Raises: TypeError unless x is int8; ValueError for sizes that do not fit.
    """
    x = image("x", x)
    if x.dtype != np.int8:
        raise TypeError(f"x must be int8, not {x.dtype}")
    return _reduce(np.maximum, x, window, stride, pads, MAX_PAD)


def average_pool_sum(x, window, stride=(1, 1), pads=(0, 0, 0, 0), pad_value=0):
    """``acc[n, i, j, c] = sum over the window of x``, reading ``pad_value`` (the zero point) outside the image.

    The division by the whole window belongs to the requantiser's scale. Arguments as `max_pool`, any integer dtype.
    Returns: int64 [N, Ho, Wo, C]. Raises: TypeError for floats; ValueError for sizes that do not fit.
    """
    x = image("x", x).astype(np.int64)
    return _reduce(np.add, x, window, stride, pads, int(integers("pad_value", pad_value)))
