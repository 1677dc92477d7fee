"""Experts of a feed-forward: its keys in clusters of exactly equal size (Qiu et al. 2024, arXiv 2310.10908)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 1e-4  # share of the inertia; a step that gains less halves the discount
LEAST_DISCOUNT = 0.1  # below it a step is nearly Lloyd's, and where that one gains nothing the search is over
WIDEST = 4.0  # squared distance of two opposite unit rows
NUDGE = 1e-9  # float32 rounds costs a hundred times coarser; without it equal rows all crowd into one cluster


def balanced_kmeans(keys: Tensor, num_experts: int, *, seed: int = 0, max_iterations: int = 100) -> Tensor:
    """Labels with a small Σᵢ ‖xᵢ − m_label(i)‖², x the rows of unit length, m the means, all clusters of one size.

    A step takes the means m and assigns all rows to them at the least total cost (`Transport`). A row draws its own
    mean towards itself by 1 / rows of the cluster, which hides most exchanges that pay, so that draw, times a
    discount, is added to its cost: at 1 it makes the gain of a single exchange exact, up to the product of its two
    rows. All rows move at once: a step that does not lower the inertia is not taken, and halves the discount. One
    k-means++ start ends 0.4 to 2.5 % below the best of ten of k-means-constrained 0.9.1.

    Args:
        keys: K, [d_ff, d], of any float dtype and on any device; computed on the CPU in float32. A row of zeros stays.
        num_experts: divides d_ff.
        seed: of the start; the same labels come for it on one machine, whatever the global generator holds.
        max_iterations: steps at most; 10 to 30 are usual.

    Returns:
        labels, int64, [d_ff], on the CPU.

    Raises:
        ValueError: num_experts does not divide d_ff; keys are not finite.
    """
    count = _expert_size(len(keys), num_experts)
    rows = _unit_rows(keys)
    if num_experts in (1, len(rows)):  # all labels are equally good
        return contiguous_clusters(len(rows), num_experts)
    transport = Transport(num_experts)
    labels = transport.assign(_costs(rows, _start(rows, num_experts, seed)))
    sums = _sums(rows, labels, num_experts)
    between, discount, everyone = _energy(sums) / count, 1.0, np.arange(len(rows))
    for _ in range(max_iterations):
        cost = _costs(rows, sums / count)
        cost[everyone, labels] += discount / count
        proposed = transport.assign(cost)
        if (proposed == labels).all():
            break
        proposed_sums = _sums(rows, proposed, num_experts)
        gain = _energy(proposed_sums) / count - between
        if gain > 0:
            labels, sums, between = proposed, proposed_sums, between + gain
        if gain <= TOLERANCE * (len(rows) - between):
            if discount < LEAST_DISCOUNT:
                break
            discount /= 2
    return torch.from_numpy(labels)


def random_clusters(size: int, num_experts: int, seed: int = 0) -> Tensor:
    """Labels in clusters of one size, drawn at random, int64, [size]; errors as in `balanced_kmeans`."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(size, generator=generator, device="cpu")
    return contiguous_clusters(size, num_experts)[order]


def contiguous_clusters(size: int, num_experts: int) -> Tensor:
    """Labels 0, …, 0, 1, …, 1, … in runs of one length, int64, [size]; errors as in `balanced_kmeans`."""
    return torch.arange(size, device="cpu") // _expert_size(size, num_experts)


