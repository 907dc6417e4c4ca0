"""Several sources at once, each giving its share of the rows."""

from typing import Any

import numpy as np

from rwkvx.data.sources.contract import Ids, Rows, Source, Wanted

BLOCK = 1000  # rows after which every source has given exactly its share


class Mixture:
    """Which source gives a row depends on the row's number alone, so that any row can be had.

    Args:
        names: of the sources, for the curves of their evaluations.
        weights: their shares; they need not sum to 1.
    """

    def __init__(self, names: list[str], sources: list[Source], weights: list[float]) -> None:
        self.names, self.sources = names, sources
        exact = np.asarray(weights) / sum(weights) * BLOCK
        counts = exact.astype(int)
        for index in np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]:
            counts[index] += 1  # the largest remainders
        self.counts = counts

    def rows(self, wanted: Wanted) -> Rows:
        chosen = [self._place(wanted.order, number) for number in wanted.numbers]
        parts, places = [], []
        for index, source in enumerate(self.sources):
            mine = [i for i, (which, _) in enumerate(chosen) if which == index]
            if mine:
                numbers = [chosen[i][1] for i in mine]
                fresh = (*wanted.fresh, index)
                rows = source.rows(wanted._replace(numbers=numbers, fresh=fresh))
                share = np.float32(len(mine) / len(chosen))
                parts.append(rows._replace(weights=rows.weights * share))
                places += mine
        back = np.argsort(places)
        return Rows(*(np.concatenate(x)[back] for x in zip(*parts, strict=True)))

    def evaluations(self) -> dict[str, Source]:
        return {
            f"{name}/{part}": source
            for name, parent in zip(self.names, self.sources, strict=True)
            for part, source in parent.evaluations().items()
        }

    def identity(self) -> dict[str, Any]:
        shares = (int(count) for count in self.counts)
        return {
            f"{name}-{i}": {"share": share, **source.identity()}
            for i, (name, share, source) in enumerate(
                zip(self.names, shares, self.sources, strict=True)
            )
        }

    def _place(self, order: tuple[int, ...], number: int) -> tuple[int, int]:
        """The source of a row, and the row's number in it."""
        block, index = divmod(number, BLOCK)
        turns = self._turns(order, block)
        which = int(turns[index])
        before = int((turns[:index] == which).sum())
        return which, block * int(self.counts[which]) + before

    def _turns(self, order: tuple[int, ...], block: int) -> Ids:
        turns = np.repeat(np.arange(len(self.sources)), self.counts)
        return np.random.default_rng((*order, block)).permutation(turns)
