"""Masks of weights: which weights stay, and how a layer keeps to it. Kernels are [O, I, R, S] or [O, I]."""
import torch
from torch.nn.utils import parametrize

from compress.training import fields
from compress.training.parametrizations import Masked
from compress.training.technique import select
from spec.config import Pattern
from spec.errors import InputError

#: Block lengths up to which comparing all pairs beats sorting.
PAIRWISE_UP_TO = 8


def parse_series(text, field):
    """Patterns of ``"2:4"`` or of a series ``"4:8+1:8"``. Raises: InputError."""
    return tuple(Pattern.parse(part, field=field) for part in str(text).split("+"))


@torch.no_grad()
def nm_mask(weight, patterns):
    """Mask of an N:M series along the input channels of each tap: the union of its greedy terms.

    Term i keeps the ``N_i`` largest ``|w|`` in each block of ``M_i`` consecutive input channels among the weights that
    no earlier term took; the lowest channel wins ties. A last block that is shorter counts as padded with zeros. The
    same rule as `golden.structured.tasd_series` (which moves no zeros; here every term takes N places, zeros included).

    Args: weight [O, I, …]; patterns: pairs (N, M).
    Returns: bool, shape of ``weight``.
    """
    left = weight.detach().abs()
    mask = torch.zeros_like(left, dtype=torch.bool)
    for n, (size, block) in enumerate(patterns):
        if n:
            left = left.masked_fill(mask, -1)                # below every magnitude: taken already
        mask |= _term(left, size, block)
    return mask


def _term(magnitudes, n, m):
    """Bool mask of the ``n`` largest of each ``m`` along axis 1."""
    outputs, inputs = magnitudes.shape[:2]
    flat = magnitudes.reshape(outputs, inputs, -1)
    short = -inputs % m
    if short:
        flat = torch.cat((flat, flat.new_full((outputs, short, flat.shape[2]), -2)), 1)
    rows = flat.reshape(outputs, -1, m, flat.shape[2]).movedim(2, 0).reshape(m, -1).contiguous()
    if m <= PAIRWISE_UP_TO:
        lost = torch.zeros(rows.shape, dtype=torch.int8)
        for i in range(m):
            for j in range(i + 1, m):
                won = rows[i] >= rows[j]
                lost[j] += won
                lost[i] += ~won
        keep = lost < n
    else:
        order = torch.sort(rows, dim=0, descending=True, stable=True).indices
        keep = torch.zeros(rows.shape, dtype=torch.bool).scatter_(0, order[:n], True)
    keep = keep.reshape(m, outputs, -1, flat.shape[2]).movedim(0, 2).reshape(outputs, -1, flat.shape[2])
    return keep[:, :inputs].reshape(magnitudes.shape)


def choose(model, patterns, kind):
    """{name: layer} as `technique.select`, checked by `check_plain`; ``kind``: the technique, for messages.

    Raises: InputError also if there is no layer.
    """
    layers = select(model, patterns)
    if not layers:
        raise InputError(f"must be given: the network has no layer that {kind} takes by default", field="layers")
    check_plain(layers, kind)
    return layers


def check_plain(layers, kind):
    """Raises: InputError for a layer of {name: layer} in another form than a plain or masked weight. Techniques that
    give layers a form of their own give an earlier mask up (`release`): what is zero may grow again."""
    for name, layer in layers.items():
        form = type(layer.parametrizations.weight[0]) if parametrize.is_parametrized(layer, "weight") else Masked
        if form is not Masked:
            raise InputError(f"must have a plain or masked weight for {kind}; it has the form {form.__name__}",
                             field=f"layers.{name}")


def release(layer):
    """The layer's weight becomes plain: what it computes with now."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def fix_mask(layer, mask):
    """The layer keeps to ``mask``: it takes the form `parametrizations.Masked`."""
    release(layer)
    parametrize.register_parametrization(layer, "weight", Masked(mask=mask))


def check_threshold(threshold, std):
    """The numbers of the options ``threshold`` and ``std`` (None: not given). Raises: InputError if both are given."""
    if threshold is not None and std is not None:
        raise InputError("must not be given with threshold", field="std", value=std)
    return (None if threshold is None else fields.number(threshold, "threshold", above=0),
            None if std is None else fields.number(std, "std", above=0))


@torch.no_grad()
def limit_of(weight, threshold, std):
    """Magnitude below which weights go: ``threshold``, or ``std`` times the standard deviation of ``weight``; None if
    neither is given."""
    return threshold if std is None else std * float(weight.double().std(correction=0))
