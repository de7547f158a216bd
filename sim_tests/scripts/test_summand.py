"""The command line: what it does, and that every refusal is one line on stderr with status 2, never a traceback."""

import json
from pathlib import Path
import re
import subprocess
import sys

import numpy as np
import pytest

from compress import engine, flow
from scripts import summand
from sim_tests.bench import build, cosim
from sim_tests.compress.tflite_models import Builder

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = str(ROOT / "models" / "digits.onnx")


def call(capsys, *args):
    """(status, stdout, stderr) of a command."""
    status = summand.main([str(a) for a in args])
    out = capsys.readouterr()
    return status, out.out, out.err


def refused(capsys, *args):
    """The one line with which a command is refused."""
    status, _, err = call(capsys, *args)
    lines = [line for line in err.splitlines() if not line.endswith(" …")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("summand: "), err
    return lines[0]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "digits.summand"
    assert (
        summand.main(
            ["compress", DIGITS, "--method", "tasd:2:4+1:4", "--calibration", "demo:calibration", "--out", str(path)]
        )
        == 0
    )
    return path


def test_help_has_an_example_of_every_command(capsys):
    commands = re.findall(r"^def ([a-z]\w*)\(args\)", Path(summand.__file__).read_text(), re.MULTILINE)
    for name in commands:
        with pytest.raises(SystemExit) as end:
            summand.main([name, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert f"example: summand {name}" in text
        example = re.search(r"example: summand (.*)", text)[1].split()
        summand.parser().parse_args(example)  # the example itself is a good command line


def test_rtl(capsys, tmp_path):
    status, out, _ = call(capsys, "rtl", "tiny", "--out", tmp_path)
    assert status == 0 and "summand_tiny, digest 74e7ff78f71f" in out
    assert (tmp_path / "summand_tiny.v").exists()


def test_compress_and_run(capsys, package, tmp_path):
    status, out, _ = call(capsys, "run", package, "--input", "demo:heldout", "--out", tmp_path / "y.npz")
    assert status == 0 and re.search(r"350 samples \(scikit-learn digits, split heldout\)", out)
    assert float(re.search(r"accuracy ([\d.]+) %", out)[1]) > 90
    with np.load(tmp_path / "y.npz") as y:
        assert y["y"].shape == (350, 1, 1, 10)


def test_packed_package_is_smaller_and_runs_alike(capsys, tmp_path):
    outputs = []
    for flags in ((), ("--packed",)):
        path = tmp_path / f"p{len(flags)}.summand"
        arguments = ("--method", "nm:2:4", "--calibration", "demo:calibration", "--out", path)
        assert call(capsys, "compress", DIGITS, *arguments, *flags)[0] == 0
        assert call(capsys, "run", path, "--input", "demo:heldout", "--out", tmp_path / "y.npz")[0] == 0
        with np.load(tmp_path / "y.npz") as y:
            outputs.append((path.stat().st_size, y["y"]))
    assert outputs[1][0] < outputs[0][0]
    np.testing.assert_array_equal(outputs[0][1], outputs[1][1])


def test_run_onnx(capsys):
    status, out, _ = call(capsys, "run", DIGITS, "--engine", "onnx", "--input", "demo:heldout")
    assert status == 0 and float(re.search(r"accuracy ([\d.]+) %", out)[1]) > 90


def test_tflite_files_run_like_packages(capsys, tmp_path):
    """An int8 TFLite file has its own scales: run and estimate take it as it is, compress applies a method."""
    model, rng = tmp_path / "m.tflite", np.random.default_rng(0)
    b = Builder((6, 6, 8), scale=0.04, zero_point=2)
    model.write_bytes(b.file(b.softmax(b.dense(rng, b.conv(rng, b.conv(rng, b.input, 8), 8), 3))))
    x = rng.integers(-128, 128, (20, 6, 6, 8), np.int8)
    net = flow.load_network(model)
    labels = engine.run(net, x)[:, 0, 0].argmax(axis=1)
    np.savez(tmp_path / "x.npz", x=x, labels=labels)
    status, out, _ = call(capsys, "run", model, "--input", tmp_path / "x.npz")
    assert status == 0 and "accuracy 100.00 %" in out and "output [20, 1, 1, 3]" in out
    status, out, _ = call(capsys, "estimate", model, "--config", "tiny")
    assert status == 0 and "20,736" in out                                     # 6 * 6 * 9 * 8 * 8
    status, out, _ = call(capsys, "cosim", model, "--config", "tiny", "--input", tmp_path / "x.npz", "--images", 1)
    assert status == 0 and "bit-exact: every element" in out and "rtl 100.00 %" in out
    status, out, _ = call(capsys, "compress", model, "--method", "nm:2:4", "--out", tmp_path / "p")
    assert status == 0 and "nm:2:4" in out and "scales and biases of the file" in out
    status, out, _ = call(capsys, "run", tmp_path / "p", "--input", tmp_path / "x.npz")
    assert status == 0 and "20 samples (x.npz)" in out
    assert "must not be factorised or permuted" in refused(capsys, "compress", model, "--method", "tt:3", "--out", "p")
    assert "onnx runs ONNX files" in refused(capsys, "run", model, "--engine", "onnx")


def test_estimate(capsys, package):
    status, out, _ = call(capsys, "estimate", package, "--config", "tiny")
    assert status == 0 and "block_a" in out and re.search(r"[\d,]+ bytes read", out)


def test_cosim_end_to_end(capsys, tmp_path):
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    status, out, _ = call(
        capsys,
        "cosim",
        DIGITS,
        "--method",
        "tasd:2:4+1:4",
        "--config",
        "tiny",
        "--input",
        "demo:heldout",
        "--images",
        2,
        "--json",
        report,
        "--html",
        page,
    )
    assert status == 0 and "bit-exact: every element" in out
    tree = json.loads(report.read_text())
    assert tree["bit_exact"] and tree["accuracy"].keys() == {"samples", "float", "quantised", "compressed", "rtl"}
    assert tree["accuracy"]["compressed"] == tree["accuracy"]["rtl"]
    assert all(layer["sqnr_db"] > 5 for layer in tree["layers"])
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "<svg" in text and "http" not in text
    assert all(layer["name"] in text for layer in tree["layers"])


@pytest.mark.parametrize("flags, images", [((), 3), (("--images", 2), 2)])
def test_cosim_takes_every_sample_given(capsys, package, tmp_path, flags, images):
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(size=(3, 1, 8, 8)).astype(np.float32))
    arguments = ("--config", "tiny", "--layer", "pool", "--input", tmp_path / "x.npy", "--json", tmp_path / "r.json")
    assert call(capsys, "cosim", package, *arguments, *flags)[0] == 0
    assert json.loads((tmp_path / "r.json").read_text())["images"] == images


def test_network_wise_search(capsys, tmp_path):
    arguments = ("--method", "tasder", "--search", "network", "--config", "nm256", "--calibration", "demo:calibration",
                 "--validation", "demo:validation", "--out", tmp_path / "p.summand")
    status, out, _ = call(capsys, "compress", DIGITS, *arguments)
    formats = set(re.findall(r"^(?:block_a|block_b|conv2) +(\S+)", out, re.MULTILINE))
    assert status == 0 and len(formats) == 1, out
    assert re.search(r"MACs saved at 99 % of the accuracy: [1-9]", out) and "shares dropped" in out


def test_search_of_activations(capsys, tmp_path):
    arguments = ("--operand", "activations", "--calibration", "demo:calibration", "--validation", "demo:validation",
                 "--test", "demo:heldout", "--json", tmp_path / "a.json")
    status, out, _ = call(capsys, "search", DIGITS, *arguments)
    assert status == 0 and re.search(r"MACs saved at 99 % of the accuracy: [1-9][\d.]+ %", out), out
    assert "no engine runs series of activations yet" in out and "test: 350 samples" in out
    assert json.loads((tmp_path / "a.json").read_text())["operand"] == "activations"
    line = refused(capsys, "search", DIGITS, "--goal", "1.5")
    assert "--goal: must be a number above 0 and at most 1, not '1.5'" in line
    line = refused(capsys, "compress", DIGITS, "--method", "tasder-a", "--out", tmp_path / "p.summand")
    assert "`summand search --operand activations`" in line


def test_masks(capsys, tmp_path):
    (tmp_path / "final_dense.smtx").write_text("2, 16, 3\n0 2 3\n0 9 4\n", encoding="utf-8")
    status, out, _ = call(capsys, "masks", tmp_path, "--json", tmp_path / "m.json")
    told = " ".join(out.split())                             # a long folder name makes the title wrap
    assert status == 0 and told.count("real masks, synthetic values") == 3 and "2x1x1x16" in told, out
    assert json.loads((tmp_path / "m.json").read_text())["layers"][0]["dropped_nonzeros"] == 0
    assert f"{tmp_path / 'gone'}: must be a folder or a tar archive" in refused(capsys, "masks", tmp_path / "gone")


def test_cosim_of_a_package_layer_with_random_data(capsys, package):
    status, out, _ = call(capsys, "cosim", package, "--config", "tiny", "--layer", "conv2", "--layer", "pool")
    assert status == 0 and "not real data" in out and "block_a" not in out


def test_a_mismatch_is_status_1(capsys, package, monkeypatch):
    real = cosim.simulate

    def flipped(simulator, memory, **kwargs):
        result = real(simulator, memory, **kwargs)
        after = result.memory.copy()
        after[-4096:] ^= (after[-4096:] != memory[-4096:]).astype(np.uint8)  # the last tensor, where it was written
        return cosim.replace(result, memory=after)

    monkeypatch.setattr(cosim, "simulate", flipped)
    status, out, _ = call(capsys, "cosim", package, "--config", "tiny", "--layer", "conv2")
    assert status == 1 and "NOT bit-exact" in out and "first difference at image 0" in out


def test_a_failed_run_is_status_1(capsys, package, monkeypatch):
    def broken(*args, **kwargs):
        raise cosim.SimulationError("no interrupt within 5 cycles")

    monkeypatch.setattr(cosim, "simulate", broken)
    status, _, err = call(capsys, "cosim", package, "--config", "tiny", "--layer", "conv2")
    assert status == 1 and "summand: no interrupt within 5 cycles" in err


def test_doctor(capsys):
    status, out, _ = call(capsys, "doctor")
    assert status == 0 and "verilator" in out and "all there" in out


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    from gen import tools

    real = tools.find

    def find(name):
        if name == "g++":
            raise tools.ToolMissing("is needed and not found; install it", field="g++")
        return real(name)

    monkeypatch.setattr(tools, "find", find)
    status, out, _ = call(capsys, "doctor")
    assert status == 2 and "1 missing" in out


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "must be YAML"),
        ("name: a\nname: b\n", "must not repeat a key, not 'name'"),
        ("structured: {colums: 8}\n", "structured.colums is not a known field (did you mean columns?)"),
        ("bus: {data_bits: 128 bits}\n", "must be a plain decimal integer without a unit"),
        ("", "must be a YAML mapping"),
        ("structured: {columns: 3}\n", "must be a power of two in 2..64"),
    ],
)
def test_malformed_configuration(capsys, tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = refused(capsys, "rtl", path, "--out", tmp_path)
    assert words in line and "bad.yaml" in line
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]


