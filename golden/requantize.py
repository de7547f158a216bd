"""The only rounding: docs/numerics.md, "Requantisation"."""
import numpy as np

from golden._check import integers
from spec.derive import BIAS, FRACTION_BITS, MULTIPLIER, SHIFT


def _nearest(values):
    """Nearest integers, halves up, exactly: float64 below 2**52 loses nothing in ``v - floor(v)``."""
    floor = np.floor(values)
    return (floor + (values - floor >= 0.5)).astype(np.int64)


def _scales(name, scale):
    scale = np.asarray(scale)
    if scale.dtype == object or not np.issubdtype(scale.dtype, np.number) or np.iscomplexobj(scale):
        raise TypeError(f"{name} must be real numbers, not {scale.dtype}")
    scale = scale.astype(np.float64)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"{name} must be positive and finite")
    return scale


def encode_scale(scale):
    """Multiplier and shift of a real scale: ``scale ~= multiplier / 2**(shift + 14)``.

    The multiplier lies in 32768..65535, with the shift that makes it so (relative error at most 2**-16), except: the
    scale 1 is (16384, 0); scales below 2**-30 keep shift 31 and lose bits. Nearest, halves up.

    Args: scale: positive number, or array of them.
    Returns: (multiplier, shift), ints for a number, uint16 and uint8 arrays for an array.
    Raises: TypeError; ValueError for a scale that is not positive, not finite, or rounds above 65535 / 16384.

    >>> encode_scale(1), encode_scale(0.1), encode_scale(3.5)
    ((16384, 0), (52429, 5), (57344, 0))
    """
    real = _scales("scale", scale)
    _, exponent = np.frexp(real)                                 # real = f * 2**exponent, 0.5 <= f < 1
    shift = np.clip(2 - exponent, 0, SHIFT.hi)                   # f * 2**16 is in 32768..65536
    if (exponent > 2).any():
        raise ValueError(f"scale must be below {(MULTIPLIER.hi + 0.5) / (1 << FRACTION_BITS)}, not {real.max()}")
    multiplier = _nearest(np.ldexp(real, shift + FRACTION_BITS))
    carried = multiplier > MULTIPLIER.hi                         # 65535.5 and more: half the multiplier, one shift less
    if (carried & (shift == 0)).any():
        raise ValueError(f"scale must be below {(MULTIPLIER.hi + 0.5) / (1 << FRACTION_BITS)}, not {real.max()}")
    multiplier, shift = np.where(carried, multiplier >> 1, multiplier), shift - carried
    one = real == 1
    multiplier, shift = np.where(one, 1 << FRACTION_BITS, multiplier), np.where(one, 0, shift)
    if real.ndim == 0:
        return int(multiplier), int(shift)
    return multiplier.astype(np.uint16), shift.astype(np.uint8)


def encode_residual_scale(ratio):
    """``round(ratio * 2**14)``, halves up; ratio = residual scale / output scale.

    Returns: int in 0..65535. Raises: TypeError; ValueError unless positive, finite and below 65535.5 / 16384.

    >>> encode_residual_scale(1.0), encode_residual_scale(0.3)
    (16384, 4915)
    """
    real = _scales("ratio", ratio)
    if real.ndim:
        raise ValueError(f"ratio must be one number, not of shape {real.shape}")
    if real >= (MULTIPLIER.hi + 0.5) / (1 << FRACTION_BITS):
        raise ValueError(f"ratio must be below {(MULTIPLIER.hi + 0.5) / (1 << FRACTION_BITS)}, not {float(real)}")
    return int(_nearest(real * (1 << FRACTION_BITS)))


def _ranged(name, value, lo, hi):
    value = integers(name, value).astype(np.int64)
    if value.size and not (lo <= value.min() and value.max() <= hi):
        raise ValueError(f"{name} must be in {lo}..{hi}")
    return value


def requantize(acc, *, bias, multiplier, shift, zero_point, low=-128, high=127, residual=None, residual_zero_point=0,
               residual_multiplier=0):
    """int8 outputs of accumulators.

    ``A = acc + bias; u = (A * multiplier) >> shift; v = (residual - residual_zero_point) * residual_multiplier;``
    ``y = clamp(((u + v + 2**13) >> 14) + zero_point, low, high)``

    Args:
        acc: integer [..., K], 32 bits. bias: [K], 32 bits. multiplier: [K], 0..65535. shift: [K], 0..31 (the last
        three may be one number each). zero_point, low <= high, residual_zero_point: -128..127.
        residual: int8 [..., K] of acc's shape, or None (v = 0). residual_multiplier: 0..65535.
    Returns: int8, acc's shape.
    Raises: TypeError for floats; ValueError for values out of range or shapes that do not match.
    """
    acc = _ranged("acc", acc, -(1 << 31), (1 << 31) - 1)
    channels = acc.shape[-1:]
    parameters = []
    for name, value, spec in (("bias", bias, BIAS), ("multiplier", multiplier, MULTIPLIER), ("shift", shift, SHIFT)):
        value = _ranged(name, value, spec.lo, spec.hi)
        if value.shape not in ((), channels):
            raise ValueError(f"{name} must be one number or one for each of {channels} channels, not {value.shape}")
        parameters.append(value)
    bias, multiplier, shift = parameters
    zero_point, low, high, residual_zero_point = (int(_ranged(name, v, -128, 127)) for name, v in (
        ("zero_point", zero_point), ("low", low), ("high", high), ("residual_zero_point", residual_zero_point)))
    if low > high:
        raise ValueError(f"low must be at most high ({high}), not {low}")
    u = ((acc + bias) * multiplier) >> shift
    if residual is not None:
        residual = _ranged("residual", residual, -128, 127)
        if residual.shape != acc.shape:
            raise ValueError(f"residual must have the accumulators' shape {acc.shape}, not {residual.shape}")
        u = u + (residual - residual_zero_point) * int(_ranged("residual_multiplier", residual_multiplier, 0, 65535))
    t = (u + (1 << FRACTION_BITS - 1)) >> FRACTION_BITS
    return np.clip(t + zero_point, low, high).astype(np.int8)
