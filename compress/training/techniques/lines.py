"""TPrune: lines (rows and columns) of blocks of a matrix are pruned; what stays is a smaller dense matrix per block.

A matrix [O, I] is cut into blocks; a line is a row or a column of a block. Regularisers, summed over all blocks::

    hoyer_square   ((sum_rows ||row||_2)^2 + (sum_columns ||column||_2)^2) / ||block||_F^2    structured Hoyer-square
    lasso          sum_rows ||row||_2 + sum_columns ||column||_2                              BSSL, for analysis

(only one of the sums with ``lines: rows`` or ``columns``). At the end lines of a small root mean square go, and the
layer's parameters are the dense rest: ``y[rows] += D x[columns]`` for each block, the lists gathered and scattered.

Source: J. Mao, H. Yang, A. Li, H. Li, Y. Chen, "TPrune: Efficient Transformer Pruning for Mobile Devices", ACM
Transactions on Cyber-Physical Systems, 2021, doi 10.1145/3446640 (block-wise structured sparsity learning, then
structured Hoyer square; how blocks and lines are compacted is ours).
"""
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from compress.training import fields
from compress.training.masks import choose, check_threshold, limit_of, release
from compress.training.parametrizations import originals
from compress.training.technique import Technique, weighted_layers
from compress.training.techniques.hoyer import TINY
from spec.errors import InputError

LINES = ("both", "rows", "columns")
REGULARIZERS = ("hoyer_square", "lasso")


