"""How long the decompositions of a whole network take: tensor train and basis kernels of every layer of ResNet-18.

Run from the repository's root: ``python -m sim_tests.bench.decomposition``. It uses one core. Times are processor
seconds, which other jobs of the machine do not change much. Weights are seeded normal numbers: the time of these
factorisations does not depend on the values.
"""

import argparse
import json
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from golden import basis, tensor_train

#: Seconds for both decompositions of all layers on one core.
TARGET_SECONDS = 20.0
#: Basis kernels of every kernel above 1x1.
COUNT = 6
#: Ranks (r_out, r_in) of the 3x3 layers, in order: the published "TT-special" table of ResNet-18.
RANKS = [(45, 45), (36, 36), (32, 32), (32, 32), (80, 40), (70, 70), (65, 65), (64, 64)]
RANKS += [(130, 65), (120, 120), (120, 120), (115, 115), (250, 122), (240, 240), (230, 230), (220, 220)]


def resnet18():
    """{name: (kernel shape [O, R, S, I], ranks of the train)} of all layers with weights.

    The table has ranks for the 3x3 layers alone; the others get half of the smaller side, conv1 all 3 inputs.
    """
    layers, ranks, width = {"conv1": ((64, 7, 7, 3), (1, 32, 3, 1))}, iter(RANKS), 64
    for stage, outputs in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            for number, inputs in ((1, width), (2, outputs)):
                layers[f"layer{stage}.{block}.conv{number}"] = (outputs, 3, 3, inputs), (1, *next(ranks), 1)
            if width != outputs:
                layers[f"layer{stage}.{block}.downsample"] = (outputs, 1, 1, width), (1, width // 2, 1)
            width = outputs
    layers["fc"] = (1000, 1, 1, 512), (1, 256, 1)
    return layers


def measure(layers, rng):
    """Rows of figures, one per layer: seconds of both decompositions and what they leave of the weights.

    1x1 kernels have no basis kernels. Args: layers: see `resnet18`; rng: source of the weights.
    """
    with threadpool_limits(1, user_api="blas"):
        return [_layer(name, shape, ranks, rng) for name, (shape, ranks) in layers.items()]


def _layer(name, shape, ranks, rng):
    weights = rng.standard_normal(shape)
    began = time.process_time()
    if shape[1:3] == (1, 1):
        train = tensor_train.tt_linear(weights[:, 0, 0], shape[:1], shape[3:], ranks)
    else:
        train = tensor_train.tt_convolution(weights, ranks)
    row = {"layer": name, "shape": list(shape), "ranks": list(ranks), "train_s": time.process_time() - began}
    row["train_error"] = train.meta["relative_error"]
    if shape[1:3] != (1, 1):
        began = time.process_time()
        found = basis.decompose(weights, count=COUNT)
        row["basis_s"] = time.process_time() - began
        row["basis_energy"] = found.meta["energy"]
    return row


def seconds(rows):
    """Processor seconds of both decompositions of all layers."""
    return sum(row["train_s"] + row.get("basis_s", 0.0) for row in rows)


def table(rows):
    """Rows as a rich table, the total last."""
    result = Table(title="ResNet-18, one core")
    for heading in ("layer", "kernel", "ranks", "train, s", "error", "basis, s", "energy"):
        result.add_column(heading, no_wrap=True)
    for row in rows:
        kernel, ranks = ("x".join(map(str, row[key])) for key in ("shape", "ranks"))
        figures = ("train_s", "train_error", "basis_s", "basis_energy")
        shown = [f"{row[key]:.3f}" if key in row else "" for key in figures]
        result.add_row(row["layer"], kernel, ranks, *shown)
    total = {key: sum(row.get(key, 0.0) for row in rows) for key in ("train_s", "basis_s")}
    result.add_section()
    result.add_row("all", "", "", f"{total['train_s']:.3f}", "", f"{total['basis_s']:.3f}", "")
    return result


def main(arguments=None):
    """Command line. Returns 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows to this file")
    options = parser.parse_args(arguments)
    rows = measure(resnet18(), np.random.default_rng(0))
    total = seconds(rows)
    console = Console(width=100)
    console.print(table(rows))
    console.print(f"both: {total:.2f} s of processor time, target {TARGET_SECONDS:g} s")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump({"rows": rows, "seconds": total, "target": TARGET_SECONDS}, stream, indent=2)
    return int(total > TARGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
