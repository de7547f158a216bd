"""golden.tensor_train against TensorLy, the rebuilt dense layer, exact integers and every published count."""
from math import prod, sqrt

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorly
from tensorly import decomposition

from golden.chain import IntegerChain, Requantizer, convolve
from golden.convolution import accumulate
from golden.requantize import requantize
from golden.tensor_train import (ORDERS, TensorTrain, TTConvolution, TTLinear, TTMatrix, check_ranks, tt_convolution,
                                 tt_linear, tt_matrix, tt_svd)
from spec.errors import InputError


def full_ranks(modes):
    """Largest ranks without redundancy."""
    return (1, *(min(prod(modes[:k]), prod(modes[k:])) for k in range(1, len(modes))), 1)


def ghost(modes, ranks):
    """A train of the right shapes that needs no memory, for counts."""
    return TensorTrain(cores=tuple(np.broadcast_to(0.0, (a, n, b)) for a, n, b in zip(ranks, modes, ranks[1:])))


@st.composite
def problems(draw):
    """(modes, legal ranks, seed)."""
    modes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    ranks = [1]
    for most in full_ranks(modes)[1:-1]:
        ranks.append(draw(st.integers(1, most)))
    ranks.append(1)
    for k in range(len(modes)):                       # left to right, then right to left: into the legal region
        ranks[k + 1] = min(ranks[k + 1], ranks[k] * modes[k])
    for k in reversed(range(len(modes))):
        ranks[k] = min(ranks[k], modes[k] * ranks[k + 1])
    return tuple(modes), tuple(ranks), draw(st.integers(0, 2**32))


@given(problems())
def test_svd_against_tensorly(problem):
    modes, ranks, seed = problem
    x = np.random.default_rng(seed).normal(size=modes)
    train = tt_svd(x, ranks)
    assert train.ranks == ranks and train.modes == modes
    assert [c.shape for c in train.cores] == [(a, n, b) for a, n, b in zip(ranks, modes, ranks[1:])]
    theirs = decomposition.tensor_train(tensorly.tensor(x), list(ranks))
    assert list(theirs.rank) == list(ranks)
    assert np.abs(train.to_dense() - theirs.to_tensor()).max() < 1e-9
    assert np.abs(train.to_dense() - tensorly.tt_to_tensor(list(train.cores))).max() < 1e-11
    for core in train.cores[:-1]:                     # orthonormal left cores
        flat = core.reshape(-1, core.shape[2])
        assert np.abs(flat.T @ flat - np.eye(core.shape[2])).max() < 1e-10
    error = np.linalg.norm(x - train.to_dense()) / np.linalg.norm(x)
    assert abs(error - train.meta["relative_error"]) < 1e-9
    # Quasi-optimal: within sqrt(d - 1) of the largest best error of one unfolding, which no train of these ranks beats.
    best = 0.0
    for k in range(1, len(modes)):
        s = np.linalg.svd(x.reshape(prod(modes[:k]), -1), compute_uv=False)
        best = max(best, np.linalg.norm(s[ranks[k]:]))
    best /= np.linalg.norm(x)
    assert best - 1e-9 <= error <= sqrt(len(modes) - 1) * best + 1e-9
    assert train.parameters == sum(c.size for c in theirs.factors) and train.bits(16) == 16 * train.parameters


@pytest.mark.parametrize("modes", [(4, 6), (3, 4, 5), (4, 3, 2, 3, 4), (2, 2, 2, 2, 2, 2)])
def test_full_rank_is_exact(rng, modes):
    x = rng.normal(size=modes)
    train = tt_svd(x, full_ranks(modes))
    assert np.abs(train.to_dense() - x).max() < 1e-12 and train.meta["relative_error"] < 1e-12


def test_low_rank_is_found(rng):
    ranks, modes = (1, 3, 4, 2, 1), (4, 5, 3, 6)
    cores = tuple(rng.normal(size=(a, n, b)) for a, n, b in zip(ranks, modes, ranks[1:]))
    x = TensorTrain(cores=cores).to_dense()
    assert np.abs(tt_svd(x, ranks).to_dense() - x).max() < 1e-11


