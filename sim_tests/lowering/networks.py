"""Random layers for the tests, and their exact results from the golden operations alone."""
import numpy as np

from compress.network import Add, BasisConvolution, Convolution, Network, Pool, Requantization, Tensor, Term
from golden.basis import IntegerDecomposition
from golden.convolution import accumulate
from golden.machine import Machine
from golden.pooling import average_pool_sum, max_pool
from golden.requantize import requantize
from lowering import lower
from lowering.basis import uses_basis
from spec.config import Pattern


def tensor(name, height, width, channels, zero_point=-5):
    return Tensor(name=name, height=height, width=width, channels=channels, scale=0.1, zero_point=zero_point)


def requantization(rng, channels, *, zero_point=3, low=-128, high=127, residual=False):
    return Requantization(
        bias=rng.integers(-2000, 2000, channels).astype(np.int32),
        multiplier=rng.integers(16384, 65536, channels).astype(np.uint16),
        shift=rng.integers(4, 9, channels).astype(np.uint8), zero_point=zero_point, low=low, high=high,
        residual_zero_point=7 if residual else 0, residual_multiplier=11000 if residual else 0)


def random_term(rng, pattern, shape):
    """Full-range weights that use all of an N:M pattern along the last axis."""
    values = rng.integers(-128, 128, shape)
    if pattern.n < pattern.m:
        pad = -shape[-1] % pattern.m
        padded = np.pad(values, [(0, 0)] * 3 + [(0, pad)])
        blocks = padded.reshape(*shape[:3], -1, pattern.m)
        order = rng.permuted(np.broadcast_to(np.arange(pattern.m), blocks.shape), axis=-1)
        values = np.where(order < pattern.n, blocks, 0).reshape(padded.shape)[..., :shape[-1]]
    return Term(pattern=pattern, values=values.astype(np.int8))


