"""The split is a function of seed and content."""

import numpy as np
import pytest

from thinned.data.content_split import content_hash, digest, shared, sketch, split_by_content, uniform


def hashes(n: int, start: int = 0) -> np.ndarray:
    return np.array([content_hash(f"example {i}".encode()) for i in range(start, start + n)], np.uint64)


def test_hash_and_numbers_stay_what_they_are() -> None:
    """Another hash would move the examples of every stored checkpoint."""
    assert f"{content_hash(b'some content'):016x}" == "24a13e03fd8795f4"
    assert uniform(hashes(2), seed=3) == pytest.approx([0.825916408207869, 0.571856779306502], abs=1e-12)


def test_numbers_are_uniform_and_differ_between_seeds() -> None:
    u = uniform(hashes(20_000), seed=0)
    counts = np.bincount((u * 20).astype(int), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 19 degrees of freedom: 1.3e-4 fail
    assert abs(np.corrcoef(u, uniform(hashes(20_000), seed=1))[0, 1]) < 0.03  # 2e-5 fail


def test_fractions() -> None:
    rows = split_by_content(hashes(20_000), seed=0, val=0.1, test=0.2)
    assert len(rows["test"]) == pytest.approx(4000, abs=4.5 * 57)  # 4.5 standard deviations: 7e-6 fail
    assert len(rows["val"]) == pytest.approx(2000, abs=4.5 * 42)
    assert np.array_equal(np.sort(np.concatenate([*rows.values()])), np.arange(20_000))


@pytest.mark.parametrize("seed", range(10))
def test_growth_order_and_duplicates_move_no_one(seed: int) -> None:
    generator = np.random.default_rng(seed)
    before = hashes(300)
    of_before = {
        int(before[row]): split for split, rows in split_by_content(before, seed, 0.2, 0.3).items() for row in rows
    }
    after = generator.permutation(np.concatenate([before, before[: generator.integers(300)], hashes(100, start=300)]))
    for split, rows in split_by_content(after, seed, 0.2, 0.3).items():
        assert all(of_before.get(int(value), split) == split for value in after[rows])


def test_the_fraction_for_validation_does_not_move_the_test() -> None:
    small, large = (split_by_content(hashes(500), 0, val, 0.2) for val in (0.1, 0.3))
    assert np.array_equal(small["test"], large["test"])
    assert set(small["val"]) < set(large["val"])


def test_a_digest_is_of_the_set_not_of_its_order() -> None:
    assert digest(hashes(9)) == digest(hashes(9)[::-1])
    assert digest(hashes(9)) != digest(hashes(10))


def test_a_sketch_knows_its_set_however_it_grew() -> None:
    drawn = sketch(hashes(1000))
    assert len(drawn) == 64
    assert drawn == sketch(hashes(1000)[::-1])
    assert shared(drawn, hashes(100_000)) == 64
    assert shared(drawn, hashes(1000, start=1000)) == 0