def test_error_is_monotone_in_rank(rng):
    """Order 2 and 3: in each rank (provable); order 5: in the last, and along uniform ranks of this tensor."""
    x = rng.normal(size=(6, 9, 7))
    table = np.array([[tt_svd(x, (1, a, b, 1)).meta["relative_error"] if a <= 9 * b and b <= 9 * a else np.nan
                       for b in range(1, 8)] for a in range(1, 7)])
    assert (np.diff(table, axis=0) <= 1e-12).all() and (np.diff(table, axis=1) <= 1e-12).all()
    assert table[-1, -1] < 1e-12 < table[0, 0]
    y = rng.normal(size=(4, 3, 5, 3, 4))
    last = [tt_svd(y, (1, 4, 8, 6, r, 1)).meta["relative_error"] for r in (2, 3, 4)]
    whole = [tt_svd(y, (1, r, 2 * r, 2 * r, r, 1)).meta["relative_error"] for r in (1, 2, 3, 4)]
    assert sorted(last, reverse=True) == last and sorted(whole, reverse=True) == whole and len(set(whole)) == 4


def test_a_zero_tensor():
    train = tt_svd(np.zeros((3, 4)), (1, 2, 1))
    assert not train.to_dense().any() and train.meta["relative_error"] == 0


@pytest.mark.parametrize("modes, ranks, text", [
    ((4, 6), (1, 5, 1), r"ranks\[1\] must be at most 1 \* 4 = 4 \(would be clipped\), not 5"),
    ((6, 4), (1, 5, 1), r"ranks\[1\] must be at most 4 \(redundant\), not 5"),
    ((2, 3, 40), (1, 2, 7, 1), r"ranks\[2\] must be at most 2 \* 3 = 6 \(would be clipped\), not 7"),
    ((1024, 1, 256), (1, 85, 40, 1), r"ranks\[1\] must be at most 40 \(redundant\), not 85"),
    ((256, 1, 1024), (1, 40, 85, 1), r"ranks\[2\] must be at most 40 \* 1 = 40 \(would be clipped\), not 85"),
    ((4, 6), (1, 2), r"ranks must be 3 numbers with 1 at both ends"), ((4, 6), (2, 2, 1), "1 at both ends"),
    ((4, 6), (1, 2, 2), "1 at both ends"), ((4, 6), (1, 0, 1), "ranks must be positive integers"),
    ((4, 6), (1, 2.0, 1), "ranks must be positive integers"), ((4, 6), (1, True, 1), "ranks must be positive integers"),
    ((4, 6), None, "ranks must be positive integers"), ((24,), (1, 1), "modes must be at least two"),
])
def test_ranks_are_refused_not_clipped(modes, ranks, text):
    with pytest.raises(InputError, match=text):
        check_ranks(modes, ranks)
    with pytest.raises(InputError):
        tt_svd(np.ones(modes), ranks)


def test_redundant_ranks_on_request(rng):
    """The published [1, 85, 40, 1] in small: stored, without gain."""
    x = rng.normal(size=(9, 1, 6))
    train = tt_svd(x, (1, 5, 4, 1), redundant=True)
    assert train.ranks == (1, 5, 4, 1)
    assert np.abs(train.to_dense() - tt_svd(x, (1, 4, 4, 1)).to_dense()).max() < 1e-12
    for ranks in ((1, 7, 4, 1), (1, 4, 5, 1)):
        with pytest.raises(InputError, match="redundant|clipped"):
            check_ranks((9, 1, 6), ranks, redundant=True)


def test_bad_cores_and_tensors():
    for shapes in (((1, 2, 1),), ((1, 2, 2), (3, 2, 1)), ((2, 2, 2), (2, 2, 1)), ((1, 2, 2), (2, 2, 2)),
                   ((1, 2), (2, 1))):
        cores = tuple(np.ones(s) for s in shapes)
        with pytest.raises(ValueError, match="cores must"):
            TensorTrain(cores=cores)
        with pytest.raises(ValueError, match="cores must"):
            TTMatrix(cores=tuple(c[:, None] for c in cores))
    with pytest.raises(ValueError, match="tensor must be finite"):
        tt_svd(np.array([[np.inf, 1], [1, 1]]), (1, 1, 1))
    with pytest.raises(TypeError, match="tensor must be real"):
        tt_svd(np.array([["a", "b"]]), (1, 1, 1))