def test_unknown_preset(capsys, tmp_path):
    assert "did you mean nm256?" in refused(capsys, "rtl", "nm25", "--out", tmp_path)


@pytest.mark.parametrize(
    "command", [("compress", "--method", "dense", "--out", "x"), ("run",), ("cosim",), ("estimate",)]
)
def test_missing_model(capsys, tmp_path, command):
    name, *rest = command
    assert "gone.onnx" in refused(capsys, name, tmp_path / "gone.onnx", *rest)


def test_truncated_model(capsys, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(Path(DIGITS).read_bytes()[:5000])
    assert "cut.onnx" in refused(capsys, "compress", path, "--method", "dense", "--out", tmp_path / "p")


def test_model_that_is_no_package(capsys, tmp_path):
    path = tmp_path / "p.summand"
    path.write_bytes(b"PK\x03\x04 not a package")
    assert "p.summand" in refused(capsys, "cosim", path, "--config", "tiny")


def test_damaged_package(capsys, package, tmp_path):
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "p.summand"
    path.write_bytes(data)
    assert "p.summand" in refused(capsys, "run", path)


def test_unknown_method(capsys, tmp_path):
    assert "did you mean tasd?" in refused(capsys, "compress", DIGITS, "--method", "tasb:2:4", "--out", tmp_path / "p")


def test_unknown_layer(capsys, package):
    assert "layer must be a layer of digits" in refused(
        capsys, "cosim", package, "--config", "tiny", "--layer", "conv9"
    )


def test_method_for_a_package(capsys, package):
    assert "--method is for ONNX and TFLite files" in refused(capsys, "cosim", package, "--method", "dense")


def test_data_of_another_shape(capsys, package, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 8, 8), np.float32))
    assert "must be [N, 1, 8, 8]" in refused(capsys, "run", package, "--input", tmp_path / "x.npy")