def nearest_divisors(size: int, wanted: int) -> tuple[int, ...]:
    """The divisors of size next to `wanted`, one on each side where there is one; `wanted` alone if it divides."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    below, above = [d for d in divisors if d <= wanted], [d for d in divisors if d >= wanted]
    return tuple(dict.fromkeys(below[-1:] + above[:1]))


def _expert_size(size: int, num_experts: int) -> int:
    if num_experts >= 1 and size % num_experts == 0:
        return size // num_experts
    near = " and ".join(map(str, nearest_divisors(size, num_experts)))
    raise ValueError(
        f"{size} keys are not divisible by num_experts={num_experts}; the nearest that divide them: {near}."
    )


class Transport:
    """Rows to clusters of equal size at the least total cost, by shortest augmenting paths between the clusters.

        min Σᵢ cost[i, label(i)],   every cluster with rows / clusters of them

    With prices p every row takes the cluster of least cost + p. While a cluster holds too many rows, one is passed on
    to a cluster with too few along the cheapest chain, in which each cluster hands its cheapest row to the next:

        arc[j, k] = min over the rows of j of cost[i, k] − cost[i, j]

    The distances d in arc[j, k] + p[k] − p[j] ≥ 0 become the new prices p − d, so that the labels stay the best for
    the sizes they have. Prices are kept from one call to the next: where costs move little, few rows need a chain.
    Memory is a few times [rows, clusters]; the time grows with the rows to pass on times [clusters, clusters].
    """

    def __init__(self, clusters: int) -> None:
        self.prices = np.zeros(clusters)

    def assign(self, cost: NDArray[np.float64]) -> NDArray[np.int64]:
        """Labels, [rows], of cost, [rows, clusters]."""
        clusters = len(self.prices)
        self._cost = cost + NUDGE * np.random.default_rng(0).random(cost.shape)
        self._labels = (self._cost + self.prices).argmin(1)
        self._room = len(cost) // clusters - np.bincount(self._labels, minlength=clusters)
        self._arcs = np.full((clusters, clusters), np.inf)
        self._movers = np.zeros((clusters, clusters), np.int64)
        for cluster in range(clusters):
            self._find_movers(cluster, np.arange(clusters))
        while (self._room < 0).any():
            self._pass_on(*self._shortest_chain())
        return self._labels

    def _shortest_chain(self) -> tuple[int, NDArray[np.int64]]:
        """The nearest cluster with room, and the one before each cluster on its chain, -1 at the start."""
        distance = np.where(self._room < 0, 0.0, np.inf)
        before = np.full(len(distance), -1)
        frontier, nearest = np.flatnonzero(self._room < 0), np.inf
        while frontier.size:
            arcs = self._arcs[frontier] + self.prices - self.prices[frontier, None]
            through = distance[frontier, None] + np.maximum(arcs, 0.0)  # below zero by rounding only
            via = through.argmin(0)
            reached = through[via, np.arange(len(distance))]
            closer = reached < np.minimum(distance, nearest)
            distance[closer], before[closer] = reached[closer], frontier[via[closer]]
            nearest = distance[self._room > 0].min()
            frontier = np.flatnonzero(closer & (distance < nearest))
        self.prices -= np.minimum(distance, nearest)
        return int(np.where(self._room > 0, distance, np.inf).argmin()), before

    def _pass_on(self, cluster: int, before: NDArray[np.int64]) -> None:
        self._room[cluster] -= 1
        while (giver := int(before[cluster])) >= 0:
            self._move(int(self._movers[giver, cluster]), giver, cluster)
            cluster = giver
        self._room[cluster] += 1

    def _move(self, row: int, giver: int, taker: int) -> None:
        self._labels[row] = taker
        self._find_movers(giver, np.flatnonzero(self._movers[giver] == row))
        arcs = self._cost[row] - self._cost[row, taker]
        cheaper = arcs < self._arcs[taker]
        self._arcs[taker, cheaper], self._movers[taker, cheaper] = arcs[cheaper], row

    def _find_movers(self, cluster: int, takers: NDArray[np.int64]) -> None:
        members = np.flatnonzero(self._labels == cluster)
        if not members.size:
            self._arcs[cluster] = np.inf
            return
        arcs = self._cost[np.ix_(members, takers)] - self._cost[members, cluster, None]
        cheapest = arcs.argmin(0)
        self._movers[cluster, takers] = members[cheapest]
        self._arcs[cluster, takers] = arcs[cheapest, np.arange(len(takers))]


def _unit_rows(keys: Tensor) -> Tensor:
    """Rows over their lengths, float32; zeros stay."""
    rows = keys.detach().to("cpu", torch.float32, copy=True)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    if len(bad := (~lengths.isfinite()).nonzero()):
        raise ValueError(
            f"balanced_kmeans: {len(bad)} of {len(rows)} keys are not finite, the first is row {bad[0].item()}; "
            "mend the weights, or take clusters that need no keys (random, contiguous)."
        )
    return rows.div_(lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None])


def _start(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: rows drawn one by one, each in proportion to its squared distance from the nearest drawn before."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    gaps, drawn = rows.new_full((len(rows),), WIDEST), list[int]()
    for _ in range(clusters):
        # 1e-9: where all rows are drawn already, any may come again
        row = int(torch.multinomial(gaps.double() + 1e-9, 1, generator=generator))
        gaps = torch.minimum(gaps, 2 - 2 * (rows @ rows[row])).clamp_min_(0.0)
        drawn.append(row)
    return rows[drawn]


def _costs(rows: Tensor, means: Tensor) -> NDArray[np.float64]:
    """−x mᵀ, [rows, clusters]: half the squared distance without ‖x‖² and ‖m‖², whose sums are fixed."""
    return -(rows @ means.T).numpy().astype(np.float64)


def _sums(rows: Tensor, labels: NDArray[np.int64], clusters: int) -> Tensor:
    return rows.new_zeros(clusters, rows.shape[1]).index_add_(0, torch.from_numpy(labels), rows)


def _energy(sums: Tensor) -> float:
    return sums.double().square().sum().item()
