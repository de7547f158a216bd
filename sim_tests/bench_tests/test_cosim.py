"""The co-simulation: a true report for a right network, a red one for planted faults, and two back ends agree."""

from dataclasses import replace
import json

import numpy as np
import pytest

from compress.network import Add, Network, Pool, Requantization, Tensor
from gen import emit
from lowering.lower import lower
from sim_tests.bench import build, cosim, decomposed
from sim_tests.bench.bench import convolution
from sim_tests.bench.simulation import SimulationError, simulate
from sim_tests.lib.simulate import run_cocotb
from spec import config
from spec.errors import InputError

TINY = config.load("tiny")


@pytest.fixture(scope="module")
def network():
    """Two convolutions, a residual sum and a pool, with channel counts that do not fill the lanes."""
    rng = np.random.default_rng(5)
    first = convolution(rng, size=6, channels=5, outputs=7, patterns=("2:4", "1:4"))
    second = convolution(rng, size=6, channels=7, outputs=7)
    a = replace(first.layers[0], name="a", output="t")
    b = replace(
        second.layers[0],
        name="b",
        input="t",
        output="u",
        residual="t",
        requantization=replace(second.layers[0].requantization, residual_zero_point=-3, residual_multiplier=9000),
    )
    even = {"bias": np.zeros(7, np.int32), "multiplier": np.full(7, 16384, np.uint16), "shift": np.zeros(7, np.uint8)}
    c = Add(
        name="c",
        input="u",
        residual="t",
        output="v",
        requantization=Requantization(**even, zero_point=-3, residual_zero_point=-3, residual_multiplier=16384),
    )
    d = Pool(
        name="d",
        kind="max",
        input="v",
        output="w",
        window=(2, 2),
        stride=(2, 2),
        requantization=Requantization(**even, zero_point=0),
    )

    def tensor(name, size):
        return Tensor(name=name, height=size, width=size, channels=7, scale=0.05, zero_point=-3)

    tensors = {"x": first.tensors["x"]} | {n: tensor(n, 6) for n in "tuv"} | {"w": tensor("w", 3)}
    return Network(name="test", input="x", output="w", tensors=tensors, layers=(a, b, c, d))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(6).integers(-128, 128, (3, 6, 6, 5), np.int8)


@pytest.fixture(scope="module")
def report(network, images):
    return cosim.cosimulate(network, TINY, images)


def test_right_network_is_bit_exact(report):
    assert report.bit_exact and report.stray_bytes == 0
    assert [(r.name, r.elements, r.mismatches) for r in report.layers] == [
        ("a", 3 * 252, 0),
        ("b", 3 * 252, 0),
        ("c", 3 * 252, 0),
        ("d", 3 * 63, 0),
    ]


def test_figures_agree_with_the_counters(report):
    beat = TINY.bus.data_bits // 8
    counters, totals = report.counters, report.totals()
    tail = counters["CYCLES"] - totals["cycles"]  # END and the interrupt
    assert 0 <= tail < 100 and report.cycles >= counters["CYCLES"]
    assert totals["macs_executed"] == counters["EXECUTE_ISSUE"] * TINY.structured.multipliers
    assert totals["dram_bytes_written"] == counters["WRITE_BEATS"] * beat
    assert 0 <= counters["READ_BEATS"] * beat - totals["dram_bytes_read"] <= 64
    for r in report.layers:
        assert r.utilization == r.macs_executed / (TINY.structured.multipliers * r.cycles)
        assert sum(r.execute_cycles.values()) == r.cycles


def test_executed_macs_are_those_of_the_program(network, report):
    assert [r.macs_executed for r in report.layers] == [i.macs_executed for i in lower(network, TINY).layers]
    assert report.layers[0].macs_dense == 6 * 6 * 7 * 9 * 5


