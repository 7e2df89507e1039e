"""A search as an optimization problem: layers in groups, candidates, estimated errors and costs; and its solutions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dybit.errors import DyBitError
from dybit.mixed_precision import knapsack
from dybit.mixed_precision.candidate import Candidate
from dybit.mixed_precision.cost import CostTable

Choice = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """The choices of a search with their errors and costs.

    Attributes:
        candidates: The candidates.
        groups: Layers that take the same candidate; every layer is in one of them.
        errors: Estimated errors in the order of the candidates, by layer.
        tables: The costs. The first is minimised if an error is limited.
        embeddings: Layers that are embedding tables.
        embedding_weights: Their weight format in uniform recipes.
    """

    candidates: tuple[Candidate, ...]
    groups: tuple[tuple[str, ...], ...]
    errors: Mapping[str, Sequence[float]]
    tables: tuple[CostTable, ...]
    embeddings: Collection[str] = field(default_factory=frozenset)
    embedding_weights: int | str | None = 8

    @cached_property
    def error_table(self) -> NDArray[np.float64]:
        """Errors by group and candidate; infinite if a candidate cannot run."""
        runs = np.all([np.isfinite(cost) for cost in self.cost_tables.values()], axis=0)
        return np.where(runs, self._grouped(self.errors), np.inf)

    @cached_property
    def cost_tables(self) -> dict[str, NDArray[np.float64]]:
        """Costs by group and candidate, without the fixed part, by the name of the cost."""
        return {table.name: self._grouped(table.layers) for table in self.tables}

    def _grouped(self, rows: Mapping[str, Sequence[float]]) -> NDArray[np.float64]:
        return np.array(
            [[math.fsum(column) for column in zip(*(rows[n] for n in g), strict=True)] for g in self.groups]
        )

    def table(self, name: str) -> CostTable:
        """Returns the cost table of a name."""
        return next(table for table in self.tables if table.name == name)

    @property
    def main(self) -> CostTable:
        """The cost that is minimised if an error is limited."""
        return self.tables[0]

    def solve(self, limits: Mapping[str, float], max_error: float | None = None) -> Choice:
        """Minimises the error within limits of costs, or the main cost if the error is limited.

        Args:
            limits: By the name of a cost.
            max_error: Limit of the estimated error.

        Raises:
            InfeasibleError: No choice is within the limits.
        """
        costs = [self.cost_tables[name] for name in limits]
        rest = [limit - self.table(name).fixed for name, limit in limits.items()]
        if max_error is None:
            return self._choice(knapsack.solve(self.error_table, costs, rest))
        main = self.cost_tables[self.main.name]
        return self._choice(knapsack.solve(main, [*costs, self.error_table], [*rest, max_error]))

    def greedy(self, name: str, limit: float, k: int = 3) -> Choice | None:
        """Runs the paper's loop down to a limit of one cost. Returns None if it does not reach the limit."""
        found = knapsack.greedy(self.error_table, self.cost_tables[name], limit - self.table(name).fixed, k)
        return None if found is None else self._choice(found)

    def uniform(self, index: int) -> Choice:
        """Returns the choice of one candidate for all layers. Embedding tables have their own width, as in recipes."""
        wanted = self.candidates[index]
        same = [i for i, c in enumerate(self.candidates) if c.weights == self.embedding_weights]
        table = next((i for i in same if self.candidates[i].activations == wanted.activations), (*same, index)[0])
        heads = {name for group in self.groups if not set(group).isdisjoint(self.embeddings) for name in group}
        return {name: table if name in heads and not wanted.kept else index for group in self.groups for name in group}

    def cheapest(self, name: str) -> Choice:
        """Returns the cheapest choice, and among equal ones the most exact."""
        cost = self.cost_tables[name]
        return self._choice(np.lexsort((self.error_table, cost), axis=1)[:, 0])

    def most_exact(self, limits: Mapping[str, float]) -> Choice:
        """Returns the choice of least estimated error within limits, and among equal ones the cheapest."""
        if limits:
            return self.solve(limits)
        return self._choice(np.lexsort((self.cost_tables[self.main.name], self.error_table), axis=1)[:, 0])

    def error(self, choice: Choice) -> float:
        """Returns the estimated error of a choice: the sum over its layers."""
        return math.fsum(self.errors[name][index] for name, index in choice.items())

    def costs(self, choice: Choice) -> dict[str, float]:
        """Returns the costs of a choice by name."""
        return {table.name: table.total(choice) for table in self.tables}

    def runs(self, choice: Choice) -> bool:
        """Whether every layer can run as chosen, according to all costs."""
        return all(math.isfinite(cost) for cost in self.costs(choice).values())

    def layers(self, choice: Choice) -> dict[str, Candidate]:
        """Returns the candidate of every layer."""
        return {name: self.candidates[index] for name, index in choice.items()}

    def _choice(self, options: NDArray[np.int64]) -> Choice:
        pairs = zip(self.groups, options.tolist(), strict=True)
        return {name: option for group, option in pairs for name in group}

    def front(self, name: str, points: int) -> list[Choice]:
        """Returns the choices of least error at evenly spaced speedups, from the most exact to the cheapest.

        Raises:
            DyBitError: ``points`` is below 2.
        """
        if points < 2:
            raise DyBitError(f"pareto must be at least 2 points, not {points!r}")
        table = self.table(name)
        start, end = (table.base / table.total(c) for c in (self.most_exact({}), self.cheapest(name)))
        found: list[Choice] = []
        # Solves for more limits than points, since neighbouring limits often have the same solution.
        for ratio in np.linspace(start, end, max(2 * points, points + 8)):
            limit = table.base / ratio * (1 + 1e-9)
            try:
                choice = self.solve({name: limit})
            except knapsack.InfeasibleError:
                continue
            if choice not in found:
                found.append(choice)
        if len(found) <= points:
            return found
        return [found[round(i)] for i in np.linspace(0, len(found) - 1, points)]
