"""Tensor trains: TT-SVD, fully connected layers in three contraction orders, convolutions, the paired TT-matrix.

``X[i_1, .., i_d] ~= G_1[i_1] G_2[i_2] .. G_d[i_d]`` with cores G_k of shape [r_(k-1), n_k, r_k], r_0 = r_d = 1.

A decoupled train has all output modes first, then (for a convolution) one mode of R*S taps, then all input modes. The
TT-matrix has modes (output_k, input_k) in pairs; it is another format with other costs.

Source: reference on tensor trains, sections 2, 3 and 8; TT-SVD: I. Oseledets, "Tensor-Train Decomposition", 2011.
"""
from dataclasses import dataclass, field
from math import prod

import numpy as np

from golden._check import integers
from golden.chain import Checkpoint, Product, Stage, array_cycles, convolve, real, three_stages
from golden.convolution import accumulate, fold_bias
from spec.errors import InputError

#: Contraction orders of a layer.
ORDERS = ("right_to_left", "left_to_right", "decoupled")


def _numbers(name, value):
    """``value`` as a non-empty tuple of positive ints. Raises InputError."""
    values = tuple(value) if isinstance(value, (tuple, list, np.ndarray)) else ()
    if not values or any(isinstance(v, (bool, np.bool_)) or not isinstance(v, (int, np.integer)) or v < 1
                         for v in values):
        raise InputError("must be positive integers", field=name, value=value)
    return tuple(int(v) for v in values)


def check_ranks(modes, ranks, *, redundant=False):
    """``ranks`` as ints if a train over ``modes`` can have them; nothing is ever clipped.

    ``r_0 = r_d = 1;  r_k <= r_(k-1) n_k`` (else TT-SVD would clip);  ``r_(k-1) <= n_k r_k`` (else redundant).

    Args: modes: (n_1 .. n_d), d >= 2; ranks: (1, r_1 .. r_(d-1), 1); redundant: accept ranks of the second kind, which
    are stored without gain (a published table has them), as long as they are not above the product of all modes after.
    Raises: InputError naming the rank.
    """
    modes, ranks = _numbers("modes", modes), _numbers("ranks", ranks)
    if len(modes) < 2:
        raise InputError("must be at least two", field="modes", value=modes)
    if len(ranks) != len(modes) + 1 or ranks[0] != 1 or ranks[-1] != 1:
        raise InputError(f"must be {len(modes) + 1} numbers with 1 at both ends", field="ranks", value=ranks)
    for k, n in enumerate(modes):
        if ranks[k + 1] > ranks[k] * n:
            raise InputError(f"must be at most {ranks[k]} * {n} = {ranks[k] * n} (would be clipped)",
                             field=f"ranks[{k + 1}]", value=ranks[k + 1])
        most = prod(modes[k:]) if redundant else n * ranks[k + 1]
        if ranks[k] > most:
            raise InputError(f"must be at most {most} (redundant)", field=f"ranks[{k}]", value=ranks[k])
    return ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorTrain:
    """Cores [r_(k-1), n_k, r_k]; ``meta`` has kind, modes, ranks and, from `tt_svd`, relative_error (Frobenius)."""

    cores: tuple[np.ndarray, ...]
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        cores = tuple(np.asarray(c) for c in self.cores)
        if len(cores) < 2 or any(c.ndim != 3 or not c.size for c in cores):
            raise ValueError("cores must be at least two arrays [r, n, r']")
        ends = [(a.shape[2], b.shape[0]) for a, b in zip(cores, cores[1:])]
        if any(a != b for a, b in ends) or cores[0].shape[0] != 1 or cores[-1].shape[2] != 1:
            raise ValueError(f"cores must join at equal ranks with 1 at both ends, not {[c.shape for c in cores]}")
        object.__setattr__(self, "cores", cores)

    @property
    def modes(self):
        """(n_1 .. n_d)."""
        return tuple(c.shape[1] for c in self.cores)

    @property
    def ranks(self):
        """(1, r_1 .. r_(d-1), 1)."""
        return (1, *(c.shape[2] for c in self.cores))

    @property
    def parameters(self):
        """``sum r_(k-1) n_k r_k``."""
        return sum(c.size for c in self.cores)

    def bits(self, weight_bits=8):
        """Storage of the cores, without scales."""
        return self.parameters * weight_bits

    def to_dense(self):
        """The tensor of shape `modes` (integer cores: int64, exact)."""
        return _merge(self.cores).reshape(self.modes)