def test_speedup_is_against_the_same_layers_dense(network, images, report):
    dense = cosim.cosimulate(cosim.dense_version(network), TINY, images[:1])
    assert (
        [r.cycles for r in dense.layers]
        == [r.cycles_dense for r in report.layers]
        == [r.cycles_dense for r in dense.layers]
    )
    assert report.totals()["speedup_vs_dense"] == dense.totals()["cycles"] / report.totals()["cycles"]
    assert dense.totals()["speedup_vs_dense"] == 1


def test_report_is_plain_json_with_the_agreed_names(report):
    tree = json.loads(json.dumps(report.to_dict()))
    assert tree.keys() >= {
        "layers",
        "totals",
        "config_digest",
        "bit_exact",
        "wall_seconds",
        "simulated_cycles_per_second",
    }
    names = {
        "name",
        "op",
        "format",
        "macs_dense",
        "macs_executed",
        "cycles",
        "cycles_predicted",
        "utilization",
        "dram_bytes_read",
        "dram_bytes_written",
        "elements",
        "mismatches",
        "sqnr_db",
    }
    assert all(layer.keys() >= names for layer in tree["layers"])
    assert "speedup_vs_dense" in tree["totals"] and tree["config_digest"] == TINY.digest


def test_one_layer_alone(network, images):
    report = cosim.cosimulate(network, TINY, images[:1], layers=["b"])
    assert report.bit_exact and [r.name for r in report.layers] == ["b"]


def test_batch_that_does_not_divide(network, images):
    report = cosim.cosimulate(network, TINY, images, batch=2, compare_dense=False)
    assert report.bit_exact and report.output.shape == (3, 3, 3, 7)
    assert report.layers[0].elements == 3 * 252


def test_stalls(network, images):
    slow = cosim.cosimulate(network, TINY, images[:1], stall=0.5, seed=4, compare_dense=False)
    assert slow.bit_exact


def test_sqnr(network, images):
    t = network.tensors["w"]
    exact = cosim.cosimulate(network, TINY, images[:1], compare_dense=False)
    real = t.scale * (exact.output.astype(np.float64) - t.zero_point)
    half = cosim.cosimulate(network, TINY, images[:1], compare_dense=False, floats={"w": real * 1.1})
    assert exact.layers[-1].sqnr_db is None
    assert half.layers[-1].sqnr_db == pytest.approx(20.83, abs=0.01)  # 20 log10(1.1 / 0.1)


def test_a_wrong_weight_is_found(network, images, monkeypatch):
    """The golden model keeps the right network, the program is made from one with a single weight changed."""
    values = network.layers[0].terms[0].values.copy()
    at = tuple(np.argwhere(values)[0])
    values[at] = values[at] // 2 + 1 if abs(values[at]) > 4 else 100
    layer = network.layers[0]
    wrong = replace(
        network,
        layers=(replace(layer, terms=(replace(layer.terms[0], values=values), *layer.terms[1:])), *network.layers[1:]),
    )
    monkeypatch.setattr(cosim, "lower", lambda net, *args, **kwargs: lower(wrong, *args, **kwargs))
    report = cosim.cosimulate(network, TINY, images[:1], compare_dense=False)
    assert not report.bit_exact
    assert report.layers[0].mismatches > 0
    assert f"channel {at[0]}: got" in report.layers[0].first_mismatch


def test_a_wrong_byte_elsewhere_is_found(network, images, monkeypatch):
    real = simulate

    def stray(*args, **kwargs):
        result = real(*args, **kwargs)
        memory = result.memory.copy()
        memory[0] ^= 1  # a constant
        return replace(result, memory=memory)

    monkeypatch.setattr(cosim, "simulate", stray)
    report = cosim.cosimulate(network, TINY, images[:1], compare_dense=False)
    assert report.totals()["mismatches"] == 0 and report.stray_bytes == 1 and not report.bit_exact


def test_program_of_another_configuration_is_refused_by_the_rtl(network, images, monkeypatch):
    other = replace(TINY, control=replace(TINY.control, watchdog_cycles=19999))
    monkeypatch.setattr(cosim, "lower", lambda net, conf, **kwargs: lower(net, other, **kwargs))
    with pytest.raises(SimulationError, match="stopped with DIGEST_MISMATCH"):
        cosim.cosimulate(network, TINY, images[:1])


