"""LSTM layer whose matrices may be decoupled tensor trains, in float and in integers.

``a_t = W x_t + R h_(t-1) + b``, cut into four gates in the order i, f, g, o (that of PyTorch; ONNX has i, o, f, g);
``c_t = sigmoid(f) c_(t-1) + sigmoid(i) tanh(g)``;  ``h_t = sigmoid(o) tanh(c_t)``.

The gates are fused: W is [4 H, I] with the gate slowest, so the first output mode of a train over it may hold the gates
(4 x 4 in the published (4 * 4) x 8 x 8). The bias is added to the sum, as a train has no place for one per output.

Integers (own definition): x int8 with any zero point, h int8 with scale 2**-7, the sums a and the cell c int16 with
scale 2**-11 (+-16), gate outputs 16 bits with scale 2**-15 from tables of 2**16 entries::

    a = clamp16(P(x) + R(h) + b)                              P, R: requantised to 16 bits at scale 2**-11
    c = clamp16((16 f c + i g + 2**18) >> 19)                 h = clamp8((o * tanh(c) + 2**22) >> 23)

Source: S. Hochreiter, J. Schmidhuber, 1997; decoupled trains: reference on tensor trains, sections 4 and 8.
"""
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from golden._check import integers
from golden.chain import Product, Requantizer, array_cycles, quantize_rows, real
from golden.convolution import accumulate, fold_bias
from golden.requantize import encode_scale
from golden.tensor_train import TTLinear
from spec.config import IntSpec
from spec.errors import InputError

GATES = ("i", "f", "g", "o")
#: log2 of the scales: sums and cell, gate outputs, hidden state.
SUM_LOG2, GATE_LOG2, HIDDEN_LOG2 = -11, -15, -7
_INT8, _INT16 = IntSpec(8), IntSpec(16)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))                     # never overflows


class _Matrix:
    """What float and integer layers share: a matrix [4 H, I] that is an array or a TTLinear."""

    @property
    def hidden(self):
        """H."""
        return self.recurrent.shape[1]

    def _check(self):
        rows, columns = self.recurrent.shape
        if rows != 4 * columns:
            raise ValueError(f"recurrent must be [4 H, H], not {self.recurrent.shape}")
        if self.input.shape[0] != rows:
            raise ValueError(f"input must have {rows} rows, not {self.input.shape[0]}")
        if self.bias.shape != (rows,):
            raise ValueError(f"bias must be [{rows}], not of shape {self.bias.shape}")

    @property
    def parameters(self):
        """Weights stored, the bias not counted."""
        return sum(m.parameters if isinstance(m, TTLinear) else m.size for m in (self.input, self.recurrent))

    def products(self, batch=1, order="right_to_left"):
        """Matrix products of one step of ``batch`` sequences; ``order``: of trains, see `TTLinear`."""
        out = []
        for matrix in (self.input, self.recurrent):
            out += matrix.products(batch, order) if isinstance(matrix, TTLinear) else [Product(*matrix.shape, batch)]
        return out

    def macs(self, batch=1, order="right_to_left"):
        """Multiplications of one step by matrices (the 3 H products of gates are not counted)."""
        return sum(p.macs for p in self.products(batch, order))

    def cycles(self, rows, columns, batch=1, order="right_to_left"):
        """Cycles of one step on an output-stationary array, `golden.chain.array_cycles`."""
        return array_cycles(self.products(batch, order), rows, columns)

    def _sequence(self, x):
        if x.ndim != 3 or x.shape[2] != self.input.shape[1]:
            raise ValueError(f"x must be [N, T, {self.input.shape[1]}], not {x.shape}")
        if not x.shape[1]:
            raise ValueError("x must have at least one step")

    def _state(self, name, value, batch):
        value = np.zeros((batch, self.hidden), np.int64) if value is None else np.asarray(value)
        if value.shape != (batch, self.hidden):
            raise ValueError(f"{name} must be [{batch}, {self.hidden}], not {value.shape}")
        return value