def _merge(cores):
    """Product of consecutive cores: [r_first, n .. n, r_last] as [r_first, product, r_last]."""
    widen = np.int64 if np.issubdtype(cores[0].dtype, np.integer) else np.float64
    total = cores[0].astype(widen)
    for core in cores[1:]:
        total = np.tensordot(total, core.astype(widen), axes=(2, 0)).reshape(total.shape[0], -1, core.shape[2])
    return total


def tt_svd(tensor, ranks, *, redundant=False):
    """TT-SVD: quasi-optimal, error at most sqrt(d - 1) times the best. Left cores are orthonormal.

    ``t = X;  for k: u s v = svd(reshape(t, [r_(k-1) n_k, rest]));  G_k = u[:, :r_k];  t = diag(s) v`` truncated.
    ``|X - X~|**2`` is exactly the sum of all discarded ``s**2``. The signs of the vectors are free.

    Args: tensor: real, d >= 2 axes; ranks, redundant: see `check_ranks`.
    Returns: TensorTrain. Raises: InputError for illegal ranks; TypeError, ValueError for an unfit tensor.
    """
    t = real("tensor", tensor)
    modes, lost, norm = t.shape, 0.0, np.linalg.norm(t)
    ranks = check_ranks(modes, ranks, redundant=redundant)
    cores = []
    for k, n in enumerate(modes[:-1]):
        u, s, v = np.linalg.svd(t.reshape(ranks[k] * n, -1), full_matrices=False)
        r = ranks[k + 1]
        lost += float(np.sum(s[r:] ** 2))
        cores.append(u[:, :r].reshape(ranks[k], n, r))
        t = s[:r, None] * v[:r]
    cores.append(t.reshape(ranks[-2], modes[-1], 1))
    return TensorTrain(cores=tuple(cores), meta={
        "kind": "tt", "modes": list(modes), "ranks": list(ranks),
        "relative_error": float(np.sqrt(lost) / norm) if norm else 0.0})


# -- halves: all input cores, all output cores -------------------------------------------------------------------------
def _orders(order):
    """(order of the input half, of the output half). Raises InputError."""
    pair = (order, order) if isinstance(order, str) else tuple(order)
    if len(pair) != 2 or any(o not in ORDERS for o in pair):
        raise InputError(f"must be one of {', '.join(ORDERS)}, or a pair (inputs, outputs) of them", field="order",
                         value=order)
    return pair


def _inputs(cores, x, order):
    """``z[b, a] = sum_i (G_1 .. G_n)[a, i] x[b, i]``: x [B, I] -> [B, r]."""
    batch, carry = len(x), cores[0].shape[0]
    if order == "decoupled":
        return x @ _merge(cores)[:, :, 0].T
    if order == "right_to_left":
        z = x
        for core in reversed(cores):
            r, n, after = core.shape
            z = z.reshape(-1, n * after) @ core.reshape(r, n * after).T
        return z.reshape(batch, carry)
    _, n, after = cores[0].shape                             # its left rank is carried along to the end
    z = np.einsum("bnt,cns->bcst", x.reshape(batch, n, -1), cores[0])
    for core in cores[1:]:
        r, n, after = core.shape
        z = np.einsum("bcrnt,rns->bcst", z.reshape(batch, carry, r, n, -1), core)
    return z.reshape(batch, carry)


