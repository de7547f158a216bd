"""golden.tucker against TensorLy, the order-3 tensor train, and the published counts of ResNet-18 and ResNet-32."""
import numpy as np
import pytest
import tensorly
from tensorly import decomposition

from golden.chain import Stage, array_cycles, convolve, three_stages
from golden.tensor_train import tt_convolution
from golden.tucker import block_term, svd, tucker2
from spec.errors import InputError

SAME = (1, 1, 1, 1)


def error(weights, chain):
    return np.linalg.norm(weights - chain.to_dense()) / np.linalg.norm(weights)


def test_svd_is_the_best_of_its_rank(rng):
    w, errors = rng.normal(size=(7, 5)), []
    s = np.linalg.svd(w, compute_uv=False)
    for rank in range(1, 6):
        chain = svd(w, rank)
        dense = chain.to_dense()[:, 0, 0]
        theirs = tensorly.tt_to_tensor(decomposition.tensor_train(w, [1, rank, 1]).factors)
        assert dense.shape == w.shape and np.abs(dense - theirs).max() < 1e-10
        errors.append(chain.meta["relative_error"])
        assert abs(errors[-1] - np.linalg.norm(s[rank:]) / np.linalg.norm(w)) < 1e-12
        assert abs(np.linalg.norm(w - dense) / np.linalg.norm(w) - errors[-1]) < 1e-10
        assert chain.parameters == rank * 12 and chain.macs((2, 3)) == 6 * rank * 12
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12
    x = rng.normal(size=(1, 2, 3, 5))
    assert np.abs(svd(w, 5).forward(x)[-1] - x @ w.T).max() < 1e-12


@pytest.mark.parametrize("ranks", [(1, 1), (4, 3), (9, 6), (3, 6), (6, 1)])
def test_tucker2_without_sweeps_is_the_order_3_train(rng, ranks):
    w = rng.normal(size=(9, 3, 2, 6))
    chain, train = tucker2(w, ranks), tt_convolution(w, (1, *ranks, 1))
    assert np.abs(chain.to_dense() - train.to_dense()).max() < 1e-12
    assert abs(chain.meta["relative_error"] - train.meta["relative_error"]) < 1e-12
    r_out, r_in = ranks
    assert [s.weights.shape for s in chain.stages] == [(r_in, 1, 1, 6), (r_out, 3, 2, r_in), (9, 1, 1, r_out)]


@pytest.mark.parametrize("ranks", [(4, 3), (6, 2), (2, 5)])
def test_sweeps_reach_tensorlys_hooi(rng, ranks):
    # Low rank and noise, so that both find the one best answer from their different starts.
    (r_out, r_in), draw = ranks, rng.normal
    w = np.einsum("oa,arsb,bi->orsi", draw(size=(9, r_out)), draw(size=(r_out, 3, 2, r_in)), draw(size=(r_in, 6)))
    w = w / w.std() + 0.3 * draw(size=w.shape)
    errors = [tucker2(w, ranks, sweeps=n).meta["relative_error"] for n in (0, 1, 2, 4, 100)]
    assert all(b <= a + 1e-12 for a, b in zip(errors, errors[1:])) and errors[-1] < errors[0]
    (core, factors), _ = decomposition.partial_tucker(w, rank=list(ranks), modes=[0, 3], n_iter_max=100, tol=1e-12)
    theirs = np.einsum("oa,arsb,ib->orsi", factors[0], core, factors[1])
    assert abs(errors[-1] - np.linalg.norm(w - theirs) / np.linalg.norm(w)) < 1e-9
    assert np.abs(tucker2(w, ranks, sweeps=100).to_dense() - theirs).max() < 1e-5
    assert abs(error(w, tucker2(w, ranks, sweeps=4)) - errors[3]) < 1e-12


def test_full_rank_is_the_kernel(rng):
    w = rng.normal(size=(5, 3, 3, 4))
    assert np.abs(tucker2(w, (5, 4)).to_dense() - w).max() < 1e-12
    assert np.abs(block_term(w, 1, (5, 4)).to_dense() - w).max() < 1e-12


def test_error_is_monotone_in_rank(rng):
    w = rng.normal(size=(5, 3, 3, 4))
    table = np.array([[error(w, tucker2(w, (a, b))) for b in range(1, 5)] for a in range(1, 6)])
    assert (np.diff(table, axis=0) < 1e-12).all() and (np.diff(table, axis=1) < 1e-12).all()