# -- fully connected ---------------------------------------------------------------------------------------------------
LINEAR = [((4, 3, 2), (5, 2, 2), (1, 3, 6, 7, 3, 2, 1)), ((6,), (8,), (1, 4, 1)), ((2, 3), (7,), (1, 2, 4, 1)),
          ((5,), (3, 4), (1, 5, 4, 1)), ((1, 4), (3, 1), (1, 1, 2, 1, 1))]


@pytest.mark.parametrize("out_modes, in_modes, ranks", LINEAR)
@pytest.mark.parametrize("batch", [1, 3])
def test_orders_of_a_linear_layer_agree(rng, out_modes, in_modes, ranks, batch):
    w, x = rng.normal(size=(prod(out_modes), prod(in_modes))), rng.normal(size=(batch, prod(in_modes)))
    layer = tt_linear(w, out_modes, in_modes, ranks)
    dense = layer.to_dense()
    theirs = tensorly.tt_to_tensor(decomposition.tensor_train(w.reshape(*out_modes, *in_modes), list(ranks)).factors)
    assert np.abs(dense - theirs.reshape(w.shape)).max() < 1e-10 and layer.shape == w.shape
    for order in (*ORDERS, *((a, b) for a in ORDERS for b in ORDERS)):
        got = layer.forward(x, order)
        assert got.shape == (batch, len(w)) and np.abs(got - x @ dense.T).max() < 1e-11
        products = layer.products(batch, order)
        assert layer.macs(batch, order) == sum(p.m * p.k * p.n for p in products)
        assert layer.largest_intermediate(batch, order) == max(p.m * p.n for p in products)
    r = ranks[len(out_modes)]
    assert layer.macs(batch, "decoupled") == batch * r * sum(w.shape)


def test_full_rank_linear_is_the_matrix(rng):
    w = rng.normal(size=(12, 10))
    layer = tt_linear(w, (3, 4), (2, 5), full_ranks((3, 4, 2, 5)))
    assert np.abs(layer.to_dense() - w).max() < 1e-12


@given(st.integers(0, 2**32))
def test_counted_products_are_those_that_run(seed):
    """Every contraction by einsum, one core at a time, multiplications counted from the index extents."""
    rng = np.random.default_rng(seed)
    m, n = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    modes = [int(v) for v in rng.integers(1, 5, m + n)]
    ranks = full_ranks(modes)
    layer = TTLinear(train=ghost(modes, ranks), outputs=m)
    i_left = prod(modes[m:])
    macs = []
    for k in reversed(range(m, m + n)):               # right to left, inputs: (prefix, n_k r_k) x (r_(k-1))
        i_left //= modes[k]
        macs.append(i_left * modes[k] * ranks[k + 1] * ranks[k])
    done = 1
    for k in reversed(range(m)):                      # outputs
        macs.append(done * modes[k] * ranks[k] * ranks[k + 1])
        done *= modes[k]
    assert [p.macs for p in layer.products()] == macs
    left, carry, i_left = [], ranks[m], prod(modes[m:])
    for k in range(m, m + n):
        i_left //= modes[k]
        kept = 1 if k == m else carry                 # the first core's own left rank is the carried one
        left.append(kept * ranks[k] * modes[k] * ranks[k + 1] * i_left)
    done = modes[0]
    for k in range(1, m):
        left.append(done * ranks[k] * modes[k] * ranks[k + 1])
        done *= modes[k]
    assert [p.macs for p in layer.products(order="left_to_right")] == [*left, done * ranks[m]]
    assert layer.macs(7) == 7 * layer.macs(1)


@pytest.mark.parametrize("out_modes, in_modes, ranks", [
    ((4, 3), (5, 2), (1, 5, 1)), ((4, 3, 2), (5, 2, 2), (1, 7, 4, 1)), ((2, 1, 3), (3, 4, 1), (1, 6, 3, 1))])
