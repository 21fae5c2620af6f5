"""Who owns what: every head, column and row exactly once (KV heads as often as needed), and always a shape attention can take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_attn.parallel.sharding import Partition, features, split, split_heads


@given(total=st.integers(0, 300), parts=st.integers(1, 40))
def test_split_covers_in_order_with_sizes_that_differ_by_one(total, parts):
    ranges = split(total, parts)
    assert [i for part in ranges for i in part] == list(range(total))
    sizes = [len(part) for part in ranges]
    assert len(sizes) == parts and sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


@given(kv_heads=st.integers(1, 12), group=st.integers(1, 9), data=st.data())
def test_heads_cover_and_each_rank_sees_grouped_query_attention(kv_heads, group, data):
    q_heads = kv_heads * group
    world_size = data.draw(st.integers(1, q_heads))
    heads = split_heads(q_heads, kv_heads, world_size)
    assert len(heads) == world_size
    assert [head for q, _ in heads for head in q] == list(range(q_heads))                  # once each, in rank order
    assert {head for _, kv in heads for head in kv} == set(range(kv_heads))
    for q, kv in heads:
        assert len(q) >= 1 and len(kv) >= 1 and len(q) % len(kv) == 0
        local_group = len(q) // len(kv)
        for place, head in enumerate(q):                                                   # the KV head that attention will pair it with
            assert kv[place // local_group] == head // group
    stored = sum(len(kv) for _, kv in heads)
    assert stored == max(kv_heads, world_size)                                             # no KV head is kept more often than it must be


def test_eight_kv_heads_over_three_ranks():
    assert [(len(q), len(kv)) for q, kv in split_heads(32, 8, 3)] == [(12, 3), (12, 3), (8, 2)]


def test_more_ranks_than_kv_heads_divide_the_groups():
    assert split_heads(8, 2, 5) == [
        (range(0, 2), range(0, 1)), (range(2, 3), range(0, 1)), (range(3, 4), range(0, 1)),
        (range(4, 6), range(1, 2)), (range(6, 8), range(1, 2)),
    ]


@pytest.mark.parametrize("world_size", [0, 7])
def test_impossible_world_sizes_name_those_that_work(world_size):
    with pytest.raises(ValueError, match=rf"size {world_size} is not possible .* 6 query heads; sizes that work: 1 to 6"):
        split_heads(6, 3, world_size)


def test_heads_that_are_no_groups_are_refused():
    with pytest.raises(ValueError, match="6 query heads are not a multiple of 4 KV heads"):
        split_heads(6, 4, 2)


def test_partition_of_vocabulary():
    sizes = {"q_heads": 4, "kv_heads": 2, "ffn": 2, "vocab": 131}
    sharded = [Partition.of(rank, 3, **sizes) for rank in range(3)]
    assert [len(part.vocab) for part in sharded] == [44, 44, 43]
    assert [len(part.ffn) for part in sharded] == [1, 1, 0]                                # a rank without columns is legal
    master = [Partition.of(rank, 3, **sizes, vocabulary="master") for rank in range(3)]
    assert [len(part.vocab) for part in master] == [131, 0, 0]
    assert [part.q_heads for part in master] == [part.q_heads for part in sharded]


def test_partition_refuses_nonsense():
    sizes = {"q_heads": 4, "kv_heads": 2, "ffn": 8, "vocab": 16}
    with pytest.raises(ValueError, match="vocabulary is 'worker', expected one of sharded, master"):
        Partition.of(0, 1, **sizes, vocabulary="worker")
    with pytest.raises(ValueError, match="rank is 2, expected 0 to 1"):
        Partition.of(2, 2, **sizes)


def test_features_of_heads():
    assert features(range(3, 5), 16) == range(48, 80)
