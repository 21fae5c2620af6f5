"""The paged cache: every token has its own place, steps say where, nothing leaks, and a refusal leaves things as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_attn.models.cache import CacheFull, PagedCache
from hetero_attn.models.config import ModelError


def make_cache(num_blocks=8, block_size=4, max_sequences=3, context_length=1000, kv_heads=2):
    return PagedCache(layers=2, num_blocks=num_blocks, block_size=block_size, kv_heads=kv_heads, head_dim=8, dtype=torch.float32,
                      max_sequences=max_sequences, context_length=context_length)


def test_step_of_a_mixed_batch():
    cache = make_cache()
    first, second = cache.add_sequence(), cache.add_sequence()
    cache.step([first], [5], list(range(5)))
    step = cache.step([second, first], [3, 1], [10, 11, 12, 5])
    assert step.tokens.tolist() == [10, 11, 12, 5] and step.tokens.dtype == torch.int64
    assert step.positions.tolist() == [0, 1, 2, 5]
    assert step.cu_seqlens_q.tolist() == [0, 3, 4] and step.cu_seqlens_q.dtype == torch.int32
    assert step.seqused_k.tolist() == [3, 6] and step.seqused_k.dtype == torch.int32
    assert step.block_table.tolist() == [[2, 0], [0, 1]] and step.block_table.dtype == torch.int32
    assert step.slots.tolist() == [8, 9, 10, 5]
    assert step.logits_at.tolist() == [2, 3]
    assert (step.max_seqlen_q, step.max_seqlen_k, step.total_q) == (3, 6, 4)
    assert (cache.length(first), cache.length(second)) == (6, 3)
    assert cache.step([first], [2], last_only=False).logits_at.tolist() == [0, 1]


def test_write_lands_where_the_table_says():
    cache = make_cache(block_size=3)
    sequence = cache.add_sequence()
    cache.step([sequence], [2])
    step = cache.step([sequence], [5])
    k, v = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    cache.write(1, k, v, step.slots)
    row = step.block_table[0].long()
    assert torch.equal(cache.k[1][row].flatten(0, 1)[2:7], k)
    assert torch.equal(cache.v[1][row].flatten(0, 1)[2:7], v)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_history_keeps_places_apart(data):
    """Against a shadow: the places of live tokens never move and never coincide, and two ranks' tables agree."""
    block_size = data.draw(st.integers(1, 5))
    caches = [make_cache(num_blocks=7, block_size=block_size, kv_heads=heads) for heads in (1, 3)]
    shadow: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "free", "step", "step"]))
        if action == "add":
            if len(shadow) < 3:
                new = [cache.add_sequence() for cache in caches]
                assert new[0] == new[1] and new[0] not in shadow
                shadow[new[0]] = []
            else:
                for cache in caches:
                    with pytest.raises(CacheFull, match="3 sequences of max_sequences=3"):
                        cache.add_sequence()
        elif action == "free" and shadow:
            sequence = data.draw(st.sampled_from(sorted(shadow)))
            del shadow[sequence]
            for cache in caches:
                cache.free(sequence)
        elif action == "step" and shadow:
            ids = data.draw(st.lists(st.sampled_from(sorted(shadow)), min_size=1, unique=True))
            counts = [data.draw(st.integers(1, 9)) for _ in ids]
            blocks = {i: -(-len(slots) // block_size) for i, slots in shadow.items()}
            grown = {i: -(-(len(shadow[i]) + count) // block_size) for i, count in zip(ids, counts)}
            if sum({**blocks, **grown}.values()) > 7:
                for cache in caches:
                    with pytest.raises(CacheFull, match=f"of {block_size} tokens"):
                        cache.step(ids, counts)
            else:
                steps = [cache.step(ids, counts) for cache in caches]
                assert torch.equal(steps[0].block_table, steps[1].block_table) and torch.equal(steps[0].slots, steps[1].slots)
                fresh = iter(steps[0].slots.tolist())
                for row, (i, count) in enumerate(zip(ids, counts)):
                    shadow[i] += [next(fresh) for _ in range(count)]
                    table = steps[0].block_table[row].tolist()
                    assert shadow[i] == [table[p // block_size] * block_size + p % block_size for p in range(len(shadow[i]))]
        live = [slot for slots in shadow.values() for slot in slots]
        assert len(set(live)) == len(live)
        for cache in caches:
            assert {i: cache.length(i) for i in cache.sequences} == {i: len(slots) for i, slots in shadow.items()}
            assert cache.free_blocks == 7 - sum(-(-len(slots) // block_size) for slots in shadow.values())


def test_full_cache_reserves_nothing():
    cache = make_cache(num_blocks=3, block_size=4)
    first, second = cache.add_sequence(), cache.add_sequence()
    cache.step([first], [6])
    with pytest.raises(CacheFull, match=r"9 more tokens for 2 sequences need 2 blocks of 4 tokens, 1 of 3 are free; .*max_tokens"):
        cache.step([first, second], [2, 7])
    assert (cache.length(first), cache.length(second), cache.free_blocks) == (6, 0, 1)
    assert cache.step([first, second], [2, 4]).seqused_k.tolist() == [8, 4]
    cache.free(first)
    assert cache.free_blocks == 2


@given(max_tokens=st.integers(1, 60), sequences=st.integers(1, 7), block_size=st.integers(1, 9), data=st.data())
def test_blocks_for_holds_any_spread(max_tokens, sequences, block_size, data):
    lengths, left = [], max_tokens
    for _ in range(sequences):
        lengths.append(data.draw(st.integers(0, left)))
        left -= lengths[-1]
    assert sum(-(-length // block_size) for length in lengths) <= PagedCache.blocks_for(max_tokens, sequences, block_size)


def test_context_length_is_a_clear_refusal():
    cache = make_cache(context_length=10)
    sequence = cache.add_sequence()
    with pytest.raises(ModelError, match="sequence of 11 tokens is longer than the model's context of 10 tokens"):
        cache.step([sequence], [11])
    cache.step([sequence], [10])
    with pytest.raises(ModelError, match="11 tokens"):
        cache.step([sequence], [1])
    assert cache.length(sequence) == 10


@pytest.mark.parametrize(
    "ids, counts, tokens, message",
    [
        ([0], [0], None, "counts must be at least 1"),
        ([0, 0], [1, 1], None, "each id once"),
        ([], [], None, "at least one"),
        ([0], [1, 2], None, "as many counts as ids"),
        ([5], [1], None, "sequence 5 is not in the cache"),
        ([0], [2], [1, 2, 3], r"tokens have shape \[3\], counts \[2\] ask for \[2\]"),
    ],
)
def test_senseless_steps_are_refused(ids, counts, tokens, message):
    cache = make_cache()
    cache.add_sequence()
    with pytest.raises(ValueError, match=message):
        cache.step(ids, counts, tokens)
    assert cache.length(0) == 0 and cache.free_blocks == 8


def test_freed_sequences_are_gone():
    cache = make_cache()
    sequence = cache.add_sequence()
    cache.free(sequence)
    for use in (lambda: cache.free(sequence), lambda: cache.length(sequence), lambda: cache.step([sequence], [1])):
        with pytest.raises(ValueError, match=f"sequence {sequence} is not in the cache"):
            use()
    assert cache.add_sequence() != sequence


def test_sizes():
    assert make_cache().nbytes == 2 * 2 * 8 * 4 * 2 * 8 * 4
    with pytest.raises(ValueError, match="block_size is 0"):
        make_cache(block_size=0)