class Steps(NamedTuple):
    """Of every step: ``sums`` [N, T, 4 H], ``cell`` and ``hidden`` [N, T, H]; the last step is the final state."""

    sums: np.ndarray
    cell: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class LSTM(_Matrix):
    """Float layer. ``input`` [4 H, I] and ``recurrent`` [4 H, H]: real array or TTLinear; ``bias``: real [4 H]."""

    input: np.ndarray | TTLinear
    recurrent: np.ndarray | TTLinear
    bias: np.ndarray = None

    def __post_init__(self):
        for name in ("input", "recurrent"):
            if not isinstance(getattr(self, name), TTLinear):
                object.__setattr__(self, name, real(name, getattr(self, name), 2))
        bias = np.zeros(self.recurrent.shape[0]) if self.bias is None else real("bias", self.bias, 1)
        object.__setattr__(self, "bias", bias)
        self._check()

    def to_dense(self):
        """The same layer with arrays in place of trains."""
        return replace(self, **{name: matrix.to_dense() for name in ("input", "recurrent")
                                if isinstance(matrix := getattr(self, name), TTLinear)})

    def forward(self, x, *, hidden=None, cell=None, order="right_to_left"):
        """`Steps` of x [N, T, I] from states [N, H] (zeros by default), float64. Raises: ValueError for shapes."""
        x = real("x", x, 3)
        self._sequence(x)
        n, steps, _ = x.shape
        h, c = (real(name, self._state(name, value, n)) for name, value in (("hidden", hidden), ("cell", cell)))
        given = _apply(self.input, x.reshape(n * steps, -1), order).reshape(n, steps, -1) + self.bias
        out = ([], [], [])
        for t in range(steps):
            a = given[:, t] + _apply(self.recurrent, h, order)
            i, f, g, o = np.split(a, 4, axis=1)
            c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
            h = _sigmoid(o) * np.tanh(c)
            for held, value in zip(out, (a, c, h)):
                held.append(value)
        return Steps(*(np.stack(held, axis=1) for held in out))


def _apply(matrix, x, order):
    return matrix.forward(x, order) if isinstance(matrix, TTLinear) else x @ matrix.T


# -- integers ----------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def table(function):
    """Table of ``sigmoid`` or ``tanh``: int16 [2**16], entry ``a + 2**15`` is ``round(function(a / 2**11) * 2**15)``,
    halves up, of magnitude 32767 at most."""
    real_function = {"sigmoid": _sigmoid, "tanh": np.tanh}[function]
    a = np.ldexp(np.arange(_INT16.lo, _INT16.hi + 1, dtype=np.float64), SUM_LOG2)
    values = np.floor(np.ldexp(real_function(a), -GATE_LOG2) + 0.5)
    return np.clip(values, -_INT16.hi, _INT16.hi).astype(np.int16)