def test_nan_data(capsys, package, tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 1, 8, 8), np.nan, np.float32))
    assert "must be finite" in refused(capsys, "run", package, "--input", tmp_path / "x.npy")


@pytest.mark.parametrize(
    "words", [("--stall", "1.5"), ("--latency", "0"), ("--latency", "200000"), ("--images", "x"), ("--bogus",)]
)
def test_bad_argument(capsys, package, words):
    assert refused(capsys, "cosim", package, "--config", "tiny", *words)


def test_no_command(capsys):
    assert "COMMAND" in refused(capsys)


def test_unwritable_output(capsys, tmp_path, package):
    (tmp_path / "file").write_text("")
    assert "writable folder" in refused(capsys, "rtl", "tiny", "--out", tmp_path / "file" / "x")
    assert "writable" in refused(capsys, "compress", DIGITS, "--method", "dense", "--out", tmp_path / "file" / "x")
    assert "writable" in refused(capsys, "run", package, "--out", tmp_path / "file" / "y.npz")


@pytest.mark.parametrize("tool", ["verilator", "g++"])
def test_missing_tool(capsys, package, monkeypatch, tmp_path, tool):
    from gen import tools

    monkeypatch.setenv("SUMMAND_BUILD", str(tmp_path))
    monkeypatch.setattr(build, "rtl", lambda config, progress=None: "module summand_tiny; endmodule\n")

    def find(name):
        if name == tool:
            raise tools.ToolMissing(f"is needed and not found; {tools._INSTALL[name]}", field=name)
        return name

    monkeypatch.setattr(build, "find", find)
    assert f"{tool} is needed and not found; " in refused(capsys, "cosim", package, "--config", "tiny")


def test_installed_command_needs_no_folder(tmp_path):
    """`summand` works from any folder, and with standard input closed."""
    command = Path(sys.prefix, "bin", "summand")
    done = subprocess.run(
        [command, "cosim", "gone.onnx"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "summand: gone.onnx: must be an existing ONNX file, int8 TFLite file or package\n"