def convolution(rng, name="conv", *, size, channels, outputs, kernel=(3, 3), patterns=("8:8",), stride=(1, 1),
                pads=(0, 0, 0, 0), dilation=(1, 1), groups=1, residual=False, source="x", target="y", zero_point=-5):
    """(layer, output tensor) for an input of ``size``."""
    height, width = (
        (size[a] + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilation[a] - 1) // stride[a] + 1 for a in (0, 1))
    shape = (outputs, *kernel, channels // groups)
    terms = tuple(random_term(rng, Pattern.parse(p), shape) for p in patterns)
    layer = Convolution(name=name, input=source, output=target, residual="r" if residual else None, terms=terms,
                        requantization=requantization(rng, outputs, residual=residual), stride=stride, pads=pads,
                        dilation=dilation, groups=groups, format="+".join(patterns))
    return layer, tensor(target, height, width, outputs, 3)


def basis_convolution(rng, name="basis", *, size, channels, outputs, count, kernel=(3, 3), density=0.3, stride=(1, 1),
                      pads=(0, 0, 0, 0), dilation=(1, 1), intermediate_bits=16, residual=False, source="x", target="y"):
    """(layer, output tensor) with ``count`` full-range basis kernels and irregular coefficients."""
    height, width = (
        (size[a] + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilation[a] - 1) // stride[a] + 1 for a in (0, 1))
    shape = outputs, channels, count
    signs = rng.choice([-1, 1], shape) * (rng.random(shape) < density)
    layer = BasisConvolution(name=name, input=source, output=target, residual="r" if residual else None,
                             requantization=requantization(rng, outputs, residual=residual),
                             basis=rng.integers(-128, 128, (count, *kernel)).astype(np.int8),
                             coefficients=signs.astype(np.int8), intermediate_bits=intermediate_bits, stride=stride,
                             pads=pads, dilation=dilation, format=f"basis:{count}")
    return layer, tensor(target, height, width, outputs, 3)


def pool(rng, name="pool", *, size, channels, kind, window, stride, pads=(0, 0, 0, 0), source="x", target="y"):
    height, width = ((size[a] + pads[a] + pads[a + 2] - window[a]) // stride[a] + 1 for a in (0, 1))
    r = requantization(rng, channels)
    if kind == "max":
        r = Requantization(bias=np.zeros(channels, np.int32), multiplier=np.full(channels, 16384, np.uint16),
                           shift=np.zeros(channels, np.uint8), zero_point=0)
    layer = Pool(name=name, input=source, output=target, requantization=r, kind=kind, window=window, stride=stride,
                 pads=pads)
    return layer, tensor(target, height, width, channels, 3)


def add(rng, name="add", *, size, channels, source="x", target="y"):
    layer = Add(name=name, input=source, output=target, residual="r",
                requantization=requantization(rng, channels, residual=True))
    return layer, tensor(target, *size, channels, 3)


def network(size, channels, layers, tensors):
    every = [tensor("x", *size, channels), *tensors]
    last = tensors[-1]
    if any(layer.residual == "r" for layer in layers):
        every.append(tensor("r", last.height, last.width, last.channels, 7))
    return Network(name="test", input="x", output=last.name, tensors={t.name: t for t in every}, layers=tuple(layers))


def expected(layer, values, tensors):
    """int8 [batch, height, width, outputs] of a layer, from the golden operations."""
    x, zero = values[layer.input], tensors[layer.input].zero_point
    if isinstance(layer, Convolution):
        acc = accumulate(x, [t.values for t in layer.terms], stride=layer.stride, pads=layer.pads,
                         dilation=layer.dilation, groups=layer.groups, pad_value=zero)
    elif isinstance(layer, BasisConvolution):
        acc = IntegerDecomposition(basis=layer.basis, coefficients=layer.coefficients).run(
            x.astype(np.int64) - zero, stride=layer.stride, pads=layer.pads, dilation=layer.dilation,
            intermediate_bits=layer.intermediate_bits).output
    elif isinstance(layer, Add):
        acc = x.astype(np.int64)
    elif layer.kind == "max":
        acc = max_pool(x, layer.window, layer.stride, layer.pads).astype(np.int64)
    else:
        acc = average_pool_sum(x, layer.window, layer.stride, layer.pads, pad_value=zero)
    r = layer.requantization
    extra = {}
    if layer.residual:
        extra = {"residual": values[layer.residual], "residual_zero_point": r.residual_zero_point,
                 "residual_multiplier": r.residual_multiplier}
    return requantize(acc, bias=r.bias, multiplier=r.multiplier, shift=r.shift, zero_point=r.zero_point, low=r.low,
                      high=r.high, **extra)


def check(net, config, rng, *, batch=1, layers=None):
    """Lower, run in the golden machine, compare every element of every tensor made. Returns (Lowered, Machine)."""
    lowered = lower(net, config, batch=batch, layers=layers)
    memory = lowered.new_memory()
    # Whatever lies in memory before must not matter.
    memory[lowered.image.size:] = rng.integers(0, 256, memory.size - lowered.image.size)
    values = {}
    for name in lowered.inputs:
        t = net.tensors[name]
        values[name] = rng.integers(-128, 128, (batch, *t.shape)).astype(np.int8)
        lowered.write_tensor(memory, name, values[name])
    machine = Machine(config, memory)
    machine.run(lowered.program_offset, lowered.instruction_count)
    chosen = [layer for layer in net.layers if layers is None or layer.name in layers]
    for layer in chosen:
        values[layer.output] = expected(layer, values, net.tensors)
        got = lowered.read_tensor(memory, layer.output)
        np.testing.assert_array_equal(got, values[layer.output], err_msg=layer.name)
    _check_counts(machine.counts["pixel_steps"], chosen, config, lowered)
    assert machine.mark == len(chosen) and not any(machine.tokens.values())
    return lowered, machine


def _check_counts(steps, chosen, config, lowered):
    """The multiplications that the lowering promises are those that the machine did, each engine's by itself."""
    for layer, info in zip(chosen, lowered.layers):
        multipliers = config.basis.multiplications if uses_basis(layer, config) else config.structured.multipliers
        assert info.macs_executed % multipliers == 0
        steps -= info.macs_executed // multipliers
    assert steps == 0
