"""Which source a sample comes from, by weights that change at given steps; computed, not stored.

A stage begins after `from_step` steps. Its samples are cut into blocks. After b whole blocks each source
has given its largest-remainder share of all their samples, so that it is never off by a whole sample,
however small its weight and however long the stage. Inside a block the order is permuted. Sample p of the run is thus
the k-th sample of one source, found from (stages, seed, p) alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from mamba_train.data.order import ORDER_VERSION, ROUNDS, permute

BLOCK_SAMPLES = 2048
# A block has to hold a sample of each source; blocks are made longer for small shares, up to 2^20 samples.
MIN_SHARE = Fraction(1, 1_000_000)


def shares_of(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Exact shares that sum to 1, in the order of the names; sources of weight 0 are left out.

    Raises ValueError (`data.mixture`) for weights that cannot be shares.
    """
    # By way of its text, 0.1 is a tenth and not the nearest binary fraction.
    exact = {name: Fraction(str(weights[name])) for name in sorted(weights) if weights[name]}
    total = sum(exact.values())
    if total <= 0 or min(exact.values()) < 0:
        raise ValueError("data.mixture: expected weights of 0 or more, at least one of them above 0")
    shares = {name: weight / total for name, weight in exact.items()}
    for name, share in shares.items():
        if share < MIN_SHARE:
            raise ValueError(
                f"data.mixture: {name} has a share of {float(share):.1e}, less than one sample in a million; "
                "leave it out"
            )
    return shares


def apportion(n: int, shares: Sequence[Fraction]) -> list[int]:
    """Divide n samples by the largest remainder; shares sum to 1, and so do the counts to n.

    Each count differs from n times its share by less than 1. Of equal remainders the first wins.
    """
    quotas = [n * share for share in shares]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class Stage:
    """The mixture from one step on; `from_sample` is its first sample."""

    from_step: int
    from_sample: int
    weights: Mapping[str, float]

    @cached_property
    def shares(self) -> dict[str, Fraction]:
        """Of the sources, exact; see `shares_of`."""
        return shares_of(self.weights)

    @property
    def block_samples(self) -> int:
        """Samples of a block: enough for one of the smallest source, so that counts never fall from block to block."""
        size = BLOCK_SAMPLES
        while size * min(self.shares.values()) < 1:
            size *= 2
        return size


class Mixture:
    """The stages of a run, the first from sample 0 on.

    names: all sources that some stage draws from, in the order in which `locate` numbers them.
    """

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        self.stages = list(stages)
        self.names = sorted({name for stage in stages for name in stage.shares})
        self._seed = seed
        self._starts = np.array([stage.from_sample for stage in stages], dtype=np.int64)
        self._columns = [np.array([self.names.index(name) for name in stage.shares]) for stage in stages]
        # How many samples each source has given when a stage begins.
        self._given = [np.zeros(len(self.names), dtype=np.int64)]
        for number in range(len(stages) - 1):
            length = stages[number + 1].from_sample - stages[number].from_sample
            self._given.append(self._given[-1] + self._given_in_stage(number, length))

    def stage_at(self, sample: int) -> int:
        """The number of the stage that a sample belongs to."""
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def consumed(self, samples: int) -> NDArray[np.int64]:
        """How many of the first `samples` samples came from each source, int64 (names,)."""
        number = self.stage_at(samples)
        return self._given[number] + self._given_in_stage(number, samples - self.stages[number].from_sample)

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each sample (an index into `names`) and which of that source's samples it is; int64 (n,)."""
        source, ordinal = np.empty_like(samples), np.empty_like(samples)
        stage_of = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(stage_of).tolist():
            stage, columns = self.stages[number], self._columns[number]
            in_stage = np.flatnonzero(stage_of == number)
            blocks, places = np.divmod(samples[in_stage] - stage.from_sample, stage.block_samples)
            for block in np.unique(blocks).tolist():
                chosen = blocks == block
                before, order = self._block(number, block)
                which, rank = order[:, places[chosen]]
                source[in_stage[chosen]] = columns[which]
                ordinal[in_stage[chosen]] = self._given[number][columns[which]] + before[which] + rank
        return source, ordinal

    def _given_in_stage(self, number: int, samples: int) -> NDArray[np.int64]:
        """What each source has given in the first `samples` samples of a stage."""
        block, rest = divmod(samples, self.stages[number].block_samples)
        before, order = self._block(number, block)
        given = np.zeros(len(self.names), dtype=np.int64)
        given[self._columns[number]] = before + np.bincount(order[0, :rest], minlength=len(before))
        return given

    def _block(self, number: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """What each source of the stage has given before a block, and the order inside it."""
        stage = self.stages[number]
        key_text = f"{ORDER_VERSION}/block/{self._seed}/{stage.from_sample}/{block}"
        return _block(key_text, block, stage.block_samples, tuple(stage.shares.values()))


@lru_cache(maxsize=4)  # consecutive samples share a block
def _block(
    key_text: str, block: int, size: int, shares: tuple[Fraction, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """What each source has given before a block, int64 (sources,), and the order inside the block, int32 (2, size).

    Row 0 of the order has the source of each place, row 1 how many places before it have the same one.
    """
    before, after = (np.array(apportion(b * size, shares), dtype=np.int64) for b in (block, block + 1))
    counts = after - before
    key = hashlib.blake2b(key_text.encode(), digest_size=8 * ROUNDS).digest()
    sources = np.repeat(np.arange(len(shares), dtype=np.int32), counts)[permute(np.arange(size), size, key)]
    ranks = np.empty(size, dtype=np.int32)
    # In the order of a stable sort the places of a source follow each other.
    ranks[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    order = np.stack([sources, ranks])
    for array in (before, order):  # the cache gives the same ones again
        array.flags.writeable = False
    return before, order