def _look_up(function, a):
    return table(function)[a - _INT16.lo].astype(np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerLSTM(_Matrix):
    """The layer in integers, exactly as the module says.

    Args: input, recurrent: int8 array or integer TTLinear; input_requantizers, recurrent_requantizers: one
    `golden.chain.Requantizer` (or None, exact) per core in the order of `TTLinear.run`, one for an array; the last of
    each has 16 bits and scale 2**-11. bias: int16 [4 H] at that scale. zero_point: of x; h has 0.
    Raises: InputError if a last requantiser has other bits or is None; ValueError for shapes.
    """

    input: np.ndarray | TTLinear
    recurrent: np.ndarray | TTLinear
    bias: np.ndarray
    input_requantizers: tuple
    recurrent_requantizers: tuple
    zero_point: int = 0

    def __post_init__(self):
        for name in ("input", "recurrent"):
            matrix, given = getattr(self, name), getattr(self, f"{name}_requantizers")
            if not isinstance(matrix, TTLinear):
                object.__setattr__(self, name, integers(name, matrix))
            count = len(matrix.train.cores) if isinstance(matrix, TTLinear) else 1
            if len(given) != count:
                raise ValueError(f"{name}_requantizers must be {count}, not {len(given)}")
            if given[-1] is None or given[-1].bits != 16:
                raise InputError("must end with 16 bits", field=f"{name}_requantizers")
        object.__setattr__(self, "bias", integers("bias", self.bias))
        if self.bias.size and not (_INT16.lo <= self.bias.min() and self.bias.max() <= _INT16.hi):
            raise ValueError("bias must fit 16 bits")
        self._check()

    def run(self, x, *, hidden=None, cell=None):
        """`Steps`, int16 sums and cell, int8 hidden.

        Args: x: integer [N, T, I]; hidden: int8, cell: int16 [N, H], zeros by default.
        Raises: TypeError for floats; ValueError for shapes; OverflowError if an accumulator leaves 32 bits.
        """
        x = integers("x", x)
        self._sequence(x)
        n, steps, _ = x.shape
        h, c = (integers(name, self._state(name, value, n)).astype(np.int64)
                for name, value in (("hidden", hidden), ("cell", cell)))
        given = _integer_apply(self.input, x.reshape(n * steps, -1), self.input_requantizers, self.zero_point)
        given = given.reshape(n, steps, -1) + self.bias.astype(np.int64)
        out = ([], [], [])
        for t in range(steps):
            a = given[:, t] + _integer_apply(self.recurrent, h, self.recurrent_requantizers, 0)
            a = np.clip(a, _INT16.lo, _INT16.hi)
            i, f, g, o = (_look_up("tanh" if gate == "g" else "sigmoid", part)
                          for gate, part in zip(GATES, np.split(a, 4, axis=1)))
            c = np.clip((16 * f * c + i * g + (1 << 18)) >> 19, _INT16.lo, _INT16.hi)
            h = np.clip((o * _look_up("tanh", c) + (1 << 22)) >> 23, _INT8.lo, _INT8.hi)
            for held, value, kind in zip(out, (a, c, h), (np.int16, np.int16, np.int8)):
                held.append(value.astype(kind))
        return Steps(*(np.stack(held, axis=1) for held in out))


def _integer_apply(matrix, x, requantizers, zero_point):
    """int64 [B, rows] of a matrix product and its requantisers."""
    if isinstance(matrix, TTLinear):
        return matrix.run(x, requantizers, zero_point)[-1].output.astype(np.int64)
    acc = accumulate(x[:, None, None, :], matrix[:, None, None, :])[:, 0, 0]
    return requantizers[0].apply(acc).astype(np.int64)


def quantize_tt_linear(layer, x, *, scale, zero_point=0, output_scale, output_bits=16, bits=16):
    """Integer train of a float one: int8 cores with a scale per row, every product requantised.

    The range of an intermediate is the largest magnitude that the calibration inputs cause (symmetric, zero point 0).

    Args: layer: TTLinear; x: integer [B, I] calibration inputs with ``scale`` and ``zero_point``; output_scale,
    output_bits: of the result (zero point 0); bits: of the intermediates, 8 or 16.
    Returns: (TTLinear with int8 cores, tuple of Requantizer as `TTLinear.run` takes them).
    Raises: ValueError for a scale ratio of 4 and more.
    """
    z, at, zero = (integers("x", x).astype(np.int64) - zero_point) * float(scale), float(scale), zero_point
    cores, requantizers = [], []
    for k in reversed(range(len(layer.train.cores))):
        core = layer.train.cores[k]
        r, n, after = core.shape
        matrix = core.reshape((r, n * after) if k >= layer.outputs else (r * n, after))
        q, row_scale = quantize_rows(matrix)
        z = z.reshape(-1, matrix.shape[1]) @ matrix.T
        last = k == 0
        to = float(output_scale) if last else (np.abs(z).max() or 1.0) / IntSpec(bits).hi
        silent = ~q.any(axis=1)                              # any scale will do for rows of zeros
        multiplier, shift = encode_scale(np.where(silent, 1.0, at * row_scale / to))
        requantizers.append(Requantizer(
            bias=fold_bias(np.zeros(len(q), np.int64), q, zero), multiplier=multiplier, shift=shift,
            bits=output_bits if last else bits))
        cores.append(q.reshape(core.shape))
        if k < layer.outputs:                                # as TTLinear.run: the new mode becomes the slowest axis
            z = z.reshape(-1, r, n).transpose(2, 0, 1).reshape(-1, r)
        at, zero = to, 0
    return replace(layer, train=replace(layer.train, cores=tuple(reversed(cores)))), tuple(requantizers)


def quantize_lstm(lstm, x, *, scale, zero_point=0):
    """Integer layer of a float one, calibrated on sequences.

    Args: lstm: LSTM; x: integer [N, T, I] with ``scale`` and ``zero_point``.
    Returns: IntegerLSTM. Raises: ValueError for shapes, a scale ratio of 4 and more, or a bias beyond +-16.
    """
    x = integers("x", x)
    lstm._sequence(x)
    states = lstm.forward((x.astype(np.int64) - zero_point) * float(scale)).hidden
    hidden = np.clip(np.floor(np.ldexp(states, -HIDDEN_LOG2) + 0.5), _INT8.lo, _INT8.hi).astype(np.int8)
    made = {"bias": np.floor(np.ldexp(lstm.bias, -SUM_LOG2) + 0.5).astype(np.int64), "zero_point": zero_point}
    for name, seen, at, zero in (("input", x, float(scale), zero_point), ("recurrent", hidden, 2.0 ** HIDDEN_LOG2, 0)):
        matrix, flat = getattr(lstm, name), seen.reshape(-1, seen.shape[2])
        if isinstance(matrix, TTLinear):
            made[name], requantizers = quantize_tt_linear(matrix, flat, scale=at, zero_point=zero,
                                                          output_scale=2.0 ** SUM_LOG2)
        else:
            q, row_scale = quantize_rows(matrix)
            silent = ~q.any(axis=1)
            multiplier, shift = encode_scale(np.where(silent, 1.0, at * row_scale / 2.0 ** SUM_LOG2))
            made[name] = q
            requantizers = (Requantizer(bias=fold_bias(np.zeros(len(q), np.int64), q, zero), multiplier=multiplier,
                                        shift=shift, bits=16),)
        made[f"{name}_requantizers"] = requantizers
    return IntegerLSTM(**made)
