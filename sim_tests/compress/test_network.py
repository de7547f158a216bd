"""The network's types: what they derive from their fields."""
import numpy as np

from compress.network import Convolution
from sim_tests.compress.networks import small_network


def test_terms_sum_to_the_effective_weights():
    network = small_network("tasd:2:4+1:8")[0]
    layers = [v for v in network.layers if isinstance(v, Convolution) and len(v.terms) == 2]
    assert len(layers) == 3
    for layer in layers:
        weights = layer.effective_weights()
        assert weights.dtype == np.int32 and weights.shape == (layer.outputs, *layer.kernel, weights.shape[3])
        assert np.array_equal(weights, layer.terms[0].values.astype(int) + layer.terms[1].values)
        assert not layer.terms[0].dense


def test_shapes_and_order():
    network = small_network()[0]
    made = {network.input}
    for layer in network.layers:
        assert {layer.input, layer.residual} - {None} <= made
        made.add(layer.output)
    assert made == set(network.tensors) and network.tensors[network.input].shape == (8, 8, 3)
