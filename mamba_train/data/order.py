"""The order of samples: a pseudo-random permutation that is computed, not stored.

Sample p of the endless stream lies in epoch p // n; inside an epoch the windows are permuted by a
Feistel network with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
Any position is found in constant time and memory, so a resume, another number of ranks or another
number of workers needs one integer and no index file.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = "permuted-windows-1"  # change it when this file gives another order
ROUNDS = 8


def epoch_key(seed: int, epoch: int, source: str = "") -> bytes:
    """The key of the permutation of an epoch, of one source of a mixture or ("") of all windows there are."""
    text = f"{ORDER_VERSION}/{seed}/{epoch}" + (f"/{source}" if source else "")
    return hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers (the finaliser of splitmix64; overflow wraps on purpose)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _feistel(
    values: NDArray[np.uint64], half_bits: NDArray[np.uint64], round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Permute numbers below 2^(2 * half_bits), each by its own half_bits (m,) and keys (rounds, m)."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for keys in round_keys:
        left, right = right, left ^ (_mix(right + keys) & mask)
    return (left << half_bits) | right


def permute(index: NDArray[np.int64], n: int, key: bytes) -> NDArray[np.int64]:
    """The places that a permutation of range(n) gives to `index`.

    index: int64, any shape, each in [0, n); returns the same shape. n: 1 to 2^62. key: from
    `epoch_key`. Raises ValueError outside these ranges.
    """
    index = np.asarray(index, dtype=np.int64)
    return permute_each(index.ravel(), [n], [key]).reshape(index.shape)


def permute_each(index: NDArray[np.int64], n: Sequence[int], keys: Sequence[bytes]) -> NDArray[np.int64]:
    """As `permute`, for a 1-D index of which each number has its own n and key (or all have the only one)."""
    sizes = np.broadcast_to(np.array(n, dtype=np.int64), index.shape)
    if not 1 <= min(n) <= max(n) <= 1 << 62:
        raise ValueError(f"n={n[0]}: expected 1 to 2^62")
    if index.size and (index.min() < 0 or (index >= sizes).any()):
        raise ValueError(f"index outside [0, {n[0]})")
    bits = [max(1, ((one - 1).bit_length() + 1) // 2) for one in n]
    half_bits = np.broadcast_to(np.array(bits, dtype=np.uint64), index.shape)
    words = np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64).reshape(-1, ROUNDS).T
    round_keys = np.broadcast_to(words, (ROUNDS, *index.shape))
    values = _feistel(index.astype(np.uint64), half_bits, round_keys)
    # The network permutes up to 4n numbers; walking on from those that fell outside permutes range(n).
    outside = np.flatnonzero(values >= sizes.astype(np.uint64))
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits[outside], round_keys[:, outside])
        outside = outside[values[outside] >= sizes[outside].astype(np.uint64)]
    return values.astype(np.int64)
