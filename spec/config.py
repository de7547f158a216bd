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


class _Section:
    """Checks every integer field of a section against its declared range."""

    def __post_init__(self):
        for f in fields(self):
            if "lo" not in f.metadata:
                continue
            value, meta = getattr(self, f.name), f.metadata
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
    """One accelerator; a variant is made with ``dataclasses.replace``."""

    name: str = "nm256"
    structured: StructuredConfig = StructuredConfig()
    memory: MemoryConfig = MemoryConfig()
    bus: BusConfig = BusConfig()
    control: ControlConfig = ControlConfig()

    def __post_init__(self):
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", self.name):
            raise InputError("must be a lower-case identifier of at most 32 characters", field="name", value=self.name)
        s, bus_bytes = self.structured, self.bus.data_bits // 8
        if s.columns > bus_bytes:
            raise InputError(f"must be at least 8 * structured.columns ({8 * s.columns})", field="bus.data_bits",
                             value=self.bus.data_bits)
        tile_bytes = s.multipliers + -(-s.multipliers * (s.block.bit_length() - 1) // 8)
        if self.memory.weight_bytes < 4 * tile_bytes:
            raise InputError(f"must hold at least four weight tiles ({4 * tile_bytes})", field="memory.weight_bytes",
                             value=self.memory.weight_bytes)
        full = s.stream_blocks or s.slots // s.patterns[0].n
        if self.memory.activation_bytes < 16 * full * s.block:
            raise InputError(f"must hold at least 16 stream words ({16 * full * s.block})",
                             field="memory.activation_bytes", value=self.memory.activation_bytes)
        if self.memory.activation_bytes > 65536 * s.block:
            raise InputError(f"must be at most 65536 blocks ({65536 * s.block})", field="memory.activation_bytes",
                             value=self.memory.activation_bytes)
        if self.memory.residual_bytes < 2 * s.columns:
            raise InputError(f"must hold at least two pixels ({2 * s.columns})", field="memory.residual_bytes",
                             value=self.memory.residual_bytes)
        if self.bus.burst_beats * bus_bytes > 4096:
            raise InputError(f"must not exceed 4 KiB per burst ({4096 // bus_bytes} beats at this width)",
                             field="bus.burst_beats", value=self.bus.burst_beats)

    def to_dict(self):
        """Plain tree, as YAML and the digest see it."""
        tree = asdict(self)
        tree["structured"]["patterns"] = [str(p) for p in self.structured.patterns]
        return tree

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
        if is_dataclass(default):
            values[key] = _build(type(default), value, (*path, key))
        elif key == "patterns":
            if not isinstance(value, (list, tuple)):
                raise InputError("must be a list of N:M patterns", field=where, value=value)
            values[key] = tuple(Pattern.parse(v, field=where) for v in value)
        elif key == "name":
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
