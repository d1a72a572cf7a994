"""Choosing formats under a budget of stored bits.

Units that lie next to each other may form a run, along which formats must not rise. Where runs are asked for they are
the numbers of units in each, int64 [runs]; without them every unit is chosen by itself.
"""

import heapq

import torch

from mgptq_runtime.errors import BudgetError, NumericalError

__all__ = ["cheapest_within", "choose", "price_for"]


def choose(costs: torch.Tensor, sizes: torch.Tensor, price: float, runs: torch.Tensor | None = None) -> torch.Tensor:
    """The formats that minimize the sum of ``cost + price * size``, never rising along a run: int64 [units].

    Dynamic programming along all runs at once.
    """
    values = costs + price * sizes.double()
    if runs is None or int(runs.max()) == 1:
        return values.argmin(-1)
    inside = torch.arange(int(runs.max())) < runs[:, None]
    padded = values.new_zeros(*inside.shape, values.shape[1])
    padded[inside] = values
    best, before = padded[:, 0], []
    for later in padded.unbind(1)[1:]:
        cheapest, position = best.flip(1).cummin(1)  # among the formats of the unit before that are not smaller
        best = later + cheapest.flip(1)
        before.append(values.shape[1] - 1 - position.flip(1))
    backwards = [best.argmin(1)]
    for chosen in reversed(before):
        backwards.append(chosen.gather(1, backwards[-1][:, None]).squeeze(1))
    return torch.stack(backwards[::-1], 1)[inside]


def total_size(choice: torch.Tensor, sizes: torch.Tensor) -> int:
    """Bits that a choice takes."""
    return int(sizes.gather(1, choice[:, None]).sum())


def price_for(costs: torch.Tensor, sizes: torch.Tensor, budget: int, runs: torch.Tensor | None = None) -> float:
    """The lowest price per bit at which the choice fits the budget (Lagrangian relaxation, by bisection).

    Args:
        costs: float64 [units, formats].
        sizes: int64 [units, formats], bits.
        budget: bits.
        runs: see above.

    Raises:
        BudgetError: not even the smallest formats fit.
        NumericalError: a cost is NaN or infinite.
    """
    if not torch.isfinite(costs).all():
        raise NumericalError(
            "the allocator's scores hold NaN or infinity; are weights huge or all zero? try another --allocator"
        )
    smallest = int(sizes.min(1).values.sum())
    if smallest > budget:
        raise BudgetError(f"the smallest formats take {smallest} bits, the budget is {budget}")
    per_bit = costs / sizes
    low, high = 0.0, max(float(per_bit.max()), 1e-30)
    while total_size(choose(costs, sizes, high, runs), sizes) > budget:
        high *= 4
    for _ in range(80):
        middle = (low * high) ** 0.5 if low > 0 else high / 1e4
        if total_size(choose(costs, sizes, middle, runs), sizes) > budget:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-9:
            break
        if low == 0 and middle < 1e-60:
            break
    return high


def cheapest_within(
    costs: torch.Tensor, sizes: torch.Tensor, budget: int, runs: torch.Tensor | None = None
) -> torch.Tensor:
    """The choice of least cost that uses the budget as fully as whole blocks allow: int64 [units].

    The relaxed optimum first; what it leaves over buys the upgrades that save most per bit and still fit.

    Raises:
        BudgetError, NumericalError: see :func:`price_for`.
    """
    if runs is None:
        runs = torch.ones(len(costs), dtype=torch.int64)
    choice = choose(costs, sizes, price_for(costs, sizes, budget, runs), runs)
    starts = {0, *runs.cumsum(0).tolist()}
    left = budget - total_size(choice, sizes)
    upgrades: list[tuple[float, int, int, int]] = []

    def offer(unit: int) -> None:
        current = int(choice[unit])
        for fmt in range(costs.shape[1] if unit in starts else int(choice[unit - 1]) + 1):
            extra = int(sizes[unit, fmt] - sizes[unit, current])
            if 0 < extra <= left:
                saved = float(costs[unit, current] - costs[unit, fmt])
                heapq.heappush(upgrades, (-saved / extra, unit, current, fmt))

    for unit in range(len(choice)):
        offer(unit)
    while upgrades:
        _, unit, current, fmt = heapq.heappop(upgrades)
        extra = int(sizes[unit, fmt] - sizes[unit, current])
        if choice[unit] == current and extra <= left:
            choice[unit] = fmt
            left -= extra
            offer(unit)
            if unit + 1 not in starts:
                offer(unit + 1)
    return choice
