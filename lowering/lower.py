"""`lower`: a compressed network for one configuration -> program, memory image, tensor placements, figures."""
from dataclasses import dataclass

import numpy as np

from lowering.basis import make_basis_job, uses_basis
from lowering.basis_emit import BasisEmitter
from lowering.basis_tiling import BasisTiler
from lowering.emit import LayerEmitter
from lowering.job import make_job, planes_of
from lowering.layout import TENSOR_ALIGN_BYTES, Constants, Placement, align
from lowering.program import Program
from lowering.tiling import Tiler
from spec.derive import Sizes
from spec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """Figures of one layer's lowering."""

    name: str
    #: convolution, max_pool, average_pool or add.
    op: str
    format: str
    #: Number of the BARRIER behind the layer (register MARK), 1 for the first.
    mark: int
    input: str
    output: str
    residual: str | None
    #: Multipliers of the engine that runs it.
    multipliers: int
    #: Multiplications of the dense layer, all images; 0 for pooling and addition.
    macs_dense: int
    #: Multiplications the engine performs, idle slots included: steps x pixels x multipliers of the structured engine,
    #: micro-steps x multiplications of the basis engine.
    macs_executed: int
    #: Steps of one output strip of one column group; on the basis engine its passes.
    steps: int
    #: Instructions first .. last of the program, the BARRIER included (and first loads of the next layer before it).
    first_instruction: int
    last_instruction: int
    #: Bytes of weight tiles in memory; on the basis engine of taps and coefficients.
    weight_bytes: int
    #: Hardware patterns N:block that run, in order. On the basis engine the terms N:group of the longest series, or
    #: ``maps``; ``dense`` and ``pointwise`` for layers that are not decomposed.
    patterns: tuple[str, ...]
    plan: object


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A program with its memory image. All offsets are from register MEMORY_BASE."""

    config: object
    batch: int
    #: Bytes the accelerator may touch (register MEMORY_BYTES); a multiple of 4096.
    memory_bytes: int
    #: uint8: constants and program; lies at offset 0.
    image: np.ndarray
    program_offset: int
    instruction_count: int
    tensors: dict[str, Placement]
    layers: tuple[LayerInfo, ...]
    #: Tensors that must be written before the program runs.
    inputs: tuple[str, ...]
    #: Tensors that the program makes, in order.
    outputs: tuple[str, ...]

    def new_memory(self):
        """uint8 [memory_bytes] with the image in place and zeros elsewhere."""
        memory = np.zeros(self.memory_bytes, np.uint8)
        memory[:self.image.size] = self.image
        return memory

    def write_tensor(self, memory, name, array):
        """Write int8 [batch, height, width, channels] (or without batch if it is 1) into a memory."""
        self._placement(name).write(memory, array)

    def read_tensor(self, memory, name, *, padded=False):
        """int8 [batch, height, width, channels] from a memory; ``padded``: with the last group's padding channels."""
        return self._placement(name).read(memory, padded=padded)

    def _placement(self, name):
        if name not in self.tensors:
            raise InputError(f"must be one of {sorted(self.tensors)}", field="tensor", value=name)
        return self.tensors[name]