@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 2), "pads": SAME}, {"pads": (2, 0, 1, 1), "dilation": (2, 1)}])
def test_block_terms_sum(rng, geometry):
    """Rebuilt block by block from the stages' slices, without the grouped convolution."""
    w, x = rng.normal(size=(9, 3, 3, 8)), rng.normal(size=(2, 7, 6, 8))
    chain = block_term(w, 3, (3, 2), **geometry)
    first, middle, last = (s.weights for s in chain.stages)
    assert middle.shape == (9, 3, 3, 2) and chain.stages[1].groups == 3
    total = sum(tensorly.tenalg.multi_mode_dot(middle[3 * n:3 * n + 3], [last[:, 0, 0, 3 * n:3 * n + 3],
                                                                         first[2 * n:2 * n + 2, 0, 0].T], modes=[0, 3])
                for n in range(3))
    assert np.abs(chain.to_dense() - total).max() < 1e-12
    want, got = convolve(x, total, **geometry), chain.forward(x)[-1]
    assert got.shape == want.shape and np.abs(got - want).max() < 1e-11
    assert abs(error(w, chain) - chain.meta["relative_error"]) < 1e-12
    assert chain.parameters == 3 * (3 * 9 + 9 * 6 + 2 * 8)
    ho, wo = got.shape[1:3]
    assert chain.macs((7, 6)) == 6 * 8 * 42 + (9 * 18 + 9 * 9) * ho * wo


def test_block_term_errors(rng):
    w = rng.normal(size=(8, 3, 3, 8))
    sweeps = [block_term(w, 3, (2, 2), sweeps=n).meta["relative_error"] for n in (0, 1, 3, 8)]
    assert all(b <= a + 1e-12 for a, b in zip(sweeps, sweeps[1:])) and sweeps[-1] < sweeps[0]
    blocks = [block_term(w, n, (2, 2), sweeps=0).meta["relative_error"] for n in (1, 2, 3, 4)]
    assert blocks == sorted(blocks, reverse=True) and len(set(blocks)) == 4
    parts = [(rng.normal(size=(8, 2)), rng.normal(size=(2, 3, 3, 2)), rng.normal(size=(2, 8))) for _ in range(2)]
    parts[1] = (parts[1][0] * 0.05, *parts[1][1:])           # well apart, so that the greedy start finds them
    exact = sum(np.einsum("oa,arsb,bi->orsi", *p) for p in parts)
    assert block_term(exact, 2, (2, 2), sweeps=60).meta["relative_error"] < 1e-3


def test_refuses(rng):
    w = rng.normal(size=(6, 1, 2, 4))
    for call, text in [
            (lambda: svd(np.ones((3, 2)), 3), "rank must be an integer in 1..2, not 3"),
            (lambda: svd(np.ones((3, 2)), 1.0), "rank must be an integer in 1..2, not 1.0"),
            (lambda: tucker2(w, (7, 4)), r"ranks.r_out must be an integer in 1..6, not 7"),
            (lambda: tucker2(w, (6, 5)), r"ranks.r_in must be an integer in 1..4, not 5"),
            (lambda: tucker2(w, (5, 2)), r"ranks.r_out must be an integer in 1..4, not 5"),
            (lambda: tucker2(w, (1, 3)), r"ranks.r_in must be an integer in 1..2, not 3"),
            (lambda: tucker2(w, (0, 1)), "ranks.r_out must be an integer in 1..6, not 0"),
            (lambda: tucker2(w, 3), "ranks must be a pair"), (lambda: tucker2(w, (3, 2), sweeps=-1), "sweeps must be"),
            (lambda: block_term(w, 3, (3, 2)), "blocks must be an integer in 1..2, not 3"),
            (lambda: block_term(w, 0, (3, 2)), "blocks must be an integer in 1..2, not 0"),
            (lambda: block_term(w, 1, (3, 2), sweeps=True), "sweeps must be an integer"),
    ]:
        with pytest.raises(InputError, match=text):
            call()
    with pytest.raises(ValueError, match="weights must have 4 axes"):
        tucker2(np.ones((2, 2)), (1, 1))