def test_tt_matrix(rng, out_modes, in_modes, ranks):
    w, x = rng.normal(size=(prod(out_modes), prod(in_modes))), rng.normal(size=(2, prod(in_modes)))
    layer = tt_matrix(w, out_modes, in_modes, ranks)
    theirs = decomposition.tensor_train_matrix(tensorly.tensor(w.reshape(*out_modes, *in_modes)), list(ranks))
    dense = layer.to_dense()
    assert [c.shape for c in layer.cores] == [f.shape for f in theirs.factors]
    assert np.abs(dense - theirs.to_tensor().reshape(w.shape)).max() < 1e-10
    assert abs(layer.meta["relative_error"] - np.linalg.norm(w - dense) / np.linalg.norm(w)) < 1e-12
    for reverse, order in enumerate(ORDERS[:2]):
        got = layer.forward(x, order)
        assert got.shape == (2, len(w)) and np.abs(got - x @ dense.T).max() < 1e-11
        macs = []                                     # the reference's formula, factor by factor
        for k in range(len(ranks) - 1):
            before, after = (out_modes, in_modes) if reverse else (in_modes, out_modes)
            macs.append(ranks[k] * ranks[k + 1] * out_modes[k] * in_modes[k] * prod(before[:k]) * prod(after[k + 1:]))
        got = [p.macs for p in layer.products(2, order)]
        assert sorted(got) == sorted(2 * v for v in macs) and got == [2 * v for v in (macs if reverse else macs[::-1])]
    assert layer.parameters == sum(c.size for c in theirs.factors) and layer.bits() == 8 * layer.parameters


def test_full_rank_tt_matrix_is_the_matrix(rng):
    w = rng.normal(size=(12, 10))
    assert np.abs(tt_matrix(w, (3, 4), (2, 5), (1, 6, 1)).to_dense() - w).max() < 1e-12


def test_layers_refuse(rng):
    w, k = rng.normal(size=(12, 10)), rng.normal(size=(6, 3, 3, 4))
    layer, matrix = tt_linear(w, (12,), (10,), (1, 4, 1)), tt_matrix(w, (3, 4), (2, 5), (1, 4, 1))
    conv = tt_convolution(k, (1, 3, 2, 1))
    for call, text in [
            (lambda: tt_linear(w, (3, 3), (10,), (1, 3, 4, 1)), r"out_modes must multiply to 12, not \(3, 3\)"),
            (lambda: tt_linear(w, (12,), (3, 3), (1, 3, 3, 1)), "in_modes must multiply to 10"),
            (lambda: tt_matrix(w, (3, 4), (10,), (1, 3, 1)), r"in_modes must be as many as out_modes \(2\)"),
            (lambda: tt_matrix(w, (3, 3), (2, 5), (1, 3, 1)), "out_modes must multiply to 12"),
            (lambda: tt_convolution(k, (1, 2, 3, 2, 1), out_modes=(2, 2)), "out_modes must multiply to 6"),
            (lambda: tt_convolution(k, (1, 2, 3, 2, 1), in_modes=(2, 3)), "in_modes must multiply to 4"),
            (lambda: tt_convolution(k, (1, 7, 2, 1)), "would be clipped"),
            (lambda: tt_linear(w, (12.5,), (10,), (1, 4, 1)), "out_modes must be positive integers"),
            (lambda: layer.forward(rng.normal(size=(1, 10)), "middle_out"), "order must be one of right_to_left"),
            (lambda: layer.products(1, ("decoupled",)), "order must be one of right_to_left"),
            (lambda: conv.products((4, 4), "x"), "order must be one of"),
            (lambda: matrix.forward(np.ones((1, 10)), "decoupled"), "order must be right_to_left or left_to_right"),
            (lambda: matrix.products(1, "decoupled"), "order must be right_to_left or left_to_right"),
            (lambda: TTLinear(train=layer.train, outputs=2), r"outputs must be in 1..1, not 2"),
            (lambda: TTConvolution(train=conv.train, outputs=2, kernel=(3, 3)), "outputs must be in 1..1, not 2"),
            (lambda: TTConvolution(train=conv.train, outputs=1, kernel=(3, 2)), r"kernel must multiply to 9"),
    ]:
        with pytest.raises(InputError, match=text):
            call()
    for one in (layer, matrix):
        with pytest.raises(ValueError, match=r"x must be \[B, 10\]"):
            one.forward(np.ones((1, 9)))
    with pytest.raises(ValueError, match="x must have 4 channels, not 3"):
        conv.forward(np.ones((1, 5, 5, 3)))


