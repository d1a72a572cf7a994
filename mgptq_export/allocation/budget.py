"""Choosing formats under a budget of stored bits."""

import heapq

import torch

from mgptq_runtime.errors import BudgetError, NumericalError

__all__ = ["cheapest_within", "choose", "price_for"]


def choose(costs: torch.Tensor, sizes: torch.Tensor, price: float) -> torch.Tensor:
    """The format that minimizes ``cost + price * size`` of every unit: int64 [units]."""
    return (costs + price * sizes.double()).argmin(-1)


def total_size(choice: torch.Tensor, sizes: torch.Tensor) -> int:
    """Bits that a choice takes."""
    return int(sizes.gather(1, choice[:, None]).sum())


def price_for(costs: torch.Tensor, sizes: torch.Tensor, budget: int) -> float:
    """The lowest price per bit at which the choice fits the budget (Lagrangian relaxation, by bisection).

    Args:
        costs: float64 [units, formats].
        sizes: int64 [units, formats], bits.
        budget: bits.

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
    while total_size(choose(costs, sizes, high), sizes) > budget:
        high *= 4
    for _ in range(80):
        middle = (low * high) ** 0.5 if low > 0 else high / 1e4
        if total_size(choose(costs, sizes, middle), sizes) > budget:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-9:
            break
        if low == 0 and middle < 1e-60:
            break
    return high


def cheapest_within(costs: torch.Tensor, sizes: torch.Tensor, budget: int) -> torch.Tensor:
    """The choice of least cost that uses the budget as fully as whole blocks allow: int64 [units].

    The relaxed optimum first; what it leaves over buys the upgrades that save most per bit and still fit.

    Raises:
        BudgetError, NumericalError: see :func:`price_for`.
    """
    choice = choose(costs, sizes, price_for(costs, sizes, budget))
    left = budget - total_size(choice, sizes)
    upgrades: list[tuple[float, int, int, int]] = []

    def offer(unit: int) -> None:
        current = int(choice[unit])
        for fmt in range(costs.shape[1]):
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
    return choice