def lower(network, config, *, batch=1, layers=None):
    """Lower a network, or the named layers of it, for a configuration.

    Args:
        network: `compress.network.Network`.
        config: `spec.config.Config`. A basis convolution runs on its basis engine, every other layer on its structured
            engine if there is one.
        batch: images per run, 1..1024; each has its own place in every tensor.
        layers: names of the layers to lower, in any order; None for all. Tensors that these layers read and none of
            them makes are inputs.
    Returns: `Lowered`.
    Raises: InputError for an unknown layer name, a layer that the configuration does not support (pattern, number of
        terms, accumulator growth) or a size that an instruction field cannot hold.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= 1024:
        raise InputError("must be an integer in 1..1024", field="batch", value=batch)
    chosen = _choose(network, layers)
    sizes = Sizes(config)
    tensors, inputs, outputs, total = _place(network, chosen, sizes, batch)
    program, constants = Program(sizes), Constants()
    emitters = [_prepare(layer, mark, sizes=sizes, tensors=tensors, batch=batch, program=program, constants=constants)
                for mark, layer in enumerate(chosen, 1)]
    emitters[0].begin()
    infos = []
    for emitter, layer, following in zip(emitters, chosen, [*emitters[1:], None]):
        infos.append(_emit(emitter, layer, following, program))
    program_offset = align(constants.bytes, 128)
    words = program.finish(tensor_base := align(program_offset + _program_bytes(program, sizes), TENSOR_ALIGN_BYTES))
    image = constants.image(program_offset + words.size)
    image[program_offset:] = words.reshape(-1)
    placed = {name: _moved(p, tensor_base) for name, p in tensors.items()}
    return Lowered(config=config, batch=batch, memory_bytes=tensor_base + total, image=image,
                   program_offset=program_offset, instruction_count=len(words), tensors=placed, layers=tuple(infos),
                   inputs=inputs, outputs=outputs)


def _choose(network, names):
    if names is None:
        return list(network.layers)
    known = {layer.name for layer in network.layers}
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in known:
            raise InputError(f"must be a layer of {network.name}: {', '.join(sorted(known))}", field="layer",
                             value=name)
    if not names:
        raise InputError("must name at least one layer", field="layers")
    return [layer for layer in network.layers if layer.name in set(names)]


def _place(network, chosen, sizes, batch):
    """Placements relative to the first tensor; inputs; outputs; bytes."""
    made, inputs, placed, at = [layer.output for layer in chosen], [], {}, 0
    seen = set()
    for layer in chosen:
        for name in (layer.input, layer.residual):
            if name is not None and name not in seen and name not in inputs:
                inputs.append(name)
        seen.add(layer.output)
    for name in [*inputs, *made]:
        t = network.tensors[name]
        if t.width >= 1 << 20 or t.height * t.width >= 1 << 28:
            raise InputError("must be narrower than 2**20 pixels and smaller than 2**28 pixels (fields of LOAD_TILE)",
                             field=f"tensor {name}", value=t.shape)
        placed[name] = Placement(name=name, offset=at, images=batch, planes=planes_of(t.channels, sizes),
                                 height=t.height, width=t.width, channels=t.channels, unit_bytes=sizes.unit_bytes,
                                 zero_point=t.zero_point, group_channels=sizes.group_channels)
        at = align(at + placed[name].bytes, TENSOR_ALIGN_BYTES)
    limit = 1 << sizes.config.bus.address_bits
    if at > limit // 2:
        raise InputError(f"must address all tensors ({at} bytes, at most half of memory)", field="bus.address_bits",
                         value=sizes.config.bus.address_bits)
    return placed, tuple(inputs), tuple(made), at


def _prepare(layer, mark, *, sizes, tensors, batch, program, constants):
    if uses_basis(layer, sizes.config):
        job = make_basis_job(layer, sizes=sizes, mark=mark, tensors=tensors, batch=batch)
        tiler = BasisTiler(job, sizes, batch)
        return BasisEmitter(job, tiler.plan(), tiler, sizes, program, constants, batch)
    job = make_job(layer, sizes=sizes, mark=mark, tensors=tensors, batch=batch)
    tiler = Tiler(job, sizes, batch)
    return LayerEmitter(job, tiler.plan(), tiler, sizes, program, constants, batch)


def _emit(emitter, layer, following, program):
    """A layer's instructions, then what the following layer can load ahead, then the barrier."""
    first = len(program.instructions)
    emitter.emit()
    if following is not None:
        following.begin(emitter)
        following.preload()
    program.barrier(emitter.job.mark)
    job, config = emitter.job, emitter.sizes.config
    engine = config.basis.multiplications if isinstance(emitter, BasisEmitter) else config.structured.multipliers
    return LayerInfo(
        multipliers=engine,
        name=layer.name, op=job.op, format=job.format, mark=job.mark, input=layer.input, output=layer.output,
        residual=layer.residual, macs_dense=job.macs_dense, macs_executed=emitter.macs_executed,
        steps=emitter.steps_total, first_instruction=first, last_instruction=len(program.instructions) - 1,
        weight_bytes=emitter.weight_bytes, patterns=emitter.patterns, plan=emitter.plan)


def _program_bytes(program, sizes):
    """Bytes of the finished program (END is still to come)."""
    return (len(program.instructions) + 1) * sizes.instruction_beats * sizes.beat_bytes


def _moved(placement, base):
    fields = {k: getattr(placement, k) for k in placement.__dataclass_fields__}
    return Placement(**fields | {"offset": placement.offset + base})