# -- integers ----------------------------------------------------------------------------------------------------------
def integer_layer(rng, out_modes=(4, 3, 2), in_modes=(5, 2, 2), ranks=(1, 3, 6, 7, 3, 2, 1), low=-128):
    modes = out_modes + in_modes
    cores = tuple(rng.integers(low, 128, (a, n, b)).astype(np.int8) for a, n, b in zip(ranks, modes, ranks[1:]))
    return TTLinear(train=TensorTrain(cores=cores), outputs=len(out_modes))


@pytest.mark.parametrize("zero_point", [0, -128, 11])
def test_exact_integer_cores_are_the_dense_product(rng, zero_point):
    layer = integer_layer(rng)
    x = rng.integers(-128, 128, (3, 20)).astype(np.int8)
    dense = layer.to_dense()
    assert dense.dtype == np.int64 and np.abs(dense).max() > 1 << 31
    points = layer.run(x, [None] * 6, zero_point)
    want = [[sum(int(w) * (int(v) - zero_point) for w, v in zip(row, line, strict=True)) for row in dense]
            for line in x]
    assert points[-1].output.tolist() == want
    assert [p.accumulator.shape for p in points] == [(p.n, p.m) for p in layer.products(3)]


@pytest.mark.parametrize("bits", [8, 16])
def test_requantised_cores(rng, bits):
    """Each step again by einsum on named axes, then golden.requantize (8) or its formula (16)."""
    layer = integer_layer(rng)
    m, modes, batch, zero = 3, layer.train.modes, 2, -9
    x = rng.integers(-128, 128, (batch, 20)).astype(np.int8)
    requantizers = []
    for k, p in enumerate(layer.products(batch)):
        wide = bits == 16 and k > 0
        shift = 8 + 7 * wide - 7 * (bits == 16)
        requantizers.append(Requantizer(
            bias=rng.integers(-999, 999, p.m), multiplier=rng.integers(20000, 60000, p.m),
            shift=rng.integers(shift, shift + 2, p.m), zero_point=int(rng.integers(-5, 5)), bits=bits))
    points = layer.run(x, requantizers, zero)
    assert len(points) == 6
    state, spread = x.astype(np.int64), []
    for k, q, point in zip(reversed(range(6)), requantizers, points, strict=True):
        core = layer.train.cores[k].astype(np.int64)
        r, n, after = core.shape
        if k >= m:                                    # [b, prefix, n, r'] x [r, n, r']
            prefix = prod(modes[m:k])
            acc = np.einsum("bpns,rns->bpr", state.reshape(batch, prefix, n, after), core)
        else:                                         # [later outputs.., b, r'] x [r, n, r']
            acc = np.einsum("ts,rns->trn", state.reshape(-1, after), core).reshape(-1, r * n)
        acc = acc.reshape(-1, len(q.bias))
        assert np.array_equal(point.accumulator, acc)
        if bits == 8:
            y = requantize(acc, bias=q.bias, multiplier=q.multiplier, shift=q.shift, zero_point=q.zero_point)
        else:
            u = ((acc + q.bias) * q.multiplier) // 2 ** q.shift
            y = np.clip((u + 8192) // 16384 + q.zero_point, -32768, 32767)
        assert point.output.dtype == (np.int8 if bits == 8 else np.int16)
        spread.append(np.unique(y).size)
        state = y.astype(np.int64)
        if k < m:
            state = np.moveaxis(state.reshape(-1, r, n), 2, 0).reshape(-1, r)
    assert np.array_equal(points[-1].output, state.reshape(24, batch).T) and min(spread) > 4
    with pytest.raises(ValueError, match="requantizers must be one for each of 6 cores, not 5"):
        layer.run(x, requantizers[:5])
    with pytest.raises(ValueError, match=r"x must be \[B, 20\]"):
        layer.run(x[:, :19], requantizers)
    with pytest.raises(TypeError, match="x must be an integer array"):
        layer.run(x * 1.0, requantizers)
    with pytest.raises(TypeError, match="cores must be an integer array"):
        tt_linear(np.ones((2, 2)), (2,), (2,), (1, 1, 1)).run(x, [None, None])


def test_integer_accumulators_do_not_wrap(rng):
    layer = integer_layer(rng, (16,), (300,), (1, 16, 1), low=127)
    one = Requantizer(multiplier=65535, shift=0, bits=16)
    assert layer.run(np.full((1, 300), 127, np.int8), [one, one])[0].output.tolist() == [[32767] * 16]
    wide = integer_layer(rng, (2,), (3,), (1, 2, 1), low=127)
    with pytest.raises(OverflowError, match="must fit 32 bits"):
        wide.run(np.full((1, 3), 1 << 24, np.int64), [one, one])


# -- convolutions ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 2), "pads": (1, 1, 1, 1)},
                                      {"stride": (2, 1), "pads": (1, 0, 1, 2), "dilation": (1, 2)}])