# -- published counts: (outputs, inputs, input size, stride) of the 3x3 layers -----------------------------------------
RESNET32 = [(16, 16, 32, 1)] * 10 + [(32, 16, 32, 2)] + [(32, 32, 16, 1)] * 9 + [(64, 32, 16, 2)] + [(64, 64, 8, 1)] * 9
RESNET18 = [layer for o, size in ((64, 56), (128, 28), (256, 14), (512, 7))
            for layer in [(o, o, size, 1) if o == 64 else (o, o // 2, 2 * size, 2), *[(o, o, size, 1)] * 3]]
TUCKER_3X = [(16, 16)] * 10 + [(24, 20)] + [(20, 20)] * 9 + [(32, 25)] + [(25, 23)] * 9
SPECIAL = [(45, 45), (36, 36), (32, 32), (32, 32), (80, 40), (70, 70), (65, 65), (64, 64), (130, 65), (120, 120),
           (120, 120), (115, 115), (250, 122), (240, 240), (230, 230), (220, 220)]
TUCKER_2X = [(42, 42), *[(40, 40)] * 3, (80, 40), (70, 70), (70, 70), (64, 64), (128, 64), *[(120, 120)] * 3,
             (220, 120), (220, 220), (210, 210), (200, 200)]


def layer_chain(layer, ranks):
    (o, i, _, stride), (r_out, r_in) = layer, ranks
    return three_stages(np.broadcast_to(0.0, (o, r_out)), np.broadcast_to(0.0, (r_out, 3, 3, r_in)),
                        np.broadcast_to(0.0, (r_in, i)), stride=(stride, stride), pads=SAME)


def totals(layers, ranks):
    """Parameters and MACs: dense, as given, with dense fallback where MACs do not fall; layers that fell back."""
    out = np.zeros((3, 2), int)
    fell = 0
    for layer, pair in zip(layers, ranks, strict=True):
        chain, size = layer_chain(layer, pair), (layer[2], layer[2])
        dense = np.array([layer[0] * layer[1] * 9, chain.dense_macs(size)])
        given = np.array([chain.parameters, chain.macs(size)])
        fell += bool(given[1] >= dense[1])
        out += [dense, given, dense if given[1] >= dense[1] else given]
    return out, fell


@pytest.mark.parametrize("layers, ranks, given, ratio, fallback, fell", [
    (RESNET32, TUCKER_3X, (161759, 47256512), (2.85, 1.45), (2.96, 1.65), 11),
    (RESNET18, SPECIAL, (3526441, 649850740), (3.12, 2.58), (3.12, 2.58), 0),
    (RESNET18, TUCKER_2X, (3205088, 680773268), (3.43, 2.46), (3.43, 2.46), 0),
])
def test_published_cost(layers, ranks, given, ratio, fallback, fell):
    """Reference, section 6: 161.8K / 47.26M, 3.526M / 649.9M, 3.205M / 680.8M."""
    out, count = totals(layers, ranks)
    assert tuple(out[0]) == ((460800, 68419584) if layers is RESNET32 else (10985472, 1676279808))
    assert tuple(out[1]) == given and count == fell
    assert tuple(np.round(out[0] / out[1], 2)) == ratio and tuple(np.round(out[0] / out[2], 2)) == fallback


def rounded(rule, lane, rank):
    """A rank rounded to a multiple of ``lane``, at least one lane."""
    if rule == "up":
        return -(-rank // lane) * lane
    if rule == "down":
        return max(lane, rank // lane * lane)
    return max(lane, ((rank + lane // 2) // lane if rule == "ties up" else round(rank / lane)) * lane)


#: Reference, section 7: rule -> (speed-up on 16x16 at 8/16/32, on 32x32, million parameters, layers left dense). The
#: reference prints 2.65 for 2.6447.
ROUNDING = {
    "up": ((2.38, 2.26, 1.92), (2.15, 2.04, 1.93), (3.63, 3.80, 4.12), (0, 0, 3)),
    "ties up": ((2.47, 2.60, 2.74), (2.25, 2.46, 2.73), (3.55, 3.57, 3.68), (0, 0, 0)),
    "ties even": ((2.57, 2.64, 2.78), (2.40, 2.52, 2.78), (3.54, 3.56, 3.67), (0, 0, 0)),
    "down": ((2.69, 2.94, 3.17), (2.56, 2.84, 3.17), (3.44, 3.31, 2.98), (0, 0, 0)),
}


def array_figures(rule, lane, side):
    """(speed-up over dense on the same array, million parameters, layers left dense)."""
    dense_total = total = parameters = fell = 0
    for layer, pair in zip(RESNET18, SPECIAL, strict=True):
        o, i, size, stride = layer
        ranks = pair if rule is None else [min(rounded(rule, lane, r), most) for r, most in zip(pair, (o, i))]
        chain = layer_chain(layer, ranks)
        whole = Stage(weights=np.broadcast_to(0.0, (o, 3, 3, i)), stride=(stride, stride), pads=SAME)
        dense = whole.product((size, size)).cycles(side, side)
        cycles, words = array_cycles(chain.products((size, size)), side, side), chain.parameters
        if cycles >= dense:
            cycles, words, fell = dense, o * i * 9, fell + 1
        dense_total, total, parameters = dense_total + dense, total + cycles, parameters + words
    return dense_total / total, parameters / 1e6, fell


def test_published_cycles_without_rounding():
    assert [round(array_figures(None, 1, side)[0], 2) for side in (16, 32)] == [2.45, 2.22]


@pytest.mark.parametrize("rule", ROUNDING)
def test_published_rank_rounding(rule):
    small, large, millions, dense = ROUNDING[rule]
    for n, lane in enumerate((8, 16, 32)):
        for side, wanted in ((16, small[n]), (32, large[n])):
            speed, parameters, fell = array_figures(rule, lane, side)
            assert abs(speed - wanted) <= 0.0051 and abs(parameters - millions[n]) <= 0.0051 and fell == dense[n]
