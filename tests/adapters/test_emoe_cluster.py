"""Clusters of equal size: against an exact assignment, and against the inertia k-means-constrained reaches."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from transformers import AutoModel

from petune.adapters.emoe.cluster import (
    Transport,
    balanced_kmeans,
    contiguous_clusters,
    nearest_divisors,
    random_clusters,
)
from petune.demo.retrieval import demo_encoder

# KMeansConstrained(N, size_min=F/N, size_max=F/N, random_state=0) of k-means-constrained 0.9.1: the best of ten starts
NORMAL = {(256, 32, 8): 217.191, (1024, 64, 16): 929.060, (3072, 768, 64): 2974.752}
ENCODER = {("0", 64): 1228.954, ("2", 16): 1412.060, ("4", 64): 1352.425}
MOVE = Transport._move
REACH = """
import resource, time, torch
from petune.adapters.emoe.cluster import balanced_kmeans
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
keys = torch.randn(11008, 4096, generator=torch.Generator().manual_seed(0))
keys[:64] @ keys[:64].T
before, started = peak(), time.process_time()
labels = balanced_kmeans(keys, 64)
assert labels.bincount(minlength=64).eq(172).all()
print(peak() - before, time.process_time() - started)
"""


def normal_keys(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inertia(keys: torch.Tensor, labels: torch.Tensor) -> float:
    """Σ ‖x − mean of its cluster‖² over the rows of unit length, float64."""
    rows = F.normalize(keys.double(), dim=1)
    return sum(
        (rows[labels == label] - rows[labels == label].mean(0)).square().sum().item() for label in labels.unique()
    )


def sizes(labels: torch.Tensor, clusters: int) -> set[int]:
    return set(labels.bincount(minlength=clusters).tolist())


def least_cost(cost: np.ndarray) -> float:
    """Of every balanced assignment, with each cluster repeated once per row that it holds."""
    repeated = np.repeat(cost, len(cost) // cost.shape[1], axis=1)
    return repeated[linear_sum_assignment(repeated)].sum()


# --- inertia ---


@pytest.mark.parametrize(("size", "width", "clusters"), NORMAL)
def test_inertia_is_below_the_best_of_ten_of_k_means_constrained(size, width, clusters):
    keys = normal_keys(size, width)
    labels = balanced_kmeans(keys, clusters)
    assert sizes(labels, clusters) == {size // clusters}
    assert inertia(keys, labels) < NORMAL[size, width, clusters] * 0.995


@pytest.mark.parametrize(("block", "clusters"), ENCODER)
def test_keys_of_a_trained_encoder_cluster_below_k_means_constrained(block, clusters):
    encoder = AutoModel.from_pretrained(demo_encoder())
    keys = encoder.get_submodule(f"encoder.layer.{block}.intermediate.dense").weight
    labels = balanced_kmeans(keys, clusters)
    assert sizes(labels, clusters) == {1536 // clusters}
    assert inertia(keys, labels) < ENCODER[block, clusters] * 0.999


def test_clusters_of_one_size_that_lie_apart_are_found():
    centers = 5 * normal_keys(7, 12)
    truth = random_clusters(7 * 9, 7, seed=3)
    labels = balanced_kmeans(centers[truth] + 0.1 * normal_keys(63, 12, seed=1), 7)
    assert all(len(labels[truth == group].unique()) == 1 for group in range(7))


def test_an_exchange_of_two_rows_has_little_left_to_gain():
    keys, left = normal_keys(45, 6), []
    for seed in range(3):
        labels, exchanged = balanced_kmeans(keys, 5, seed=seed), []
        for i, j in torch.combinations(torch.arange(45)).tolist():
            other = labels.clone()
            other[i], other[j] = labels[j], labels[i]
            exchanged.append(inertia(keys, other))
        left.append(1 - min(exchanged) / inertia(keys, labels))
    assert np.mean(left) < 0.01  # seen: 0.2 %; plain Lloyd steps from the same starts leave 1.7 %


def test_more_steps_never_raise_the_inertia():
    keys = normal_keys(60, 7)
    reached = [inertia(keys, balanced_kmeans(keys, 6, max_iterations=steps)) for steps in range(12)]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < reached[0]


# --- every input ends in clusters of one size ---


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 7), clusters=st.integers(1, 9), width=st.integers(1, 5), distinct=st.integers(1, 20))
def test_every_expert_has_the_same_size(count, clusters, width, distinct):
    keys = normal_keys(distinct, width)[torch.arange(count * clusters) % distinct]
    labels = balanced_kmeans(keys, clusters)
    assert labels.dtype == torch.int64
    assert labels.shape == (count * clusters,)
    assert sizes(labels, clusters) == {count}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_keys_end_in_clusters_of_one_size(value):
    assert sizes(balanced_kmeans(torch.full((768, 5), value), 16), 16) == {48}


def test_copies_of_one_key_share_a_cluster():
    labels = balanced_kmeans(normal_keys(31, 3).repeat(5, 1), 31).view(5, 31)
    assert (labels == labels[0]).all()


def test_only_the_direction_of_a_key_counts():
    keys = normal_keys(48, 8)
    keys[5] = 0.0
    scaled = keys * torch.tensor([0.5, 4.0, 2.0]).repeat(16)[:, None]
    assert balanced_kmeans(keys, 6).equal(balanced_kmeans(scaled, 6))


# --- what the labels depend on ---


def test_labels_depend_on_the_seed_alone():
    keys, untouched = normal_keys(96, 10), torch.get_rng_state()
    labels = balanced_kmeans(keys, 8, seed=1)
    assert torch.get_rng_state().equal(untouched)
    torch.manual_seed(5)
    assert balanced_kmeans(keys, 8, seed=1).equal(labels)
    assert not balanced_kmeans(keys, 8, seed=2).equal(labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keys_of_other_dtypes_cluster_as_in_float32(dtype):
    keys = normal_keys(96, 10).to(dtype)
    kept = keys.clone()
    assert balanced_kmeans(keys, 8).equal(balanced_kmeans(keys.float(), 8))
    assert keys.equal(kept)


def test_keys_that_train_stay_as_they_are():
    keys = torch.nn.Parameter(normal_keys(24, 5))
    assert not balanced_kmeans(keys, 4).requires_grad
    assert keys.detach().equal(normal_keys(24, 5))


# --- the assignment ---


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), clusters=st.integers(1, 8), seed=st.integers(0, 999), levels=st.integers(1, 40))
def test_no_balanced_assignment_costs_less(count, clusters, seed, levels):
    rng = np.random.default_rng(seed)
    transport = Transport(clusters)
    for _ in range(3):  # the second and third start from the prices before
        cost = rng.integers(levels, size=(count * clusters, clusters)) / 3.0
        labels = transport.assign(cost)
        assert (np.bincount(labels, minlength=clusters) == count).all()
        assert cost[np.arange(len(cost)), labels].sum() == pytest.approx(least_cost(cost), abs=1e-6)


def test_an_assignment_of_many_rows_to_crowded_clusters_is_the_best():
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(430, 43)) + 3 * rng.normal(size=43)  # nearly all rows want the same few clusters
    labels = Transport(43).assign(cost)
    assert cost[np.arange(430), labels].sum() == pytest.approx(least_cost(cost), abs=1e-6)


def test_rows_without_a_preference_are_spread_at_once(monkeypatch):
    passed_on = []
    monkeypatch.setattr(Transport, "_move", lambda *args: passed_on.append(args) or MOVE(*args))
    labels = Transport(16).assign(np.zeros((768, 16)))
    assert (np.bincount(labels) == 48).all()
    assert len(passed_on) < 192  # as many as 720 where all rows start in one cluster


# --- the other clusterings, and errors ---


def test_contiguous_clusters_are_runs():
    assert contiguous_clusters(9, 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_random_clusters_have_one_size_and_depend_on_the_seed():
    labels = random_clusters(91, 7, seed=1)
    assert sizes(labels, 7) == {13}
    assert labels.equal(random_clusters(91, 7, seed=1))
    assert not labels.equal(random_clusters(91, 7, seed=2))
    assert not labels.equal(contiguous_clusters(91, 7))


@pytest.mark.parametrize(
    ("size", "wanted", "nearest"),
    [(3072, 100, (96, 128)), (3072, 64, (64,)), (768, 1000, (768,)), (768, 0, (1,)), (7, 3, (1, 7))],
)
def test_the_nearest_divisors_are_named(size, wanted, nearest):
    assert nearest_divisors(size, wanted) == nearest


@pytest.mark.parametrize("cluster", [balanced_kmeans, random_clusters, contiguous_clusters])
@pytest.mark.parametrize("num_experts", [5, 0, -2])
def test_a_number_of_experts_that_does_not_divide_is_refused(cluster, num_experts):
    keys = normal_keys(12, 3) if cluster is balanced_kmeans else 12
    near = "4 and 6" if num_experts == 5 else "1"
    with pytest.raises(ValueError, match=rf"12 keys .* num_experts={num_experts}; .*: {near}\.$"):
        cluster(keys, num_experts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(value):
    keys = normal_keys(12, 3)
    keys[7, 1] = keys[9, 0] = value
    with pytest.raises(ValueError, match="2 of 12 keys are not finite, the first is row 7"):
        balanced_kmeans(keys, 4)


# --- reach ---


@pytest.mark.slow
def test_eleven_thousand_keys_take_half_a_minute_of_two_cores_and_less_than_a_gibibyte():
    done = subprocess.run([sys.executable, "-c", REACH], capture_output=True, text=True, check=True)
    peak_mib, cpu_seconds = map(float, done.stdout.split())
    assert peak_mib < 1024
    assert cpu_seconds < 60