@pytest.mark.parametrize("out_modes, in_modes, ranks", [
    (None, None, (1, 5, 6, 1)), ((3, 4), (2, 4), (1, 3, 5, 6, 3, 1)), ((2, 2, 3), (8,), (1, 2, 3, 5, 4, 1)),
    (None, None, (1, 12, 8, 1))])
def test_convolution_as_a_chain(rng, geometry, out_modes, in_modes, ranks):
    w, x = rng.normal(size=(12, 3, 3, 8)), rng.normal(size=(2, 7, 8, 8))
    layer = tt_convolution(w, ranks, out_modes=out_modes, in_modes=in_modes, **geometry)
    theirs = decomposition.tensor_train(w.reshape(*(out_modes or (12,)), 9, *(in_modes or (8,))), list(ranks))
    dense = layer.to_dense()
    assert dense.shape == w.shape and np.abs(dense - theirs.to_tensor().reshape(w.shape)).max() < 1e-9
    want = convolve(x, dense, **geometry)
    for order in ORDERS:
        got = layer.forward(x, order)
        assert got.shape == want.shape and np.abs(got - want).max() < 1e-10
    chain = layer.chain()
    assert np.abs(chain.to_dense() - dense).max() < 1e-12 and np.abs(chain.forward(x)[-1] - want).max() < 1e-10
    assert chain.macs((7, 8)) == layer.macs((7, 8), "decoupled")
    if ranks == (1, 12, 8, 1):
        assert np.abs(dense - w).max() < 1e-12


@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 2), "pads": (1, 1, 1, 1)}])
def test_integer_convolution_train_is_the_dense_convolution(rng, geometry):
    modes, ranks = (2, 3, 9, 2, 4), (1, 2, 4, 3, 2, 1)
    cores = tuple(rng.integers(-128, 128, (a, n, b)).astype(np.int8) for a, n, b in zip(ranks, modes, ranks[1:]))
    layer = TTConvolution(train=TensorTrain(cores=cores), outputs=2, kernel=(3, 3), **geometry)
    dense = layer.to_dense()
    # Halves merged in integers are wider than a byte; nothing is rounded.
    merged = [c.astype(np.int64) for c in cores]
    b = np.einsum("aib,bjc->aijc", merged[3], merged[4]).reshape(3, 8)
    a = np.einsum("aib,bjc->aijc", merged[0], merged[1]).reshape(6, 4)
    want = np.einsum("oa,atb,bi->oti", a, merged[2], b).reshape(6, 3, 3, 8)
    assert dense.dtype == np.int64 and np.array_equal(dense, want)
    stages = layer.chain().stages
    exact = IntegerChain(requantizers=(None,) * 3, stages=tuple(
        type(s)(weights=s.weights.astype(np.int64), **s.geometry) for s in stages))
    x = rng.integers(-128, 128, (1, 6, 7, 8)).astype(np.int8)
    assert np.array_equal(exact.run(x)[-1].output, accumulate(x, dense, **geometry))


