"""The accelerator configuration: everything a user sets, with its range and its unit.

A configuration is a frozen tree. `load` reads one from YAML or by preset name; what follows from it (widths, beats,
memory depths) is computed in `spec.derive` and nowhere else.
"""
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from hashlib import sha256
import json
from pathlib import Path
import re
from typing import NamedTuple

from spec import strict_yaml
from spec.errors import InputError

#: Folder of the presets that `load` finds by name.
PRESETS = Path(__file__).resolve().parent.parent / "configs"


class IntSpec(NamedTuple):
    """A number format: ``bits`` wide, two's complement if ``signed``."""

    bits: int
    signed: bool = True

    @property
    def lo(self):
        """Smallest value."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def hi(self):
        """Largest value."""
        return (1 << self.bits - self.signed) - 1


class Pattern(NamedTuple):
    """N:M structured sparsity: at most ``n`` non-zeros in each block of ``m`` consecutive elements."""

    n: int
    m: int

    def __str__(self):
        return f"{self.n}:{self.m}"

    @property
    def density(self):
        """Largest fraction of non-zeros."""
        return self.n / self.m

    @classmethod
    def parse(cls, text, *, field=None):
        """``"2:4"`` -> Pattern(2, 4). Raises InputError unless 1 <= N <= M <= 64."""
        match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", str(text).strip())
        pattern = cls(int(match[1]), int(match[2])) if match else None
        if pattern is None or not 1 <= pattern.n <= pattern.m <= 64:
            raise InputError("must be an N:M pattern with 1 <= N <= M <= 64", field=field, value=text)
        return pattern


def _int(lo, hi, *, power_of_two=False, default, unit):
    """An integer field with its range; the unit is part of the documentation and of messages."""
    return field(default=default, metadata={"lo": lo, "hi": hi, "power_of_two": power_of_two, "unit": unit})


def _choice(*known, default):
    """A field with one of a few words."""
    return field(default=default, metadata={"known": known})


class _Section:
    """Checks every field of a section against its declared range."""

    def __post_init__(self):
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if "known" in meta and value not in meta["known"]:
                raise InputError(f"must be {' or '.join(meta['known'])}", field=f.name, value=value)
            if "lo" not in meta:
                continue
            good = isinstance(value, int) and not isinstance(value, bool) and meta["lo"] <= value <= meta["hi"]
            if good and meta["power_of_two"]:
                good = value & (value - 1) == 0
            if not good:
                kind = "a power of two" if meta["power_of_two"] else "an integer"
                raise InputError(f"must be {kind} in {meta['lo']}..{meta['hi']} ({meta['unit']})", field=f.name,
                                 value=value)


@dataclass(frozen=True, kw_only=True)
class StructuredConfig(_Section):
    """The structured engine: ``columns`` x ``slots`` multipliers fed by N:M weights."""

    #: Outputs computed in parallel; also the channels in one DRAM channel group.
    columns: int = _int(2, 64, power_of_two=True, default=16, unit="outputs")
    #: Multipliers per column.
    slots: int = _int(2, 64, power_of_two=True, default=16, unit="multipliers")
    #: Block size M of the hardware; weights in N:m with m dividing M run as (N*M/m):M.
    block: int = _int(2, 16, power_of_two=True, default=8, unit="elements")
    #: Supported N:M patterns, N a power of two, M = block; dense (M:M) is always among them.
    patterns: tuple = (Pattern(1, 8), Pattern(2, 8), Pattern(4, 8), Pattern(8, 8))
    #: Most terms of a series that one layer may have.
    terms: int = _int(1, 8, default=4, unit="terms")
    #: Independent addresses per stream fetch: narrow layers fill one fetch from several kernel taps.
    taps: int = _int(1, 4, power_of_two=True, default=4, unit="addresses")
    #: Width of the stream port in blocks; 0 stands for slots / N_min, which never throttles a pattern.
    stream_blocks: int = _int(0, 64, default=0, unit="blocks, 0 = full width")
    #: Operand widths; operands are stored in bytes whatever their width.
    activation_bits: int = _int(2, 8, default=8, unit="bits")
    weight_bits: int = _int(2, 8, default=8, unit="bits")
    accumulator_bits: int = _int(16, 32, default=32, unit="bits")
    #: Output pixels in each of the two accumulator banks.
    accumulator_depth: int = _int(4, 4096, power_of_two=True, default=128, unit="pixels")

    def __post_init__(self):
        super().__post_init__()
        for name in ("columns", "slots"):
            if getattr(self, name) % self.block:
                raise InputError(f"must be a multiple of block ({self.block})", field=name, value=getattr(self, name))
        if not self.patterns:
            raise InputError("must name at least one pattern", field="patterns", value=self.patterns)
        for p in self.patterns:
            if p.m != self.block:
                raise InputError(f"must all have M = block ({self.block})", field="patterns", value=str(p))
            if p.n & (p.n - 1):
                raise InputError("must all have N a power of two (other N run as a sum of these)", field="patterns",
                                 value=str(p))
        if len(set(self.patterns)) != len(self.patterns):
            raise InputError("must not repeat a pattern", field="patterns", value=[str(p) for p in self.patterns])
        if Pattern(self.block, self.block) not in self.patterns:
            raise InputError(f"must contain the dense pattern {self.block}:{self.block}", field="patterns",
                             value=[str(p) for p in self.patterns])
        object.__setattr__(self, "patterns", tuple(sorted(self.patterns)))
        if self.stream_blocks & (self.stream_blocks - 1):
            raise InputError("must be 0 or a power of two", field="stream_blocks", value=self.stream_blocks)
        dense = self.slots // self.block
        full = self.slots // self.patterns[0].n
        if self.stream_blocks and not dense <= self.stream_blocks <= full:
            raise InputError(f"must be 0 or in {dense}..{full} for these slots and patterns", field="stream_blocks",
                             value=self.stream_blocks)

    @property
    def multipliers(self):
        """Multiplications per cycle."""
        return self.columns * self.slots


@dataclass(frozen=True, kw_only=True)
class BasisConfig(_Section):
    """The basis engine: ``blocks`` x ``slices`` x ``multipliers`` multipliers behind ternary coefficient stages."""

    #: Channels of a channel group, and M of the coefficients' N:M series; with a structured engine its ``columns``.
    group: int = _int(4, 16, power_of_two=True, default=16, unit="channels")
    #: Outputs computed in parallel. Fewer than ``group``: every group in memory has so many channels and padding.
    blocks: int = _int(2, 16, default=16, unit="outputs")
    #: Basis kernels that one pass applies; layers with more take several passes.
    slices: int = _int(1, 9, default=6, unit="basis kernels")
    #: Multipliers per slice: kernel taps of one row that one cycle applies.
    multipliers: int = _int(1, 9, default=3, unit="multipliers")
    #: How the coefficient stage works: an N:M series, or two-level maps of irregular coefficients.
    coefficients: str = _choice("series", "maps", default="series")
    #: Add/subtract lanes per slice.
    lanes: int = _int(4, 16, power_of_two=True, default=16, unit="lanes")
    #: Channel groups that the stream delivers per cycle; for maps also the look-ahead of the lanes plus 1.
    stream_groups: int = _int(1, 16, power_of_two=True, default=16, unit="channel groups")
    #: Maps only: neighbour lanes whose activations a lane may take.
    look_aside: int = _int(0, 3, default=2, unit="lanes")
    #: Width of the intermediate IR; beyond it IR saturates, which is counted.
    intermediate_bits: int = _int(8, 20, default=16, unit="bits")
    #: Intermediates between the coefficient stage and the multipliers.
    fifo_depth: int = _int(2, 16, default=4, unit="pixels")
    #: Pixels of one row within reach of a kernel row: (kernel_w - 1) * dilation + 1 must not exceed it.
    window: int = _int(1, 15, default=7, unit="pixels")
    #: Rows of taps in each half of the tap memory; 3 x 3 takes 3, a 1 x 1 layer one for each input channel group.
    tap_rows: int = _int(4, 128, power_of_two=True, default=32, unit="rows")
    #: Stream words of coefficients in each half of the coefficient memory.
    coefficient_rows: int = _int(2, 64, power_of_two=True, default=16, unit="rows")
    #: Output pixels in each of the two accumulator banks; with a structured engine its ``accumulator_depth``.
    accumulator_depth: int = _int(4, 4096, power_of_two=True, default=128, unit="pixels")

    def __post_init__(self):
        super().__post_init__()
        if self.blocks > self.group:
            raise InputError(f"must not exceed group ({self.group})", field="blocks", value=self.blocks)
        if self.lanes != self.group:
            raise InputError(f"must be equal to group ({self.group})", field="lanes", value=self.lanes)
        if self.slices * self.multipliers < self.group:
            raise InputError(f"times slices must be at least group ({self.group}): a pointwise layer multiplies a "
                             "group per cycle", field="multipliers", value=self.multipliers)

        if self.multipliers > self.window:
            raise InputError(f"must not exceed window ({self.window})", field="multipliers", value=self.multipliers)

    @property
    def multiplications(self):
        """Multiplications per cycle."""
        return self.blocks * self.slices * self.multipliers


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(_Section):
    """On-chip memories."""

    #: Activation scratchpad, banked one block wide.
    activation_bytes: int = _int(256, 1 << 20, power_of_two=True, default=131072, unit="bytes")
    #: Weight buffer: packed weight tiles, as in DRAM.
    weight_bytes: int = _int(256, 1 << 20, power_of_two=True, default=131072, unit="bytes")
    #: Residual operands waiting for the requantiser.
    residual_bytes: int = _int(64, 1 << 18, power_of_two=True, default=8192, unit="bytes")
    #: Entries of the step table.
    step_entries: int = _int(16, 4096, power_of_two=True, default=512, unit="steps")
    #: Channel groups whose bias, multiplier and shift fit on chip.
    parameter_groups: int = _int(2, 256, power_of_two=True, default=32, unit="channel groups")


@dataclass(frozen=True, kw_only=True)
class BusConfig(_Section):
    """AXI4 master to memory, AXI4-Lite slave for registers (always 32 bits wide)."""

    data_bits: int = _int(32, 1024, power_of_two=True, default=128, unit="bits")
    address_bits: int = _int(32, 40, default=32, unit="bits")
    #: Longest burst.
    burst_beats: int = _int(1, 256, power_of_two=True, default=64, unit="beats")
    outstanding_reads: int = _int(1, 16, default=8, unit="bursts")
    outstanding_writes: int = _int(1, 16, default=8, unit="bursts")


@dataclass(frozen=True, kw_only=True)
class ControlConfig(_Section):
    """Command processor."""

    #: Instructions waiting before each of the load, execute and store units.
    queue_depth: int = _int(2, 64, power_of_two=True, default=8, unit="instructions")
    #: Instructions fetched ahead.
    fetch_depth: int = _int(2, 64, power_of_two=True, default=8, unit="instructions")
    #: Default of the watchdog register.
    watchdog_cycles: int = _int(256, (1 << 31) - 1, default=100_000, unit="cycles")


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """One accelerator; a variant is made with ``dataclasses.replace``. At least one of the two engines is there."""

    name: str = "nm256"
    structured: StructuredConfig | None = StructuredConfig()
    basis: BasisConfig | None = None
    memory: MemoryConfig = MemoryConfig()
    bus: BusConfig = BusConfig()
    control: ControlConfig = ControlConfig()

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", self.name):
            raise InputError("must be a lower-case identifier of at most 32 characters", field="name", value=self.name)
        if self.structured is None and self.basis is None:
            raise InputError("must be there if basis is not: an accelerator needs an engine", field="structured",
                             value="none")
        if self.structured is not None:
            self._check_structured(self.structured)
        if self.basis is not None:
            self._check_basis(self.basis)
        bus_bytes = self.bus.data_bits // 8
        unit, block = self._unit_and_block()
        if unit > bus_bytes:
            name = "structured.columns" if self.structured is not None else "basis.group"
            raise InputError(f"must be at least 8 * {name} ({8 * unit})", field="bus.data_bits",
                             value=self.bus.data_bits)
        if self.memory.activation_bytes > 65536 * block:
            raise InputError(f"must be at most 65536 blocks ({65536 * block})", field="memory.activation_bytes",
                             value=self.memory.activation_bytes)
        if self.memory.residual_bytes < 2 * unit:
            raise InputError(f"must hold at least two pixels ({2 * unit})", field="memory.residual_bytes",
                             value=self.memory.residual_bytes)
        if self.bus.burst_beats * bus_bytes > 4096:
            raise InputError(f"must not exceed 4 KiB per burst ({4096 // bus_bytes} beats at this width)",
                             field="bus.burst_beats", value=self.bus.burst_beats)

    def _unit_and_block(self):
        """Bytes of a unit and of a scratchpad block."""
        if self.structured is not None:
            return self.structured.columns, self.structured.block
        return self.basis.group, self.basis.group

    def _check_structured(self, s):
        tile_bytes = s.multipliers + -(-s.multipliers * (s.block.bit_length() - 1) // 8)
        if self.memory.weight_bytes < 4 * tile_bytes:
            raise InputError(f"must hold at least four weight tiles ({4 * tile_bytes})", field="memory.weight_bytes",
                             value=self.memory.weight_bytes)
        full = s.stream_blocks or s.slots // s.patterns[0].n
        if self.memory.activation_bytes < 16 * full * s.block:
            raise InputError(f"must hold at least 16 stream words ({16 * full * s.block})",
                             field="memory.activation_bytes", value=self.memory.activation_bytes)

    def _check_basis(self, b):
        s = self.structured
        if s is not None:
            for name, own, other in (("group", b.group, s.columns), ("blocks", b.blocks, s.columns),
                                     ("accumulator_depth", b.accumulator_depth, s.accumulator_depth)):
                if own != other:
                    there = "accumulator_depth" if name == "accumulator_depth" else "columns"
                    raise InputError(f"must be equal to structured.{there} ({other}): the engines share accumulators",
                                     field=f"basis.{name}", value=own)
            if (s.activation_bits, s.weight_bits) != (8, 8):
                raise InputError("must have 8-bit operands beside a basis engine", field="structured",
                                 value=(s.activation_bits, s.weight_bits))
        word = b.stream_groups * b.group
        if self.memory.activation_bytes < 16 * word:
            raise InputError(f"must hold at least 16 stream words ({16 * word})", field="memory.activation_bytes",
                             value=self.memory.activation_bytes)
        taps = b.tap_rows * b.multiplications
        if self.memory.weight_bytes < taps:
            raise InputError(f"must hold at least one half of the tap memory ({taps})", field="memory.weight_bytes",
                             value=self.memory.weight_bytes)

    def to_dict(self):
        """Plain tree, as YAML and the digest see it."""
        tree = asdict(self)
        if self.structured is None:
            tree["structured"] = "none"
        else:
            tree["structured"]["patterns"] = [str(p) for p in self.structured.patterns]
        if self.basis is None:
            del tree["basis"]
        return tree

    @property
    def multipliers(self):
        """Multiplications per cycle of the larger engine (only one works at a time)."""
        return max(self.structured.multipliers if self.structured is not None else 0,
                   self.basis.multiplications if self.basis is not None else 0)

    @property
    def digest(self):
        """Identity carried by every artefact built from this config: 12 hexadecimal digits (48 bits).

        The name is not part of it: two names for one hardware are one hardware.
        """
        tree = self.to_dict()
        del tree["name"]
        return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, raw):
        """Build from a tree of text or integers. Raises InputError naming the dotted field."""
        return _build(cls, raw, ())


#: The sections that may be ``none``.
_ENGINES = {"structured": StructuredConfig, "basis": BasisConfig}


def _build(cls, raw, path):
    if not isinstance(raw, dict):
        raise InputError("must be a mapping of fields", field=".".join(path) or None, value=raw)
    known = {f.name: f for f in fields(cls)}
    values = {}
    for key, value in raw.items():
        where = ".".join((*path, str(key)))
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"is not a known field{hint}; known: {', '.join(sorted(known))}", field=where)
        default = known[key].default
        if cls is Config and key in _ENGINES:
            values[key] = None if value in (None, "none") else _build(_ENGINES[key], value, (*path, key))
        elif is_dataclass(default):
            values[key] = _build(type(default), value, (*path, key))
        elif key == "patterns":
            if not isinstance(value, (list, tuple)):
                raise InputError("must be a list of N:M patterns", field=where, value=value)
            values[key] = tuple(Pattern.parse(v, field=where) for v in value)
        elif key == "name" or "known" in known[key].metadata:
            values[key] = value
        else:
            values[key] = _parse_int(value, where)
    try:
        return cls(**values)
    except InputError as error:
        if error.field and path:
            raise InputError(str(error), source=None, field=".".join(path)) if "." in error.field else \
                _renamed(error, path) from None
        raise


def _renamed(error, path):
    """The same refusal with the section's path before the field."""
    renamed = InputError(error.rule)
    renamed.field = ".".join((*path, error.field))
    renamed.args = (error.args[0].replace(error.field, renamed.field, 1),)
    return renamed


def _parse_int(value, where):
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,11})", value):
        return int(value)
    hint = " without a unit (the field name carries it)" if isinstance(value, str) and value[:1].isdigit() else ""
    raise InputError(f"must be a plain decimal integer{hint}", field=where, value=value)


def presets():
    """Names of the shipped configurations."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load(name_or_path):
    """Configuration from a preset name or a YAML file.

    Raises: InputError for an unknown preset (with the nearest known one), an unreadable file, or any broken rule.
    """
    text = str(name_or_path)
    path = Path(text)
    if not path.suffix and "/" not in text and not path.exists():
        path = PRESETS / f"{text}.yaml"
        if not path.exists():
            near = get_close_matches(text, presets(), n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"must be a file or a preset{hint}; presets: {', '.join(presets())}",
                             field="configuration", value=text)
    tree = strict_yaml.load(path)
    tree.setdefault("name", re.sub(r"[^a-z0-9_]", "_", path.stem.lower()))
    try:
        return Config.from_dict(tree)
    except InputError as error:
        raise error.within(path) from None
