"""Tucker-2, SVD and block-term factorisations of a kernel; each result is a `golden.chain.Chain`.

* SVD of a pointwise or fully connected layer: ``W ~= A B``, two 1x1 stages.
* Tucker-2: ``W[o,r,s,i] ~= sum_ab A[o,a] G[a,r,s,b] B[b,i]``, three stages. Sequentially truncated HOSVD (output mode
  first) equals the order-3 TT-SVD; HOOI sweeps improve it.
* Block-term: a sum of Tucker-2 blocks of equal ranks; one chain whose middle stage has one group per block.

Source: reference on tensor trains, sections 2 and 10; block-term: L. De Lathauwer, 2008 (the
alternating Tucker-2 fits are ours).
"""
import numpy as np

from golden.chain import Chain, Stage, real, three_stages
from spec.errors import InputError


def _rank(name, value, most):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not 1 <= value <= most:
        raise InputError(f"must be an integer in 1..{most}", field=name, value=value)
    return int(value)


def _error(weights, approximation):
    norm = np.linalg.norm(weights)
    return float(np.linalg.norm(weights - approximation) / norm) if norm else 0.0


def svd(weights, rank):
    """Truncated SVD of a matrix [O, I], the best approximation of that rank: chain ``I -> rank -> O`` of 1x1 stages.

    The singular values go to the output factor, so the input factor has orthonormal rows.
    Raises: InputError unless 1 <= rank <= min(O, I); TypeError, ValueError for an unfit matrix.
    """
    w = real("weights", weights, 2)
    rank = _rank("rank", rank, min(w.shape))
    u, s, v = np.linalg.svd(w, full_matrices=False)
    norm = np.linalg.norm(w)
    error = float(np.linalg.norm(s[rank:]) / norm) if norm else 0.0
    factors = v[:rank], u[:, :rank] * s[:rank]
    return Chain(stages=tuple(Stage(weights=f[:, None, None, :]) for f in factors),
                 meta={"kind": "svd", "ranks": [rank], "relative_error": error})


def _leading(matrix, rank):
    """Left singular vectors of the largest ``rank`` singular values."""
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def _tucker(w, r_out, r_in, sweeps):
    """(A [O, r_out], G [r_out, R, S, r_in], B [r_in, I]) of w [O, R, S, I]."""
    o, r, s, i = w.shape
    a = _leading(w.reshape(o, -1), r_out)
    for sweep in range(sweeps + 1):
        left = np.tensordot(a.T, w, axes=(1, 0))                         # [r_out, R, S, I]
        b = _leading(left.reshape(-1, i).T, r_in).T
        if sweep == sweeps:
            return a, np.tensordot(left, b, axes=(3, 1)), b
        right = np.tensordot(w, b, axes=(3, 1))                          # [O, R, S, r_in]
        a = _leading(right.reshape(o, -1), r_out)
    raise AssertionError("unreachable")


def check_ranks(ranks, shape):
    """(r_out, r_in) that a Tucker-2 core can use: none above its mode or above the product of the others."""
    try:
        r_out, r_in = ranks
    except (TypeError, ValueError):
        raise InputError("must be a pair (r_out, r_in)", field="ranks", value=ranks) from None
    o, r, s, i = shape
    r_out, r_in = _rank("ranks.r_out", r_out, o), _rank("ranks.r_in", r_in, i)
    _rank("ranks.r_out", r_out, r * s * r_in)
    _rank("ranks.r_in", r_in, r * s * r_out)
    return r_out, r_in


def tucker2(weights, ranks, *, sweeps=0, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1)):
    """Tucker-2 of a kernel [O, R, S, I] as a chain of three stages.

    Args: ranks: (r_out, r_in); sweeps: HOOI sweeps after the sequentially truncated HOSVD (0: none; the error never
    grows with one more). stride, pads, dilation: of the convolution.
    Raises: InputError for ranks above a mode (never clipped) or redundant, or for sweeps below 0.
    """
    w = real("weights", weights, 4)
    r_out, r_in = check_ranks(ranks, w.shape)
    if isinstance(sweeps, bool) or not isinstance(sweeps, (int, np.integer)) or sweeps < 0:
        raise InputError("must be an integer of at least 0", field="sweeps", value=sweeps)
    a, g, b = _tucker(w, r_out, r_in, sweeps)
    chain = three_stages(a, g, b, stride=stride, pads=pads, dilation=dilation)
    chain.meta.update(kind="tucker2", ranks=[r_out, r_in], sweeps=int(sweeps),
                      relative_error=_error(w, chain.to_dense()))
    return chain


def block_term(weights, blocks, ranks, *, sweeps=4, stride=(1, 1), pads=(0, 0, 0, 0), dilation=(1, 1)):
    """Sum of ``blocks`` Tucker-2 terms of ranks (r_out, r_in) each.

    Starts with greedy fits of the residual; each sweep fits every block again to what the others leave, from its own
    factors, so the error never grows. It need not reach the best sum: block-term fits have local minima.

    Returns: chain ``1x1 (I -> n r_in) | RxS in n groups | 1x1 (n r_out -> O)``.
    Raises: InputError for blocks below 1, illegal ranks, n * r_out above O or n * r_in above I, or sweeps below 0.
    """
    w = real("weights", weights, 4)
    r_out, r_in = check_ranks(ranks, w.shape)
    blocks = _rank("blocks", blocks, min(w.shape[0] // r_out, w.shape[3] // r_in))
    if isinstance(sweeps, bool) or not isinstance(sweeps, (int, np.integer)) or sweeps < 0:
        raise InputError("must be an integer of at least 0", field="sweeps", value=sweeps)
    terms, residual = [], w.copy()
    for _ in range(blocks):
        terms.append(_tucker(residual, r_out, r_in, 2))
        residual = residual - _expand(*terms[-1])
    for _ in range(sweeps):
        for n, term in enumerate(terms):
            target = residual + _expand(*term)
            a, _, b = term
            right = np.tensordot(target, b, axes=(3, 1))
            a = _leading(right.reshape(len(target), -1), r_out)
            left = np.tensordot(a.T, target, axes=(1, 0))
            b = _leading(left.reshape(-1, target.shape[3]).T, r_in).T
            terms[n] = a, np.tensordot(left, b, axes=(3, 1)), b
            residual = target - _expand(*terms[n])
    stages = (Stage(weights=np.concatenate([b for _, _, b in terms])[:, None, None, :]),
              Stage(weights=np.concatenate([g for _, g, _ in terms]), stride=stride, pads=pads, dilation=dilation,
                    groups=blocks),
              Stage(weights=np.concatenate([a for a, _, _ in terms], axis=1)[:, None, None, :]))
    chain = Chain(stages=stages, meta={"kind": "block_term", "blocks": blocks, "ranks": [r_out, r_in]})
    chain.meta["relative_error"] = _error(w, chain.to_dense())
    return chain


def _expand(a, g, b):
    """``sum_ab A[o,a] G[a,r,s,b] B[b,i]``."""
    return np.tensordot(np.tensordot(a, g, axes=(1, 0)), b, axes=(3, 0))