def _input_products(cores, batch, order):
    """Products of `_inputs`."""
    carry, left = cores[0].shape[0], prod(c.shape[1] for c in cores)
    if order == "decoupled":
        return [Product(carry, left, batch)]
    out = []
    if order == "right_to_left":
        for r, n, after in (c.shape for c in reversed(cores)):
            left //= n
            out.append(Product(r, n * after, batch * left))
        return out
    for k, (r, n, after) in enumerate(c.shape for c in cores):
        left //= n
        out.append(Product(after, r * n, batch * carry * left) if k else Product(carry * after, n, batch * left))
    return out


def _outputs(cores, z, order):
    """``y[b, o] = sum_a (G_1 .. G_m)[o, a] z[b, a]``: z [B, r] -> [B, O]."""
    batch = len(z)
    if order == "right_to_left":
        for core in reversed(cores):
            r, n, after = core.shape
            z = _new_slowest(z @ core.reshape(r * n, after).T, r, n)
        return z.reshape(-1, batch).T
    return z @ _merge(cores)[0].T                            # merged beforehand, or now: one and the same product


def _output_products(cores, batch, order):
    """Products of `_outputs`; left to right those that merge the cores are among them."""
    rank, total = cores[-1].shape[2], prod(c.shape[1] for c in cores)
    if order == "decoupled":
        return [Product(total, rank, batch)]
    out, done = [], 1
    if order == "right_to_left":
        for r, n, after in (c.shape for c in reversed(cores)):
            out.append(Product(r * n, after, batch * done))
            done *= n
        return out
    for k, (r, n, after) in enumerate(c.shape for c in cores):
        if k:
            out.append(Product(n * after, r, done))
        done *= n
    return [*out, Product(total, rank, batch)]


def _new_slowest(z, r, n):
    """[T, r * n] -> [n * T, r]: the new output mode becomes the slowest axis."""
    return z.reshape(-1, r, n).transpose(2, 0, 1).reshape(-1, r)


