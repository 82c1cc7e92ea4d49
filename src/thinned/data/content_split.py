"""Assigns examples to splits by their content, so that a set can grow without moving any of them.

An example is hashed, the hash is mixed with a seed, and the result, uniform in [0, 1), is compared with fixed
thresholds. So neither the order nor the number of the others matters, and duplicates fall on one side.

Shapes: N examples.
"""

import hashlib

import numpy as np

from thinned.data.order import Split

SKETCH = 64  # training examples by which a set is recognised


def content_hash(content: bytes, seed: int | None = None) -> int:
    """Returns a 64-bit hash of some bytes, another one for each seed."""
    key = b"" if seed is None else seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "little")


def uniform(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Returns a number in [0, 1) for each hash, (N,) float64, another one for each seed.

    The mixing function is SplitMix64's (Steele, Lea and Flood 2014).
    """
    x = hashes ^ np.uint64(content_hash(seed.to_bytes(8, "little")))
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53


def split_by_content(hashes: np.ndarray, seed: int, val: float, test: float) -> dict[Split, np.ndarray]:
    """Returns the rows of each split, ascending, from the hashes of examples, (N,) uint64, and two fractions.

    Changing `val` moves no example into or out of the test.
    """
    u = uniform(hashes, seed)
    is_test, is_val = u < test, u >= 1 - val
    parts: dict[Split, np.ndarray] = {"train": ~is_test & ~is_val, "val": is_val & ~is_test, "test": is_test}
    return {split: np.flatnonzero(part) for split, part in parts.items()}


def digest(hashes: np.ndarray) -> str:
    """Returns a hash of a set of examples, in any order, as 32 hexadecimal digits."""
    return hashlib.blake2b(np.sort(hashes).astype("<u8").tobytes(), digest_size=16).hexdigest()


def sketch(hashes: np.ndarray) -> list[str]:
    """Returns the 64 smallest hashes of a set: a sample that stays the same if examples are reordered or renamed."""
    return [f"{value:016x}" for value in np.unique(hashes)[:SKETCH].tolist()]


def shared(drawn: list[str], hashes: np.ndarray) -> int:
    """Returns how many examples of a sketch are in a set."""
    return int(np.isin(np.array([int(value, 16) for value in drawn], np.uint64), hashes).sum())
