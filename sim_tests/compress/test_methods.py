"""Method strings, recipes, and what methods do to weights: the paper's example, identities, metrics."""
import numpy as np
import pytest

from compress import methods
from compress.graph import Conv
from golden import structured
from spec.config import Pattern
from spec.errors import InputError

#: The TASD paper's example (arXiv 2403.07953, figure 4): 10 non-zeros, sum 25.
PAPER = np.array([[2, 0, 0, 0, 0, 3, 1, 4], [1, 3, 0, 0, 2, 4, 4, 1]], np.int8).reshape(2, 1, 1, 8)


def random_weights(seed, shape=(6, 3, 3, 16)):
    rng = np.random.default_rng(seed)
    real = rng.normal(0, 1, shape)
    scale = np.abs(real).max(axis=(1, 2, 3)) / 127
    return real, np.round(real / scale[:, None, None, None]).astype(np.int8), scale


@pytest.mark.parametrize("method,count,total", [
    ("nm:2:4", 7, 21), ("tasd:2:4+2:8", 10, 25), ("nm:3:4", 9, 24), ("nm:2:8", 4, 15), ("tasd:2:8+1:8", 6, 20),
    ("nm:4:8", 8, 23), ("tasd:4:8+1:8", 9, 24), ("dense", 10, 25)])
def test_paper_example(method, count, total):
    terms = methods.decompose(PAPER, PAPER.astype(float), methods.parse(method))
    kept = sum(t.values.astype(int) for t in terms)
    assert (np.count_nonzero(kept), kept.sum()) == (count, total)
    metrics = methods.weight_metrics(PAPER, np.ones(2), terms)
    assert metrics["dropped_nonzeros"] == pytest.approx((10 - count) / 10)
    assert metrics["dropped_magnitude"] == pytest.approx((25 - total) / 25)
    assert metrics["density"] == count / 16 and metrics["nonzeros"] == count