def cut(weight, block):
    """View [O/b, I/c, b, c] of a matrix [O, I] in blocks of b x c; the last ones are padded with zeros."""
    (b, c), (o, i) = block, weight.shape
    padded = functional.pad(weight, (0, -i % c, 0, -o % b))
    return padded.reshape(-1, b, padded.shape[1] // c, c).transpose(1, 2)


def line_penalty(weight, block, lines="both", regularizer="hoyer_square"):
    """Regulariser of a matrix [O, I], see the module's docstring: a scalar tensor."""
    blocks, total = cut(weight, block), 0.0
    for wanted, axis in (("rows", 3), ("columns", 2)):
        if lines in ("both", wanted):
            length = torch.linalg.vector_norm(blocks, dim=axis).sum(-1)
            total = total + (length if regularizer == "lasso" else length.square())
    if regularizer == "lasso":
        return total.sum()
    return (total / blocks.square().sum((2, 3)).clamp_min(TINY)).sum()


@torch.no_grad()
def kept_lines(weight, block, lines, limit):
    """[(row numbers, column numbers)] of the blocks that keep anything: lines with a root mean square of at least
    ``limit``. A line with nothing but zeros always goes; the decision looks at whole lines, once."""
    (b, c), (o, i), found = block, weight.shape, []
    for top in range(0, o, b):
        for left in range(0, i, c):
            part = weight[top:top + b, left:left + c]
            rows, columns = (part.square().mean(axis).sqrt() for axis in (1, 0))
            rows = (rows >= limit) | (lines == "columns")
            columns = (columns >= limit) | (lines == "rows")
            used = part * rows[:, None] * columns != 0
            rows, columns = used.any(1).nonzero()[:, 0] + top, used.any(0).nonzero()[:, 0] + left
            if len(rows):
                found.append((rows, columns))
    return found


class DenseBlocks(nn.Module):
    """Parametrisation of a matrix [O, I] by its dense blocks; originals: one matrix [rows, columns] per block.

    Args: shape: (O, I); blocks: [(row numbers, column numbers)], int64 tensors; a place belongs to at most one block.
    """

    def __init__(self, *, shape, blocks):
        super().__init__()
        self.shape, self.blocks = tuple(shape), len(blocks)
        for n, (rows, columns) in enumerate(blocks):
            self.register_buffer(f"rows{n}", rows)
            self.register_buffer(f"columns{n}", columns)

    def lists(self):
        """[(row numbers, column numbers)] of the blocks."""
        return [(getattr(self, f"rows{n}"), getattr(self, f"columns{n}")) for n in range(self.blocks)]

    def right_inverse(self, weight):
        """The dense blocks of a matrix."""
        return tuple(weight[rows[:, None], columns] for rows, columns in self.lists())

    def forward(self, *dense):
        weight = dense[0].new_zeros(self.shape)
        for (rows, columns), values in zip(self.lists(), dense):
            weight = weight.index_put((rows[:, None], columns), values)
        return weight

    @torch.no_grad()
    def compact(self, layer):
        """The layer as gathers and small dense products."""
        return Compact(self.lists(), originals(layer), layer.bias, self.shape[0])


class Compact(nn.Module):
    """``y = bias; y[rows] += D x[columns]`` for each block: the same function as the linear layer it stands for.

    Args: blocks: [(row numbers, column numbers)]; dense: matrices [rows, columns]; bias [O] or None; outputs: O.
    """

    def __init__(self, blocks, dense, bias, outputs):
        super().__init__()
        self.outputs = outputs
        self.dense = nn.ParameterList(d.detach().clone() for d in dense)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for n, (rows, columns) in enumerate(blocks):
            self.register_buffer(f"rows{n}", rows.clone())
            self.register_buffer(f"columns{n}", columns.clone())

    def forward(self, x):
        y = x.new_zeros(*x.shape[:-1], self.outputs)
        for n, values in enumerate(self.dense):
            part = functional.linear(x.index_select(-1, getattr(self, f"columns{n}")), values)
            y = y.index_add(-1, getattr(self, f"rows{n}"), part)
        return y if self.bias is None else y + self.bias


class Lines(Technique):
    """Line pruning of the linear layers, see the module's docstring.

    Options:
        strength: factor of the regulariser.
        regularizer: ``hoyer_square`` or ``lasso``.
        block: [outputs, inputs]; without it the whole matrix is one block.
        lines: ``both``, ``rows`` or ``columns``.
        threshold, std: `finish` drops lines whose root mean square is below the threshold, or below this share of the
            standard deviation of the layer's weights; one of them must be given.
        layers: list of layer patterns (default: all linear layers but the last layer of the network).

    `finish` leaves the form `DenseBlocks`; its ``compact(layer)`` is the layer for inference.
    """

    foreseeable = False

    def __init__(self, *, strength, regularizer="hoyer_square", block=None, lines="both", threshold=None, std=None,
                 layers=None):
        self.strength = fields.number(strength, "strength", low=0)
        self.regularizer = fields.choice(regularizer, "regularizer", REGULARIZERS)
        self.block = None if block is None else fields.wholes(block, "block", low=1, length=2)
        self.lines = fields.choice(lines, "lines", LINES)
        self.threshold, self.std = check_threshold(threshold, std)
        if self.threshold is None and self.std is None:
            raise InputError("must be given, or std", field="threshold")
        self.layers = layers

    def start(self, model):
        super().start(model)
        layers = weighted_layers(model)
        wanted = [name for name, m in layers.items() if isinstance(m, nn.Linear)]
        wanted = [name for name in wanted if name != list(layers)[-1]]
        self.targets = choose(model, wanted if self.layers is None else self.layers, "lines")
        for name, layer in self.targets.items():
            if not isinstance(layer, nn.Linear):
                raise InputError("must be a linear layer", field=f"layers.{name}", value=type(layer).__name__)

    def _block(self, layer):
        """Block size of a layer, at most its own."""
        shape = layer.weight.shape
        return tuple(shape) if self.block is None else tuple(map(min, self.block, shape))

    def penalty(self):
        return self.strength * sum(line_penalty(layer.weight, self._block(layer), self.lines, self.regularizer)
                                   for layer in self.targets.values())

    def _kept(self, layer):
        weight = layer.weight.detach()
        return kept_lines(weight, self._block(layer), self.lines, limit_of(weight, self.threshold, self.std))

    @torch.no_grad()
    def figures(self):
        """Per layer and in all: ``density``, the share of products that pruning now would leave."""
        result, kept, total = {}, 0, 0
        for name, layer in self.targets.items():
            count, size = sum(len(r) * len(c) for r, c in self._kept(layer)), layer.weight.numel()
            result[f"{name}/density"] = count / size
            kept, total = kept + count, total + size
        return result | {"density": kept / total}

    def finish(self):
        for name, layer in self.targets.items():
            blocks = self._kept(layer)
            if not blocks:
                raise InputError("drops every line of a layer: a smaller threshold, or less strength",
                                 field=f"layers.{name}")
            release(layer)
            form = DenseBlocks(shape=layer.weight.shape, blocks=blocks)
            parametrize.register_parametrization(layer, "weight", form)
