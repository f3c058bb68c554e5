"""Expected numbers of network calls in a training step, for the planner."""

from collections.abc import Iterable, Mapping, Sequence


def total_calls(*counts: Mapping[str, float]) -> dict[str, float]:
    """The sum of numbers of calls by network."""
    total: dict[str, float] = {}
    for calls in counts:
        for name, count in calls.items():
            total[name] = total.get(name, 0) + count
    return total


def mean_rolled_steps(nfe: Sequence[int]) -> float:
    """Mean number of student steps of a roll-out that ends after a uniformly sampled step of a uniformly sampled grid."""
    return _mean((count + 1) / 2 for count in nfe)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
