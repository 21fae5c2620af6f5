"""CPU references of torch_npu's fused operators, registered under the wheel's real schemas: what its documentation says, checked strictly.

Written from the operators' docstrings in torch-npu 2.13.0, and from nothing of this project: polarity, sparse modes, packed lengths, pages,
layouts, limits. Where the documents leave something open the reference takes the worst reading: a row without keys averages over masked
ones, a masked NaN spreads, the softmax's statistics of packed calls lie heads first unless asked otherwise. Every call is compared with the
wheel's own meta kernel in shape and dtype.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch

ALL = 2147483647
HALF = (torch.float16, torch.bfloat16)
calls: Counter = Counter()                  # (operator, layout, sparse_mode, paged, lse) -> how often
bounds = {"S at one query": 262144, "S": 20971520, "pool": 2147483647, "S of fusion": 1 << 20, "T": 1 << 20, "sequences": 1024}


class Refused(RuntimeError):
    """A call that the operator's documentation forbids."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise Refused(text)


def _lengths(given, count: int, default: int) -> list[int]:
    if given is None:
        return [default] * count
    values = [int(x) for x in given]
    require(len(values) >= count or len(values) == 1, f"{len(values)} lengths for a batch of {count}")
    return values * count if len(values) == 1 else values[:count]


def _cumulative(given, tokens: int, name: str) -> list[tuple[int, int]]:
    require(given is not None, f"{name} must be given under TND")
    ends = [int(x) for x in given]
    require(ends == sorted(ends) and (not ends or ends[0] >= 0), f"{name} is {ends}: each must be at least the one before")
    require(bool(ends) and ends[-1] == tokens, f"{name} ends at {ends[-1:]}, tokens are {tokens}")
    return list(zip([0, *ends[:-1]], ends))


def _compressed(mask: torch.Tensor | None) -> None:
    require(mask is not None and list(mask.shape[-2:]) == [2048, 2048], "sparse_mode 2 to 4 want the 2048 x 2048 mask")
    require(torch.equal(mask.reshape(2048, 2048).bool(), torch.ones(2048, 2048, dtype=torch.bool).triu(1)), "the mask is not triangular")


def _masked(mode: int, mask: torch.Tensor | None, before: int, after: int, q_len: int, kv_len: int) -> torch.Tensor:
    """bool, broadcastable to [B, N, q_len, kv_len]: True = takes no part."""
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    if mode == 0:
        if mask is None:
            return torch.zeros(q_len, kv_len, dtype=torch.bool)
        return mask.bool() | (j - i > after) | (i - j > before)                    # the band counts from the top-left here
    if mode == 1:
        require(mask is not None, "sparse_mode 1 wants the whole mask")
        return mask.bool()
    _compressed(mask)
    shift = kv_len - q_len
    if mode == 2:
        return j > i
    if mode == 3:
        return j > i + shift
    require(mode == 4, f"sparse_mode is {mode}")
    require(before + after >= 0, "pre_tokens and next_tokens do not meet")
    return (j - i - shift > after) | (i + shift - j > before)


def _softmax(q, k, v, scale: float, masked: torch.Tensor, correct_empty: bool, forbid_empty: bool):
    """q [N, Sq, D], k, v [Nkv, Skv, ·] -> out [N, Sq, Dv] in q's dtype, maximum and sum [N, Sq]."""
    group = q.shape[0] // k.shape[0]
    scores = (q.float() @ k.float().repeat_interleave(group, 0).mT) * scale
    masked = masked.expand(scores.shape)
    empty = masked.all(-1)
    require(not (forbid_empty and bool(empty.any())), "a row of a packed call has no key: its mask may not be all ones")
    scores = torch.where(masked, torch.tensor(float("-inf")), scores)
    scores = torch.where(empty[..., None], torch.zeros(()), scores)                # what a large negative number for all of them amounts to
    top = scores.amax(-1) if scores.shape[-1] else torch.zeros(scores.shape[:-1])
    weights = (scores - top[..., None]).exp()
    total = weights.sum(-1)
    out = (weights @ v.float().repeat_interleave(group, 0)) / total[..., None]     # 0 * NaN is NaN here, as it may be there
    if correct_empty:
        out = out.masked_fill(empty[..., None], 0.0)
    top = torch.where(empty, torch.tensor(float("nan")), top)                      # undocumented: nobody may read it
    return out.to(q.dtype), top, total


