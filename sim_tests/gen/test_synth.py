"""Cell counts: of designs whose gates can be counted by hand, and of the parts of a configuration."""
import pytest

from gen import synth
from gen.lint import LintError
from spec import config

DESIGN = """
module leaf(input clk, input a, input b, output reg q);
  always @(posedge clk) q <= a & b;
endmodule
module top(input clk, input [3:0] a, input [3:0] b, output [3:0] q, output p);
  leaf l0(clk, a[0], b[0], q[0]);
  leaf l1(clk, a[1], b[1], q[1]);
  leaf l2(clk, a[2], b[2], q[2]);
  leaf l3(clk, a[3], b[3], q[3]);
  assign p = ^q;
endmodule
"""


@pytest.mark.parametrize("minimize", [True, False])
def test_counts_of_a_known_design(minimize):
    result = synth.cell_counts(DESIGN, "top", minimize=minimize)
    leaf = result["modules"]["leaf"]
    assert leaf["cells"] == {"$_AND_": 1, "$_DFF_P_": 1}
    assert result["modules"]["top"]["instances"] == {"leaf": 4}
    assert result["total"]["flip_flops"] == 4
    assert result["total"]["cells"] == 4 * 2 + 3         # and three XOR
    assert result["total"]["gate_equivalents"] == 4 * (1.5 + 6) + 3 * 2.5


@pytest.mark.parametrize(("cell", "weight"), [("$_NAND_", 1), ("$_DFF_P_", 6), ("$_DFFE_PP_", 8.5), ("$_SDFF_PP0_", 7),
                                              ("$_SDFFE_PP0P_", 9.5)])
def test_weights(cell, weight):
    assert synth.equivalent(cell) == weight


def test_unknown_cell_has_no_weight():
    with pytest.raises(KeyError):
        synth.equivalent("$add")


def test_bad_verilog():
    with pytest.raises(LintError, match="yosys synthesis of top"):
        synth.cell_counts("module top(input a; endmodule", "top")


def test_report_of_a_configuration():
    result = synth.report(config.load("tiny"), whole=True)
    parts = result["parts"]
    assert list(parts) == ["dense element", "N:4 element", "array 4 x 4", "accelerator"]
    counts = [p["cells"] for p in parts.values()]
    assert counts == sorted(counts) and counts[2] > 16 * counts[1] > 0
    assert 1 < result["pe_ratio_cells"] < 1.5
    assert parts["accelerator"]["memory_bits"] >= 8 * (2048 + 512)