# -- published counts --------------------------------------------------------------------------------------------------
#: Reference, section 8: n, m, parameters, ratio, MAC 1->d and d->1, dense-equivalent TOPS, largest intermediate d->1.
TT_MATRIX = {
    "FC6": ((2, 7, 8, 8, 7, 4), (4,) * 6, 2016, 50972, 6889472, 3645440, 7.64, 14.4, 100352),
    "FC7": ((4,) * 6, (4,) * 6, 1152, 14564, 1179648, 1179648, 7.28, 7.28, 16384),
    "UCF11": ((8, 20, 20, 18), (4,) * 4, 2976, 4955, 3151872, 1912832, 2.40, 3.95, 51200),
    "Youtube": ((4, 20, 20, 36), (4,) * 4, 3200, 4608, 5382144, 1417216, 1.40, 5.33, 25600),
}
#: The same for decoupled trains: out, in, ranks, parameters, ratio, MAC, reduction, largest, cycles ideal and tiled.
DECOUPLED = {
    "FC6": ((16,) * 3, (16, 14, 8, 14), (1, 4, 4, 8, 4, 4, 4, 1), 1752, 58653, 154112, 667, 7168, 602, 2248),
    "FC7": ((16,) * 3, (16,) * 3, (1, 4, 4, 8, 4, 2, 1), 1504, 11155, 31744, 529, 4096, 124, 464),
    "UCF11": ((16, 8, 8), (8, 20, 20, 18), (1, 4, 8, 16, 8, 4, 4, 1), 3400, 17348, 294912, 200, 12800, 1152, 4640),
    "Youtube": ((32, 8, 4), (4, 20, 20, 36), (1, 4, 8, 16, 8, 8, 4, 1), 3472, 16988, 292864, 201, 6400, 1144, 4256),
}


@pytest.mark.parametrize("name", TT_MATRIX)
def test_published_tt_matrix_counts(name):
    n, m, parameters, ratio, forth, back, tops_forth, tops_back, largest = TT_MATRIX[name]
    ranks = (1, *[4] * (len(n) - 1), 1)
    layer = TTMatrix(cores=tuple(np.broadcast_to(0.0, (a, o, i, b)) for a, o, i, b in zip(ranks, m, n, ranks[1:])))
    dense = prod(n) * prod(m)
    assert layer.shape == (prod(m), prod(n)) and layer.parameters == parameters and round(dense / parameters) == ratio
    assert (layer.macs(1, "left_to_right"), layer.macs(1, "right_to_left")) == (forth, back)
    for macs, tops in ((forth, tops_forth), (back, tops_back)):            # 256 MAC at 1 GHz, two operations per MAC
        assert abs(2 * dense * 256 / macs / 1000 - tops) < 0.06
    assert layer.largest_intermediate(1) == largest
    if name == "FC6":
        assert layer.largest_intermediate(1, "left_to_right") == 200704


@pytest.mark.parametrize("name", DECOUPLED)
def test_published_decoupled_counts(name):
    out, inputs, ranks, parameters, ratio, macs, reduction, largest, ideal, tiled = DECOUPLED[name]
    layer = TTLinear(train=ghost(out + inputs, check_ranks(out + inputs, ranks)), outputs=len(out))
    dense = prod(layer.shape)
    assert layer.parameters == parameters and round(dense / parameters) == ratio
    assert layer.macs(1) == macs and round(dense / macs) == reduction and macs / 256 == ideal
    assert layer.largest_intermediate(1) == largest and layer.cycles(16, 16, 1) == tiled


def test_published_gain_of_decoupled_trains():
    for name, gain in (("FC6", 24), ("FC7", 37)):
        assert round(min(TT_MATRIX[name][4:6]) / DECOUPLED[name][5]) == gain


def test_published_lstm():
    modes, ranks = (16, 8, 8, 8, 20, 20, 18), (1, 4, 5, 9, 12, 6, 3, 1)
    layer = TTLinear(train=ghost(modes, check_ranks(modes, ranks)), outputs=3)
    assert prod(layer.shape) == 58982400 and layer.parameters == 3302 and layer.macs(1) == 248520
    assert round(58982400 / 3302) == 17863 and round(58982400 / 248520) == 237


#: ResNet-18 TT-general (section 4): out modes, in modes, ranks between, input size, stride; one entry per 3x3 layer.
GENERAL = [
    *[((8, 8), (8, 8), r, 56, 1) for r in [(8, 45, 45, 8), *[(7, 36, 36, 7)] * 3]],
    ((16, 8), (8, 8), (15, 80, 40, 8), 56, 2), *[((16, 8), (8, 16), (15, 72, 72, 15), 28, 1)] * 3,
    ((16, 16), (8, 16), (15, 160, 80, 15), 28, 2), *[((16, 16), (16, 16), (15, 138, 138, 15), 14, 1)] * 3,
    ((32, 16), (16, 16), (30, 236, 138, 15), 14, 2),
    *[((32, 16), (16, 32), r, 7, 1) for r in [(30, 220, 220, 30)] * 2 + [(30, 210, 210, 30)]],
]