def test_no_images(network):
    with pytest.raises(InputError, match="input data must hold at least one image"):
        cosim.cosimulate(network, TINY, np.zeros((0, 6, 6, 5), np.int8))


def test_builds_are_made_once(network):
    messages = []
    program = cosim.prepare(TINY, progress=lambda message, fraction: messages.append(message))
    before = program.stat().st_mtime_ns
    assert cosim.prepare(TINY, progress=lambda message, fraction: messages.append(message)).stat().st_mtime_ns == before
    assert not [m for m in messages if "compiling" in m]


def test_missing_compiler(monkeypatch, tmp_path):
    from gen import tools

    monkeypatch.setenv("SUMMAND_BUILD", str(tmp_path))
    monkeypatch.setattr(tools.shutil, "which", lambda name: None if name == "g++" else f"/bin/{name}")
    with pytest.raises(tools.ToolMissing, match=r"g\+\+ is needed and not found"):
        build.simulator("module top; endmodule\n", "", "top")


def test_broken_verilog_is_told_with_the_tools_words(monkeypatch, tmp_path):
    monkeypatch.setenv("SUMMAND_BUILD", str(tmp_path))
    with pytest.raises(build.BuildError, match="(?s)verilator failed .*syntax error"):
        build.simulator("module top(input clk; endmodule\n", "", "top")
    assert not list(tmp_path.glob("cosim/*/simulator"))


def test_unwritable_build_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUMMAND_BUILD", str(tmp_path / "file"))
    with pytest.raises(InputError, match="SUMMAND_BUILD must be a writable folder"):
        build.rtl(TINY)


def test_harness_and_cocotbext_axi_give_the_same_memory(network, images, tmp_path):
    """The same program behind our memory and behind cocotbext-axi's, with and without pauses: the same bytes."""
    lowered = lower(network, TINY)
    before = lowered.new_memory()
    lowered.write_tensor(before, "x", images[:1])
    runs = [
        simulate(
            cosim.prepare(TINY), before, program=lowered.program_offset, count=lowered.instruction_count, stall=stall
        ).check()
        for stall in (0.0, 0.3)
    ]
    assert np.array_equal(runs[0].memory, runs[1].memory) and not np.array_equal(runs[0].memory, before)
    jobs = tmp_path / "jobs.npz"
    np.savez(
        jobs,
        **{
            "n.before": before,
            "n.after": runs[0].memory,
            "n.program": [lowered.program_offset, lowered.instruction_count],
        },
    )
    run_cocotb(
        build.rtl(TINY),
        emit.top_name(TINY),
        "sim_tests.hw.tb_top",
        2,
        tmp_path,
        TINY,
        env={"SUMMAND_JOBS": str(jobs)},
        test_filter=".*memory_equals_machine.*",
    )


def test_rows_beside_the_image_are_no_products_of_the_basis_engine():
    """3 x 3 with padding on one row: the middle kernel row alone; the dense array multiplies padding too."""
    rng = np.random.default_rng(3)
    small, array = config.load("tiny_basis"), config.load("nm256")
    for size in (1, 2):
        net = decomposed.network(rng, (size, 8, 8, 3, 1, 1), form=1, group=4)
        layer = net.layers[0]
        per_row = np.count_nonzero(layer.basis, axis=(0, 2))
        want = per_row[1] if size == 1 else 2 * per_row[1] + per_row[0] + per_row[2]   # output rows of each kernel row
        assert cosim._nonzero_macs(layer, small, net.tensors, 3) == 3 * 8 * size * want
        dense = decomposed.network(rng, (size, 8, 8, 3, 1, 1))
        taps = np.count_nonzero(dense.layers[0].terms[0].values)
        assert cosim._nonzero_macs(dense.layers[0], array, dense.tensors, 1) == taps * size * size