def infer_reference(
    query, key, value, *, pse_shift=None, atten_mask=None, actual_seq_lengths=None, actual_seq_lengths_kv=None, block_table=None,
    num_heads=1, scale=1.0, pre_tokens=ALL, next_tokens=ALL, input_layout="BSH", num_key_value_heads=0, sparse_mode=0, inner_precise=0,
    block_size=0, softmax_lse_flag=False, **further,
):
    """npu_fused_infer_attention_score for what this project calls it with; anything else is refused."""
    unset = {name: value for name, value in further.items() if value not in (None, 0)}
    require(not unset and pse_shift is None, f"{sorted(unset)} are not in this reference")
    require(query.dtype in HALF and key.dtype == value.dtype == query.dtype, f"dtype {query.dtype}")
    require(all(x.is_contiguous() for x in (query, key, value)), "query, key and value must be contiguous")
    require(input_layout in ("BNSD", "BSND"), f"input_layout {input_layout}")
    require(key.shape == value.shape, f"key {list(key.shape)} and value {list(value.shape)} must have one shape")
    q = query if input_layout == "BNSD" else query.transpose(1, 2)
    B, N, Sq, D = q.shape
    Nkv = num_key_value_heads or num_heads
    require(N == num_heads and N % Nkv == 0 and N // Nkv <= 64 and N <= 256, f"num_heads {num_heads} for {N}, key/value {Nkv}")
    require(D % 16 == 0 and D <= 512 and B <= 65536, f"D {D}, B {B}")
    require(input_layout == "BNSD" or Sq == 1 or N * D < 65535, "N * D under BSND")
    if block_table is not None:
        require(key.dim() == 3 and key.shape[1] == block_size and key.shape[2] == Nkv * D, f"pages {list(key.shape)}")
        require(key.shape[2] <= 65535, "KV_N * D of pages")
        step = 16 if Sq == 1 else 128
        require(0 < block_size <= 512 and block_size % step == 0, f"block_size {block_size} at Sq {Sq}")
        require(block_table.dtype == torch.int32 and block_table.dim() == 2 and block_table.shape[0] == B, "block_table")
        require(actual_seq_lengths_kv is not None, "actual_seq_lengths_kv must be given with pages")
    else:
        kv = (key, value) if input_layout == "BNSD" else (key.transpose(1, 2), value.transpose(1, 2))
        require(kv[0].shape[:2] == (B, Nkv) and kv[0].shape[3] == D, f"key {list(key.shape)}")
    span = block_table.shape[1] * block_size if block_table is not None else kv[0].shape[2]
    kv_lens = _lengths(actual_seq_lengths_kv, B, span)
    longest = max([Sq, *kv_lens] if block_table is not None else [Sq, span])
    require(longest <= bounds["S at one query" if Sq == 1 else "S"], f"S {longest} at Sq {Sq}")
    if block_table is not None:
        require(max(key.numel(), value.numel()) <= bounds["pool"], f"pages of {key.numel()} numbers")
        wanted = sum(-(-length // block_size) for length in kv_lens)
        require(key.shape[0] >= wanted, f"blocknum {key.shape[0]} for {wanted} blocks of all sequences")
    q_lens = _lengths(actual_seq_lengths, B, Sq) if Sq > 1 else [1] * B
    require(max(kv_lens) <= span, f"lengths {kv_lens} beyond {span}")
    if Sq == 1:                                     # the decode path: sparse modes and tokens have no effect
        require(inner_precise in (0, 1), f"inner_precise {inner_precise} at Sq 1")
        require(sparse_mode in (0, 1), f"sparse_mode {sparse_mode} at Sq 1 does nothing: do not rely on it")
        pre_tokens = next_tokens = ALL
    if atten_mask is not None and sparse_mode in (0, 1):
        require(atten_mask.dtype in (torch.bool, torch.int8, torch.uint8) and atten_mask.is_contiguous(), "atten_mask dtype or strides")
        require(list(atten_mask.shape) in ([B, 1, Sq, span], [1, 1, Sq, span]), f"atten_mask {list(atten_mask.shape)}")
    out = torch.zeros(B, N, Sq, D, dtype=query.dtype)
    lse = torch.full((B, N, Sq, 1), float("nan"))
    for b in range(B):
        n, m = q_lens[b], kv_lens[b]
        if block_table is not None:
            blocks = block_table[b, : -(-m // block_size)].long()
            require(bool(((blocks >= 0) & (blocks < key.shape[0])).all()), f"block_table row {b} holds {blocks.tolist()}")
            k, v = (pages[blocks].reshape(-1, Nkv, D)[:m].transpose(0, 1) for pages in (key, value))
        else:
            k, v = kv[0][b, :, :m], kv[1][b, :, :m]
        own = atten_mask if atten_mask is None or sparse_mode > 1 else atten_mask[b % atten_mask.shape[0], :, :n, :m]
        masked = _masked(sparse_mode, own, pre_tokens, next_tokens, n, m)
        o, top, total = _softmax(q[b, :, :n], k, v, scale, masked, bool(inner_precise & 2), False)
        out[b, :, :n] = o
        lse[b, :, :n, 0] = top + total.log()
    calls["infer", input_layout, sparse_mode, block_table is not None, softmax_lse_flag] += 1
    out = out if input_layout == "BNSD" else out.transpose(1, 2).contiguous()
    return out, lse if softmax_lse_flag else torch.zeros(0)


def fusion_reference(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0, pre_tockens=ALL,
    next_tockens=ALL, inner_precise=0, prefix=None, actual_seq_qlen=None, actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True,
    sync=False, softmax_layout="", sink=None, dropout_mask=None, seed=0, offset=0,
):
    """npu_fusion_attention for what this project calls it with."""
    require(pse is None and padding_mask is None and prefix is None and sink is None and dropout_mask is None and keep_prob == 1.0,
            "pse, padding_mask, prefix, sink and dropout are not in this reference")
    require(query.dtype in (*HALF, torch.float32) and key.dtype == value.dtype == query.dtype, f"dtype {query.dtype}")
    require(input_layout in ("BNSD", "BSND", "TND"), f"input_layout {input_layout}")
    require(inner_precise in (0, 2), f"inner_precise {inner_precise}")
    D, Dk, Dv = query.shape[-1], key.shape[-1], value.shape[-1]
    require(D == Dk >= Dv and 1 <= Dv and D <= 768, f"D {D}, {Dk}, {Dv}")
    require(key.shape[:-1] == value.shape[:-1], "key and value differ")
    if sparse_mode in (0, 1) and atten_mask is not None:
        require(atten_mask.dtype in (torch.bool, torch.uint8), f"atten_mask {atten_mask.dtype}")
    packed = input_layout == "TND"
    if packed:
        require(sparse_mode != 1 and (atten_mask is None or atten_mask.dim() == 2), "masks of packed calls are S x S")
        N, Nkv = query.shape[1], key.shape[1]
        q_pieces = _cumulative(actual_seq_qlen, query.shape[0], "actual_seq_qlen")
        kv_pieces = _cumulative(actual_seq_kvlen, key.shape[0], "actual_seq_kvlen")
        require(len(q_pieces) == len(kv_pieces) <= bounds["sequences"], "sequences of q and kv, or too many of them")
        require(max(query.shape[0], key.shape[0]) <= bounds["T"], f"T {query.shape[0]}, {key.shape[0]}")
        problems = [(query[a:b].transpose(0, 1), key[c:d].transpose(0, 1), value[c:d].transpose(0, 1), None)
                    for (a, b), (c, d) in zip(q_pieces, kv_pieces)]
        require(all(k.shape[1] for _, k, _, _ in problems), "a sequence without keys")
    else:
        require(actual_seq_qlen is None and softmax_layout == "", "lengths and softmax_layout belong to TND")
        q, k, v = (x if input_layout == "BNSD" else x.transpose(1, 2) for x in (query, key, value))
        B, N, Sq, _ = q.shape
        Nkv, Skv = k.shape[1], k.shape[2]
        if atten_mask is not None and sparse_mode in (0, 1):
            require(list(atten_mask.shape) in ([B, N, Sq, Skv], [B, 1, Sq, Skv], [1, 1, Sq, Skv], [Sq, Skv]), f"{list(atten_mask.shape)}")
            atten_mask = atten_mask.reshape(-1, *atten_mask.shape[-3:]) if atten_mask.dim() > 2 else atten_mask[None, None]
        problems = [(q[b], k[b], v[b], None if atten_mask is None else atten_mask[b % len(atten_mask)] if sparse_mode < 2 else atten_mask)
                    for b in range(B)]
    require(N == head_num and N % Nkv == 0 and N <= 256, f"head_num {head_num} for {N}, key/value {Nkv}")
    longest = max((x.shape[1] for problem in problems for x in problem[:2]), default=0)
    require(longest <= bounds["S of fusion"], f"S {longest}")
    results = []
    for q, k, v, mask in problems:
        mask = atten_mask if packed else mask
        n, m = q.shape[1], k.shape[1]
        # "without atten_mask neither sparse_mode nor the tokens have an effect"
        masked = torch.zeros(n, m, dtype=torch.bool) if mask is None else _masked(sparse_mode, mask, pre_tockens, next_tockens, n, m)
        correct = inner_precise == 2 or (sparse_mode == 3 and n > m)
        results.append(_softmax(q, k, v, scale, masked, correct, packed))
    calls["fusion", input_layout, sparse_mode, False, True] += 1
    if packed:
        out = torch.cat([o for o, _, _ in results], dim=1).transpose(0, 1).contiguous()             # [T, N, Dv]
        stats = [torch.cat([each[i] for each in results], dim=1) for i in (1, 2)]                   # [N, T]
        T = query.shape[0]
        stats = [x.T.contiguous() if softmax_layout == "TND" else x.reshape(T, N) for x in stats]
    else:
        out = torch.stack([o for o, _, _ in results])
        out = out if input_layout == "BNSD" else out.transpose(1, 2).contiguous()
        stats = [torch.stack([each[i] for each in results]) for i in (1, 2)]                        # [B, N, Sq]
    top, total = (x[..., None].expand(*x.shape, 8).contiguous() for x in stats)
    return out, top, total, query.new_empty(0), 0, 0, 0


def matmul_all_reduce_reference(x1, x2, hcom, *, reduce_op="sum", bias=None, comm_turn=0, **further):
    """npu_mm_all_reduce_base over the gloo group that `groups` holds under the name."""
    unset = {name: value for name, value in further.items() if value not in (None, 0)}
    require(not unset and reduce_op == "sum" and comm_turn == 0, f"{sorted(unset)}, {reduce_op}")
    require(x1.dtype in HALF and x2.dtype == x1.dtype and (bias is None or bias.dtype == x1.dtype), f"dtypes {x1.dtype}, {x2.dtype}")
    require(x1.dim() in (2, 3) and x2.dim() == 2 and x1.shape[-1] == x2.shape[0], f"{list(x1.shape)} @ {list(x2.shape)}")
    require(x1.is_contiguous(), "x1 may not be transposed")
    require(x1.numel() > 0 and x2.numel() > 0, "empty tensors")
    require(bias is None or list(bias.shape) == [x2.shape[1]], "bias")
    require(hcom in groups, f"no communicator is called {hcom!r}")
    require(groups[hcom].size() in (1, 2, 4, 8), f"{groups[hcom].size()} ranks")
    total = x1.float() @ x2.float()
    torch.distributed.all_reduce(total, group=groups[hcom])
    calls["matmul_all_reduce", bias is not None] += 1
    return (total if bias is None else total + bias.float()).to(x1.dtype)


groups: dict = {}                           # name of a communicator -> torch.distributed's group


def agreeing_with_meta(name: str, reference):
    """The reference, whose results are compared with the wheel's meta kernel of the same call."""

    def call(*args, **kwargs):
        result = reference(*args, **kwargs)
        to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x
        expected = getattr(torch.ops.npu, name)(*map(to_meta, args), **{key: to_meta(value) for key, value in kwargs.items()})
        if not isinstance(expected, torch.Tensor | list | tuple):
            raise TypeError(f"meta kernel of {name} gave {expected!r}")
        pairs = zip([result], [expected]) if isinstance(result, torch.Tensor) else zip(result, expected)
        for index, (got, want) in enumerate(pairs):
            if isinstance(want, torch.Tensor):
                agrees = (got.shape, got.dtype) == (want.shape, want.dtype)
                assert agrees, f"{name}, result {index}: {got.shape} {got.dtype}, meta says {want}"
        return result

    return call


_library = None


def register() -> None:
    """Under the real schemas, for CPU tensors; once a process."""
    global _library
    if _library is None:
        _library = torch.library.Library("npu", "IMPL")
        for name, reference in (("npu_fused_infer_attention_score", infer_reference), ("npu_fusion_attention", fusion_reference),
                                ("npu_mm_all_reduce_base", matmul_all_reduce_reference)):
            _library.impl(name, agreeing_with_meta(name, reference), "CPU")


def altered(npu, operator: str, change) -> SimpleNamespace:
    """torch_npu with one operator called through change(args, kwargs) -> (args, kwargs): a seeded fault."""
    operators = {name: getattr(npu, name) for name in ("npu_fused_infer_attention_score", "npu_fusion_attention", "npu_mm_all_reduce_base")}

    def faulty(*args, **kwargs):
        args, kwargs = change(args, kwargs)
        return getattr(npu, operator)(*args, **kwargs)

    return SimpleNamespace(**(operators | {operator: faulty}))
