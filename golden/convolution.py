"""Integer-exact convolution: the accumulators of docs/numerics.md, "Accumulation"."""
import numpy as np

from golden._check import image, integers, tuple_of

#: Bytes of gathered operands per matrix product; more images than fit are done in several.
_CHUNK_BYTES = 1 << 26


def output_size(size, kernel, *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1)):
    """``(size + pads - dilation * (kernel - 1) - 1) // stride + 1`` for both directions.

    Args: size, kernel: (height, width); pads: (top, left, bottom, right).
    Returns: (output height, output width), both at least 1.
    Raises: ValueError for illegal arguments or a window larger than the padded input.
    """
    size, kernel = tuple_of("size", size, 2, least=1), tuple_of("kernel", kernel, 2, least=1)
    stride, dilation = tuple_of("stride", stride, 2, least=1), tuple_of("dilation", dilation, 2, least=1)
    pads = tuple_of("pads", pads, 4, least=0)
    padded = size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3]
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel))
    if any(p < r for p, r in zip(padded, reach)):
        raise ValueError(f"Kernel reach {reach} must fit the padded input {padded}")
    return tuple((p - r) // s + 1 for p, r, s in zip(padded, reach, stride))


def effective_weights(weights):
    """Sum of the terms of ``weights`` (one integer array or a list or tuple of them): int64.

    Raises: TypeError for floats; ValueError for an empty list or terms of different shapes.
    """
    terms = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    if not terms:
        raise ValueError("weights must have at least one term")
    terms = [integers("weights", t) for t in terms]
    if len({t.shape for t in terms}) != 1:
        raise ValueError(f"Terms must share one shape, not {[t.shape for t in terms]}")
    total = terms[0].astype(np.int64)
    for t in terms[1:]:
        total += t
    return total


def _exact_dtype(bound):
    """Fastest dtype in which sums whose absolute terms add up to at most ``bound`` are exact in any order."""
    if bound < 1 << 24:
        return np.float32
    if bound < 1 << 53:
        return np.float64
    if bound < 1 << 63:
        return np.int64
    raise OverflowError(f"Sums up to {bound:.3g} do not fit 64 bits")


def _pad(x, pads, value):
    top, left, bottom, right = pads
    if not any(pads):
        return x
    n, h, w, c = x.shape
    out = np.full((n, h + top + bottom, w + left + right, c), value, x.dtype)
    out[:, top:top + h, left:left + w] = x
    return out


def accumulate(x, weights, *, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1), groups=1, pad_value=0):
    """Accumulators of a convolution, exactly.

    ``acc[n, y, x, k] = sum over terms, r, s, c of w[k, r, s, c] * q[n, y*sh - pt + r*dh, x*sw - pl + s*dw, g*Cg + c]``
    with g the group of output k and ``pad_value`` (the input's zero point) outside the image.

    Args:
        x: integer [N, H, W, C], normally int8.
        weights: integer [K, R, S, C / groups], or a list of such terms, which are summed.
        stride, dilation: (vertical, horizontal). pads: (top, left, bottom, right).
        groups: divides C and K. pad_value: one integer.
    Returns: int64 [N, Ho, Wo, K]; float BLAS does the products only where every partial sum is exact.
    Raises: TypeError for float operands; ValueError for shapes that do not fit; OverflowError beyond 63 bits.
    """
    x, w = image("x", x), effective_weights(weights)
    if w.ndim != 4:
        raise ValueError(f"weights must be [K, R, S, C / groups], not of shape {w.shape}")
    stride, dilation = tuple_of("stride", stride, 2, least=1), tuple_of("dilation", dilation, 2, least=1)
    pads, (groups,) = tuple_of("pads", pads, 4, least=0), tuple_of("groups", (groups,), 1, least=1)
    n, h, wd, c = x.shape
    k, r, s, cg = w.shape
    if c % groups or k % groups or cg * groups != c:
        raise ValueError(f"groups ({groups}) must divide {c} inputs and {k} outputs into {cg} inputs each")
    ho, wo = output_size((h, wd), (r, s), stride=stride, pads=pads, dilation=dilation)
    pad_value = int(integers("pad_value", pad_value))
    largest = max(abs(int(x.min())), abs(int(x.max())), abs(pad_value)) if x.size else 0
    # In float64, which cannot wrap; 1e-9 covers its own rounding.
    bound = largest * np.abs(w.astype(np.float64)).sum(axis=(1, 2, 3)).max(initial=0) * (1 + 1e-9)
    dtype = _exact_dtype(bound)
    info = np.iinfo(x.dtype)
    if not info.min <= pad_value <= info.max:
        x = x.astype(np.int64)
    padded = _pad(x, pads, pad_value)
    matrices = w.astype(dtype).reshape(groups, k // groups, r * s * cg).swapaxes(1, 2)   # [G, R*S*Cg, K/G]
    out = np.empty((n, ho * wo, groups, k // groups), np.int64)
    step = max(1, _CHUNK_BYTES // max(1, ho * wo * r * s * c * np.dtype(dtype).itemsize))
    for at in range(0, n, step):
        part = padded[at:at + step]
        cols = np.empty((groups, len(part), ho, wo, r * s, cg), dtype)
        for tap in range(r * s):
            y, z = tap // s * dilation[0], tap % s * dilation[1]
            view = part[:, y:y + (ho - 1) * stride[0] + 1:stride[0], z:z + (wo - 1) * stride[1] + 1:stride[1]]
            cols[..., tap, :] = np.moveaxis(view.reshape(len(part), ho, wo, groups, cg), 3, 0)
        sums = np.matmul(cols.reshape(groups, len(part) * ho * wo, r * s * cg), matrices)
        out[at:at + step] = sums.swapaxes(0, 1).reshape(len(part), ho * wo, groups, k // groups)
    return out.reshape(n, ho, wo, k)


def fold_bias(bias, weights, zero_point):
    """``bias'[k] = bias[k] - zero_point * sum over terms, r, s, c of w[k, r, s, c]``: takes the input zero point out.

    Args: bias: integer [K]; weights: as `accumulate`, first axis K; zero_point: of the input.
    Returns: int64 [K]. Raises: TypeError for floats; ValueError for other shapes.
    """
    bias, w = integers("bias", bias), effective_weights(weights)
    if bias.shape != w.shape[:1]:
        raise ValueError(f"bias must have one element for each of {w.shape[0]} outputs, not shape {bias.shape}")
    zero_point = int(integers("zero_point", zero_point))
    return bias.astype(np.int64) - zero_point * w.reshape(len(w), -1).sum(axis=1)


def check_accumulator(acc, bits=32):
    """Returns ``acc`` if all of it fits ``bits`` signed bits. Raises OverflowError naming the first element that does
    not (the hardware stops with ACCUMULATOR_OVERFLOW, it never wraps); TypeError for floats."""
    acc = integers("acc", acc)
    bad = (acc < -(1 << bits - 1)) | (acc > (1 << bits - 1) - 1)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise OverflowError(f"Accumulator {where} must fit {bits} bits, not {int(acc[where])}")
    return acc