def test_published_resnet18_tt_general():
    """Section 6: as given 3.523M / 744.5M (3.12x / 2.25x), merged to three stages 3.06x / 2.32x."""
    parameters = macs = merged = merged_macs = dense = dense_macs = 0
    for out, inputs, inner, size, stride in GENERAL:
        modes = (*out, 9, *inputs)
        layer = TTConvolution(train=ghost(modes, check_ranks(modes, (1, *inner, 1))), outputs=2, kernel=(3, 3),
                              stride=(stride, stride), pads=(1, 1, 1, 1))
        chain = layer.chain()
        parameters, macs = parameters + layer.parameters, macs + layer.macs((size, size))
        merged, merged_macs = merged + chain.parameters, merged_macs + chain.macs((size, size))
        dense, dense_macs = dense + prod(layer.shape), dense_macs + chain.dense_macs((size, size))
    assert (dense, dense_macs) == (10985472, 1676279808)
    assert (parameters, macs) == (3522649, 744454060)
    assert [round(v, 2) for v in (dense / parameters, dense_macs / macs, dense / merged, dense_macs / merged_macs)] == \
        [3.12, 2.25, 3.06, 2.32]


def test_published_deit_ranks_are_legal():
    for outer in range(16, 23):
        for inner in range(12, 16):
            check_ranks((24, 24, 12, 16), (1, outer, 96, inner, 1))


#: ResNet-32 TT "3x" (section 4): modes, output modes, ranks between, input size, stride. The source gives only the
#: range 27..29 for seven of the layers; this is the choice with all three that meets its totals.
RESNET32_TT = [
    *[((16, 9, 16), 1, (16, 16), 32, 1)] * 10, ((8, 4, 9, 4, 4), 2, (8, 32, 16, 4), 32, 2),
    *[((8, 4, 9, 4, 8), 2, (8, 16, 16, 8), 16, 1)] * 9, ((8, 8, 9, 4, 8), 2, (8, 40, 24, 8), 16, 2),
    *[((8, 8, 9, 8, 8), 2, (8, r, r, 8), 8, 1) for r in (27, 27, 27, 27, 28, 28, 29, 24, 15)]]


def test_published_resnet32_tt():
    """Section 6: 163.3K / 46.55M (2.82x / 1.47x); merged to three stages 2.87x / 1.54x; square output factors absorbed
    2.93x / 1.64x; with 11 layers left dense, which have no fewer multiplications, 2.98x / 1.76x."""
    sums, dense, fell = np.zeros((4, 2), int), np.zeros(2, int), 0
    for modes, outputs, inner, size, stride in RESNET32_TT:
        layer = TTConvolution(train=ghost(modes, check_ranks(modes, (1, *inner, 1))), outputs=outputs, kernel=(3, 3),
                              stride=(stride, stride), pads=(1, 1, 1, 1))
        chain, inside = layer.chain(), (size, size)
        whole = np.array([prod(layer.shape), chain.dense_macs(inside)])
        given = np.array([layer.parameters, layer.macs(inside)])
        merged = np.array([chain.parameters, chain.macs(inside)])
        absorbed, last = merged.copy(), chain.stages[-1]
        if last.inputs == last.outputs:                # a square factor multiplies into the middle core
            absorbed -= [last.weights.size, chain.products(inside)[-1].macs]
        dense, fell = dense + whole, fell + bool(given[1] >= whole[1])
        sums += [given, merged, absorbed, whole if given[1] >= whole[1] else absorbed]
    assert len(RESNET32_TT) == 30 and tuple(dense) == (460800, 68419584) and fell == 11
    assert tuple(sums[0]) == (163310, 46548864)
    assert np.round(dense / sums, 2).tolist() == [[2.82, 1.47], [2.87, 1.54], [2.93, 1.64], [2.98, 1.76]]