class _Cost:
    """Counts that follow from ``products``."""

    def macs(self, *args, **kwargs):
        """Multiplications (arguments as ``products``)."""
        return sum(p.macs for p in self.products(*args, **kwargs))

    def largest_intermediate(self, *args, **kwargs):
        """Most words that one product leaves behind, the output included (arguments as ``products``)."""
        return max(p.result_words for p in self.products(*args, **kwargs))

    def cycles(self, rows, columns, *args, **kwargs):
        """Cycles on an output-stationary array, `golden.chain.array_cycles` (further arguments as ``products``)."""
        return array_cycles(self.products(*args, **kwargs), rows, columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class TTLinear(_Cost):
    """Fully connected layer ``y = W x`` as a decoupled train: ``train`` has the ``outputs`` output modes first.

    Orders: ``right_to_left`` takes the cores last to first, as section 3 of the reference.
    ``left_to_right`` takes input cores first to last (carrying the middle rank), and multiplies the output cores first
    to last before they meet the data. ``decoupled`` merges each half into one matrix beforehand: ``O x r``, ``r x I``.
    A pair (order of inputs, order of outputs) mixes them. The results are equal, the costs are not.
    """

    train: TensorTrain
    outputs: int

    def __post_init__(self):
        if not 1 <= self.outputs < len(self.train.cores):
            raise InputError(f"must be in 1..{len(self.train.cores) - 1}", field="outputs", value=self.outputs)

    @property
    def meta(self):
        """Of the train."""
        return self.train.meta

    @property
    def shape(self):
        """(O, I)."""
        return prod(self.train.modes[:self.outputs]), prod(self.train.modes[self.outputs:])

    @property
    def parameters(self):
        """Weights stored."""
        return self.train.parameters

    def bits(self, weight_bits=8):
        """Storage of the cores, without scales."""
        return self.train.bits(weight_bits)

    def to_dense(self):
        """W [O, I]."""
        return self.train.to_dense().reshape(self.shape)

    def _halves(self):
        return self.train.cores[:self.outputs], self.train.cores[self.outputs:]

    def products(self, batch=1, order="right_to_left"):
        """Matrix products of ``batch`` inputs, in order (weights merged beforehand are not counted)."""
        inputs, outputs = _orders(order)
        out_cores, in_cores = self._halves()
        return _input_products(in_cores, batch, inputs) + _output_products(out_cores, batch, outputs)

    def forward(self, x, order="right_to_left"):
        """y [B, O] of x [B, I], float64."""
        x = real("x", x, 2)
        if x.shape[1] != self.shape[1]:
            raise ValueError(f"x must be [B, {self.shape[1]}], not {x.shape}")
        inputs, outputs = _orders(order)
        out_cores, in_cores = self._halves()
        return _outputs(out_cores, _inputs(in_cores, x, inputs), outputs)

    def run(self, x, requantizers, zero_point=0):
        """Integer run, right to left, one `golden.chain.Requantizer` or None (exact) per core in that order.

        A stage's channels are the rows of its matrix: r_j for an input core, (r_i, O_i), the latter fastest, for an
        output core. Bias and None as in `golden.chain.IntegerChain`.

        Args: x: integer [B, I]; the cores must be integers. Returns: list of Checkpoint, accumulator and output
        [products' n, rows]; the last output is y [B, O].
        """
        x = integers("x", x)
        cores = [integers("cores", c) for c in self.train.cores]
        if x.ndim != 2 or x.shape[1] != self.shape[1]:
            raise ValueError(f"x must be [B, {self.shape[1]}], not {x.shape}")
        if len(requantizers) != len(cores):
            raise ValueError(f"requantizers must be one for each of {len(cores)} cores, not {len(requantizers)}")
        z, out = x, []
        for k, requantizer in zip(reversed(range(len(cores))), requantizers):
            r, n, after = cores[k].shape
            matrix = cores[k].reshape((r, n * after) if k >= self.outputs else (r * n, after))
            acc = accumulate(z.reshape(1, 1, -1, matrix.shape[1]), matrix[:, None, None, :])[0, 0]
            if requantizer is None:
                z, zero_point = acc + fold_bias(np.zeros(len(matrix), np.int64), matrix, zero_point), 0
            else:
                z, zero_point = requantizer.apply(acc), requantizer.zero_point
            if k < self.outputs:
                z = _new_slowest(z, r, n)
            out.append(Checkpoint(acc, z))
        out[-1] = Checkpoint(out[-1].accumulator, out[-1].output.reshape(-1, len(x)).T)
        return out


def tt_linear(weights, out_modes, in_modes, ranks, *, redundant=False):
    """Decoupled train of a matrix: modes (O_1 .. O_m, I_1 .. I_n).

    Args: weights: real [O, I]; out_modes, in_modes: factors of O and I; ranks: (1, r_1 .. r_(m+n-1), 1), `check_ranks`.
    Returns: TTLinear. Raises: InputError for modes that do not multiply to the shape, or illegal ranks.
    """
    w = real("weights", weights, 2)
    out_modes, in_modes = _numbers("out_modes", out_modes), _numbers("in_modes", in_modes)
    _factors("out_modes", out_modes, w.shape[0])
    _factors("in_modes", in_modes, w.shape[1])
    train = tt_svd(w.reshape(*out_modes, *in_modes), ranks, redundant=redundant)
    return TTLinear(train=train, outputs=len(out_modes))


def _factors(name, modes, size):
    if prod(modes) != size:
        raise InputError(f"must multiply to {size}", field=name, value=modes)


@dataclass(frozen=True, kw_only=True, eq=False)
class TTConvolution(_Cost):
    """Convolution as a train with modes (O_1 .. O_m, R*S, I_1 .. I_n); order 3 is the "special" form ``[O, R*S, I]``.

    Runs as input half at input resolution, RxS convolution r_in -> r_out, output half at output resolution.
    Fields: train; ``outputs``: m >= 1, at least one input mode remains; kernel (R, S); stride, pads, dilation.
    """

    train: TensorTrain
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self):
        if not 1 <= self.outputs < len(self.train.cores) - 1:
            raise InputError(f"must be in 1..{len(self.train.cores) - 2}", field="outputs", value=self.outputs)
        _factors("kernel", tuple(self.kernel), self.train.modes[self.outputs])

    @property
    def meta(self):
        """Of the train."""
        return self.train.meta

    @property
    def parameters(self):
        """Weights stored."""
        return self.train.parameters

    def bits(self, weight_bits=8):
        """Storage of the cores, without scales."""
        return self.train.bits(weight_bits)

    @property
    def shape(self):
        """(O, R, S, I)."""
        modes = self.train.modes
        return prod(modes[:self.outputs]), *self.kernel, prod(modes[self.outputs + 1:])

    def to_dense(self):
        """Kernel [O, R, S, I]."""
        return self.train.to_dense().reshape(self.shape)

    def _parts(self):
        cores, m = self.train.cores, self.outputs
        r_out, _, r_in = cores[m].shape
        core = Stage(weights=cores[m].reshape(r_out, *self.kernel, r_in), stride=self.stride, pads=self.pads,
                     dilation=self.dilation)
        return cores[:m], core, cores[m + 1:]

    def chain(self):
        """The three-stage chain with each half merged into one matrix (float, or integers: exact)."""
        out_cores, core, in_cores = self._parts()
        return three_stages(_merge(out_cores)[0], core.weights, _merge(in_cores)[:, :, 0], **core.geometry,
                            meta=dict(self.meta))

    def products(self, size, order="right_to_left"):
        """Matrix products of one image of input ``size`` (H, W), in order."""
        inputs, outputs = _orders(order)
        out_cores, core, in_cores = self._parts()
        ho, wo = core.output_size(size)
        return [*_input_products(in_cores, size[0] * size[1], inputs), core.product(size),
                *_output_products(out_cores, ho * wo, outputs)]

    def forward(self, x, order="right_to_left"):
        """y [N, Ho, Wo, O] of x [N, H, W, I], float64."""
        inputs, outputs = _orders(order)
        x = real("x", x, 4)
        if x.shape[3] != self.shape[3]:
            raise ValueError(f"x must have {self.shape[3]} channels, not {x.shape[3]}")
        out_cores, core, in_cores = self._parts()
        n, h, w, c = x.shape
        z = _inputs(in_cores, x.reshape(-1, c), inputs).reshape(n, h, w, -1)
        z = convolve(z, core.weights, **core.geometry)
        return _outputs(out_cores, z.reshape(-1, z.shape[3]), outputs).reshape(*z.shape[:3], -1)