def test_second_term_takes_the_residual_of_the_paper():
    first, second = methods.decompose(PAPER, PAPER.astype(float), methods.parse("tasd:2:8+1:8"))
    assert first.values.reshape(2, 8).tolist() == [[0, 0, 0, 0, 0, 3, 0, 4], [0, 0, 0, 0, 0, 4, 4, 0]]
    assert second.values.reshape(2, 8).tolist() == [[2, 0, 0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("method", ["dense", "nm:4:4", "nm:8:8", "tasd:4:8+4:8", "tasd:2:4+1:4+1:4", "tasd:2:4+8:16"])
def test_full_series_is_dense(method):
    real, values, _ = random_weights(1)
    terms = methods.decompose(values, real, methods.parse(method))
    assert np.array_equal(sum(t.values.astype(int) for t in terms), values)


@pytest.mark.parametrize("method", ["nm:2:4", "tasd:4:8+1:8", "tasd:2:4+1:8", "tasd:1:4+1:8+1:16"])
@pytest.mark.parametrize("depth", [16, 13, 3])
def test_terms_fit_their_patterns_and_share_no_element(method, depth):
    real, values, _ = random_weights(2, (5, 3, 2, depth))
    terms = methods.decompose(values, real, methods.parse(method))
    assert [t.pattern for t in terms] == list(methods.parse(method).patterns)
    assert all(structured.fits(t.values, t.pattern) for t in terms)
    assert (sum((t.values != 0).astype(int) for t in terms) <= 1).all()
    kept = sum(t.values.astype(int) for t in terms)
    assert ((kept == values) | (kept == 0)).all()


def test_equal_block_sizes_add_up():
    """Same-M terms equal the view of their sum."""
    real, values, _ = random_weights(3)
    series = sum(t.values for t in methods.decompose(values, real, methods.parse("tasd:4:8+1:8")))
    assert np.array_equal(series, methods.decompose(values, real, methods.parse("nm:5:8"))[0].values)


def test_float_magnitude_decides_between_equal_integers():
    real = np.array([0.50, 0.52, 0.51, 1.0]).reshape(1, 1, 1, 4)
    values = np.array([1, 1, 1, 2], np.int8).reshape(1, 1, 1, 4)
    assert methods.decompose(values, real, methods.parse("nm:2:4"))[0].values.ravel().tolist() == [0, 1, 0, 2]
    assert methods.decompose(values, values.astype(float), methods.parse("nm:2:4"))[0].values.ravel().tolist() == \
        [1, 0, 0, 2], "ties take the lowest channel"


def test_error_never_grows_with_n_or_terms():
    real, values, scale = random_weights(4)
    for chain in (["nm:1:8", "nm:2:8", "nm:4:8", "nm:8:8"], ["nm:1:4", "tasd:1:4+1:8", "tasd:1:4+1:8+2:8"]):
        lost = [methods.weight_metrics(values, scale, methods.decompose(values, real, methods.parse(m)))
                for m in chain]
        for name in ("dropped_nonzeros", "dropped_magnitude"):
            figures = [m[name] for m in lost]
            assert figures == sorted(figures, reverse=True)


def test_storage_bits():
    real, values, _ = random_weights(5, (4, 1, 1, 16))
    bits = {m: methods.weight_bits(methods.decompose(values, real, methods.parse(m)))
            for m in ("dense", "nm:2:4", "nm:4:8", "tasd:4:8+1:8")}
    # per block: 2:4 has 2 (8 + 2) bits, 4:8 has 4 (8 + 3), 1:8 has 8 + 3
    assert bits == {"dense": 512, "nm:2:4": 4 * 4 * 20, "nm:4:8": 4 * 2 * 44, "tasd:4:8+1:8": 4 * 2 * 55}


def test_parsed_method():
    method = methods.parse(" tasd:4:8+1:8 ")
    assert method.patterns == (Pattern(4, 8), Pattern(1, 8)) and method.block == 8 and method.density == 0.625
    assert str(methods.series([(4, 8), (1, 8)])) == "tasd:4:8+1:8" and str(methods.series([(2, 4)])) == "nm:2:4"
    assert str(methods.series([])) == "dense" and methods.parse("dense").density == 1
    assert methods.parse("tasder").searched


@pytest.mark.parametrize("text,reason", [
    ("", "must be dense, nm:N:M, tasd:N:M+N:M…, tasder, svd:F"), ("nm", "must be dense"), ("tasd", "must be dense"),
    ("denes", "did you mean dense?"), ("nmm:2:4", "did you mean nm?"), ("nm:5:4", "must be an N:M pattern"),
    ("nm:0:4", "must be an N:M pattern"), ("nm:2:4:8", "must be an N:M pattern"), ("nm:2:4+1:4", "nm must have one"),
    ("tasd:2:4+", "must be an N:M pattern"), ("tasd:" + "+".join(["1:8"] * 9), "at most 8 terms"),
    ("tasder:2:4", "must be dense"), (None, "must be dense")])
def test_refused_method(text, reason):
    with pytest.raises(InputError) as caught:
        methods.parse(text)
    assert reason in str(caught.value) and "method" in str(caught.value)


def node(depth, groups=1, outputs=4):
    return Conv(name="n", input="a", output="b", weights=np.ones((outputs, 3, 3, depth)), bias=np.zeros(outputs),
                groups=groups)


def test_narrow_and_depthwise_layers_stay_dense():
    method = methods.parse("nm:2:4")
    assert methods.kept_dense(node(1, groups=4), method) == "depthwise"
    assert methods.kept_dense(node(3), method) == "3 input channels, fewer than M = 4"
    assert methods.kept_dense(node(4), method) is None and methods.kept_dense(node(1), methods.parse("dense")) is None


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe(tmp_path):
    plan = methods.recipe(write(tmp_path, "method: nm:2:4\nlayers: {conv1: dense, fc: 'tasd:4:8+1:8'}\n"))
    assert str(plan.method("other")[0]) == "nm:2:4" and not plan.method("other")[1]
    assert str(plan.method("fc")[0]) == "tasd:4:8+1:8" and plan.method("fc")[1]
    plan.check(["conv1", "fc", "x"])
    with pytest.raises(InputError, match=r"layers.conv1 is not a layer with weights \(did you mean conv2\?\)"):
        plan.check(["conv2", "fc"])


@pytest.mark.parametrize("text,reason", [
    ("layers: {}", "method must be given"), ("method: [a]", "must be a method, as text"),
    ("method: nm:2:4\ncolour: red", "colour is not a known field"),
    ("method: nm:2:4\nlayers: [a]", "must be a mapping"),
    ("method: nm:2:4\nlayers: {a: tasder}", "layers.a must not be tasder"),
    ("method: nm:2:4\nlayers: {a: nm:9:4}", "layers.a must be an N:M pattern"),
    ("method: nm:2:4\nlayers: {a: {b: c}}", "layers.a must be a method")])
def test_refused_recipe(tmp_path, text, reason):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        methods.recipe(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)
