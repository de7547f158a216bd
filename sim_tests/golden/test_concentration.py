"""golden.concentration against the rule of docs/basis.md as a loop over single matches."""
import numpy as np
import pytest

from golden.concentration import full_compaction_cycles, pixel_word_cycles, word_cycles


def slow_cycles(matches, look_aside):
    """Columns as lists of pending channel groups, lane after lane; within a round their order does not matter."""
    groups, lanes = matches.shape
    columns = [[g for g in range(groups) if matches[g, c]] for c in range(lanes)]
    cycles = 0
    while any(columns):
        cycles += 1
        taken = set()
        for d in range(look_aside + 1):
            for lane in reversed(range(lanes)):
                if lane not in taken and columns[(lane + d) % lanes]:
                    columns[(lane + d) % lanes].pop(0)
                    taken.add(lane)
    return cycles


@pytest.mark.parametrize("look_aside", [0, 1, 2, 3])
@pytest.mark.parametrize("groups, lanes", [(1, 4), (2, 4), (8, 16), (16, 16), (5, 8)])
def test_cycles_equal_the_loop(rng, groups, lanes, look_aside):
    matches = rng.random((4, 25, groups, lanes)) < np.array([0.05, 0.3, 0.6, 1])[:, None, None, None]
    matches[2, ..., 1:] &= rng.random((25, groups, lanes - 1)) < 0.3   # one crowded column
    got = word_cycles(matches, look_aside=look_aside)
    want = [[slow_cycles(m, look_aside) for m in row] for row in matches]
    assert got.shape == (4, 25) and got.tolist() == want
    assert (got[3] == groups).all()                                 # dense: nothing to gain


@pytest.mark.parametrize("column", range(16))
def test_one_full_column_is_shared_by_its_neighbours(column):
    matches = np.zeros((9, 16), bool)
    matches[:, column] = True
    assert [int(word_cycles(matches, look_aside=n)) for n in range(4)] == [9, 5, 3, 3]


@pytest.mark.parametrize("counts, cycles", [
    ([2, 0, 0, 1], [2, 1, 1, 1]),           # the next lane has nothing
    ([2, 1, 0, 1], [2, 2, 1, 1]),           # it is busy: the one behind takes the second match
    ([2, 1, 1, 1], [2, 2, 2, 2]),           # no lane is left
    ([3, 0, 0, 1], [3, 2, 1, 1]),           # both in reach take one
    ([2, 2, 0, 0], [2, 2, 2, 1]),           # the lane behind both looks at the nearer column first
    ([4, 0, 0, 0], [4, 2, 2, 1]),
    ([5, 1, 0, 0], [5, 3, 2, 2]),
])
def test_a_busy_lane_leaves_matches_to_those_behind(counts, cycles):
    matches = np.arange(5)[:, None] < np.array(counts)
    assert [int(word_cycles(matches[:, [0, 3, 2, 1]], look_aside=n)) for n in range(4)] == cycles


def test_no_matches_cost_nothing_and_many_arrays_are_cut():
    assert word_cycles(np.zeros((3, 4, 4), bool), look_aside=1).tolist() == [0, 0, 0]
    many = np.zeros((9000, 2, 16), bool)                            # more than one chunk
    many[-1] = many[4097, 0, 3] = True
    want = np.zeros(9000, int)
    want[-1], want[4097] = 2, 1
    assert np.array_equal(word_cycles(many, look_aside=2), want)


def test_full_compaction_is_a_lower_bound(rng):
    matches = rng.random((200, 8, 16)) < rng.random((200, 1, 1))
    want = [max(1, -(-int(m.sum()) // 16)) for m in matches]
    bound = full_compaction_cycles(matches, 16)
    assert bound.tolist() == want
    assert (bound <= np.maximum(1, word_cycles(matches, look_aside=3))).all()
    assert full_compaction_cycles(np.zeros((2, 4), bool), 4) == 1


@pytest.mark.parametrize("blocks, slices, groups, group, stream_groups, look_aside, pixels",
                         [(3, 2, 5, 4, 2, 1, 30), (2, 6, 9, 16, 8, 2, 12), (1, 1, 1, 4, 4, 0, 5),
                          (2, 2, 3, 8, 1, 3, 9)])
def test_pixel_words_equal_the_loop(rng, blocks, slices, groups, group, stream_groups, look_aside, pixels):
    active = rng.random((pixels, groups, group)) < 0.6
    active[0] = False
    ce = rng.integers(-1, 2, (blocks, slices, groups, group)) * (rng.random((blocks, slices, groups, group)) < 0.7)
    ce[0, 0] = 0
    got = pixel_word_cycles(active, ce, stream_groups=stream_groups, look_aside=look_aside)
    for p in range(pixels):
        want = []
        for at in range(0, groups, stream_groups):
            word = [active[p, at:at + stream_groups] & (c[at:at + stream_groups] != 0)
                    for c in ce.reshape(-1, groups, group)]
            want.append(max(1, *(slow_cycles(m, look_aside) for m in word)))
        assert got[p].tolist() == want


def test_pixels_are_cut_into_chunks(rng):
    active, ce = rng.random((700, 8, 16)) < 0.7, np.ones((16, 6, 8, 16), int)
    got = pixel_word_cycles(active, ce, stream_groups=8, look_aside=2)
    assert np.array_equal(got[:, 0], np.maximum(1, word_cycles(active, look_aside=2))) and got.max() > got.min()
    assert (pixel_word_cycles(active, 0 * ce, stream_groups=4, look_aside=2) == np.ones((700, 2))).all()


@pytest.mark.parametrize("call, text", [
    (lambda: word_cycles(np.zeros((2, 4), int), look_aside=1), "must be a bool array .* not int64"),
    (lambda: word_cycles(np.zeros(4, bool), look_aside=1), r"not bool of shape \(4,\)"),
    (lambda: word_cycles(np.zeros((2, 4), bool), look_aside=-1), "look_aside must be an integer of at least 0, not -1"),
    (lambda: full_compaction_cycles(np.zeros((2, 4), bool), 0), "lanes must be at least 1, not 0"),
    (lambda: pixel_word_cycles(np.zeros((1, 2, 4), bool), np.zeros((1, 1, 3, 4), int), stream_groups=1, look_aside=1),
     "active and coefficients must be"),
    (lambda: pixel_word_cycles(np.zeros((1, 2, 4), bool), np.zeros((1, 1, 2, 4), int), stream_groups=0, look_aside=1),
     "stream_groups must be at least 1, not 0"),
])
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