def tt_convolution(weights, ranks, *, out_modes=None, in_modes=None, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1),
                   redundant=False):
    """Train of a kernel [O, R, S, I] with modes (out_modes, R*S, in_modes); by default order 3.

    ``ranks`` = (1, .., r_out, r_in, .., 1), see `check_ranks`. Returns: TTConvolution. Raises: as `tt_linear`.
    """
    w = real("weights", weights, 4)
    o, r, s, i = w.shape
    out_modes = _numbers("out_modes", (o,) if out_modes is None else out_modes)
    in_modes = _numbers("in_modes", (i,) if in_modes is None else in_modes)
    _factors("out_modes", out_modes, o)
    _factors("in_modes", in_modes, i)
    train = tt_svd(w.reshape(*out_modes, r * s, *in_modes), ranks, redundant=redundant)
    return TTConvolution(train=train, outputs=len(out_modes), kernel=(r, s), stride=stride, pads=pads,
                         dilation=dilation)


@dataclass(frozen=True, kw_only=True, eq=False)
class TTMatrix(_Cost):
    """Fully connected layer with paired modes: cores [r_(k-1), m_k, n_k, r_k] (m: outputs, n: inputs).

    ``right_to_left`` (d -> 1): MAC(k) = r_(k-1) r_k m_k n_k prod_(j<k) n_j prod_(j>k) m_j; ``left_to_right`` exchanges
    j < k and j > k. There is no decoupled order.
    """

    cores: tuple[np.ndarray, ...]
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        cores = tuple(np.asarray(c) for c in self.cores)
        if len(cores) < 2 or any(c.ndim != 4 or not c.size for c in cores):
            raise ValueError("cores must be at least two arrays [r, m, n, r']")
        if any(a.shape[3] != b.shape[0] for a, b in zip(cores, cores[1:])) or cores[0].shape[0] != 1 \
                or cores[-1].shape[3] != 1:
            raise ValueError(f"cores must join at equal ranks with 1 at both ends, not {[c.shape for c in cores]}")
        object.__setattr__(self, "cores", cores)

    @property
    def shape(self):
        """(O, I)."""
        return prod(c.shape[1] for c in self.cores), prod(c.shape[2] for c in self.cores)

    @property
    def parameters(self):
        """``sum r_(k-1) m_k n_k r_k``."""
        return sum(c.size for c in self.cores)

    def bits(self, weight_bits=8):
        """Storage of the cores, without scales."""
        return self.parameters * weight_bits

    def to_dense(self):
        """W [O, I]."""
        total = _merge([c.reshape(c.shape[0], -1, c.shape[3]) for c in self.cores])
        pairs = [n for c in self.cores for n in c.shape[1:3]]
        d = len(self.cores)
        return total.reshape(pairs).transpose(*range(0, 2 * d, 2), *range(1, 2 * d, 2)).reshape(self.shape)

    def products(self, batch=1, order="right_to_left"):
        """Matrix products of ``batch`` inputs, in order."""
        if order not in ORDERS[:2]:
            raise InputError(f"must be {ORDERS[0]} or {ORDERS[1]}", field="order", value=order)
        reverse, out, rest = order == ORDERS[0], [], self.shape[1]
        for r, m, n, after in (c.shape for c in (reversed(self.cores) if reverse else self.cores)):
            rest //= n
            out.append(Product(r * m if reverse else m * after, n * (after if reverse else r), batch * rest))
            rest *= m
        return out

    def forward(self, x, order="right_to_left"):
        """y [B, O] of x [B, I], float64."""
        x = real("x", x, 2)
        if x.shape[1] != self.shape[1]:
            raise ValueError(f"x must be [B, {self.shape[1]}], not {x.shape}")
        if order not in ORDERS[:2]:
            raise InputError(f"must be {ORDERS[0]} or {ORDERS[1]}", field="order", value=order)
        batch, done = len(x), 1
        z = x
        if order == "right_to_left":
            for core in reversed(self.cores):                # [B, modes left, n, r', outputs done]
                r, m, n, after = core.shape
                z = np.einsum("bpnsd,rmns->bprmd", z.reshape(batch, -1, n, after, done), core)
                done *= m
        else:
            for core in self.cores:                          # [B, outputs done, r, n, modes left]
                r, m, n, after = core.shape
                z = np.einsum("bdrnp,rmns->bdmsp", z.reshape(batch, done, r, n, -1), core)
                done *= m
        return z.reshape(batch, -1)


def tt_matrix(weights, out_modes, in_modes, ranks, *, redundant=False):
    """TT-SVD of a matrix [O, I] with modes in pairs (m_k * n_k); arguments and errors as `tt_linear`."""
    w = real("weights", weights, 2)
    out_modes, in_modes = _numbers("out_modes", out_modes), _numbers("in_modes", in_modes)
    if len(out_modes) != len(in_modes):
        raise InputError(f"must be as many as out_modes ({len(out_modes)})", field="in_modes", value=in_modes)
    _factors("out_modes", out_modes, w.shape[0])
    _factors("in_modes", in_modes, w.shape[1])
    d = len(out_modes)
    paired = w.reshape(*out_modes, *in_modes).transpose(*(a for k in range(d) for a in (k, d + k)))
    train = tt_svd(paired.reshape([m * n for m, n in zip(out_modes, in_modes)]), ranks, redundant=redundant)
    cores = tuple(c.reshape(c.shape[0], m, n, c.shape[2]) for c, m, n in zip(train.cores, out_modes, in_modes))
    return TTMatrix(cores=cores, meta={**train.meta, "kind": "tt_matrix", "out_modes": list(out_modes),
                                       "in_modes": list(in_modes)})
