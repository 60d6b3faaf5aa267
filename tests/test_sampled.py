"""The samples of products that the other tests run on."""

import itertools

from sampled import in_turn, pairs


def test_every_pair_is_met_with_few_cases() -> None:
    axes = (range(9), "abcde", "xyz", (True, False))
    found = pairs(*axes, full=False)
    for i, j in itertools.combinations(range(4), 2):
        assert {(case[i], case[j]) for case in found} == set(itertools.product(axes[i], axes[j]))
    assert len(found) <= 1.2 * 9 * 5
    assert pairs(*axes, full=True) == list(itertools.product(*axes))


def test_every_value_is_met_in_turn() -> None:
    axes = (range(7), "ab", "xyz")
    found = in_turn(*axes, full=False)
    assert len(found) == 7
    for i, axis in enumerate(axes):
        assert {case[i] for case in found} == set(axis)
    assert {case[1:] for case in found} == set(itertools.product("ab", "xyz"))
    assert len(in_turn(*axes, full=True)) == 42
