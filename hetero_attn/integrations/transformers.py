"""attn_implementation="hetero_attn" for every Hugging Face model that sends its attention through transformers' AttentionInterface.

transformers asks twice: a mask interface before the first layer (transformers_masks.py), an attention function in every layer (here).
register() serves both, because a name without a mask interface gets no mask at all, and padded batches then go wrong in silence. A mask
of None means what it means to transformers' own sdpa. No argument is dropped: what is neither understood here nor known to be harmless
raises a TypeError that names it. A model that uses neither interface (deberta, wavlm) runs its own attention, as with any name.
"""

from __future__ import annotations

import torch

from hetero_attn.integrations.transformers_masks import NAME, causal_unless_said, make_mask
from hetero_attn.ops import attention, attention_varlen

# Keyword arguments that models hand down to every attention call and that cannot change its result.
HARMLESS = frozenset({
    "position_ids",             # rotary embeddings are applied by now; packed sequences have become a mask, or cu_seq_lens
    "cache_position",           # the same, up to transformers 4
    "past_key_values", "past_key_value", "use_cache",       # the cache has been updated: key and value are whole
    "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",    # choose what the model returns
    "num_items_in_batch",       # scales the loss
    "seq_idx",                  # packed sequences for state-space layers; attention layers get cu_seq_lens or a mask
    "deterministic",            # asks flash-attn for a reproducible backward
})


def register() -> str:
    """Register the attention function and its masks with transformers; returns the name, "hetero_attn". Safe to call again.

    Afterwards attn_implementation="hetero_attn" works in from_pretrained, from_config and model.set_attn_implementation, and
    hetero_attn.use_backend and the profile choose the backend of every call.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    return NAME


def unregister() -> None:
    """Undo register(). Models that were built with the name can then no longer run."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,                                # [B, Hq, Sq, D]
    key: torch.Tensor,                                  # [B, Hkv, Skv, D]
    value: torch.Tensor,                                # [B, Hkv, Skv, Dv]
    attention_mask: torch.Tensor | None,                # [B, 1 | Hq, Sq, Skv], bool (True = attend) or float
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,                  # attention sinks [Hq]
    position_bias: torch.Tensor | None = None,          # [B | 1, Hq, Sq, Skv] float
    cu_seq_lens_q: torch.Tensor | None = None,          # [N + 1]: the sequences packed along the batch's B * Sq tokens
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: out [B, Sq, Hq, Dv] contiguous, and None for the weights, which no backend keeps.

    A mask says everything: causality and window are in it. Without one, causality is the keyword, else the module's; one query
    sees every key; and fewer queries than keys are the prefill of an empty static cache, whose unused end is cut off.
    Raises ValueError for dropout and output_attentions, TypeError for a keyword that would change the result and is not served.
    """
    _refuse(dropout, kwargs)
    if is_causal is None:
        is_causal = module.is_causal if hasattr(module, "is_causal") else causal_unless_said(type(module).__module__)
    query, key, value = _alike(query, key, value)
    q_len, kv_len = query.shape[2], key.shape[2]
    window_size = (-1, -1)
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux}

    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        cu_seq_lens_q, cu_seq_lens_k = _both(cu_seq_lens_q, cu_seq_lens_k)
        if attention_mask is None and position_bias is None:
            options |= {"is_causal": is_causal, "window_size": _window(sliding_window, is_causal)}
            return _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options), None
        if attention_mask is None:
            raise ValueError(f"{NAME}: position_bias with cu_seq_lens_q needs a mask; give the packed batch position_ids or a 4-D mask")
        attention_mask = _within_sequences(attention_mask, query, key, cu_seq_lens_q, cu_seq_lens_k)

    if attention_mask is not None:
        is_causal = False
    else:
        is_causal = is_causal and q_len > 1
        if is_causal and kv_len > q_len:                # top-left: what lies behind is the empty rest of a static cache
            key, value, kv_len = key[:, :, :q_len], value[:, :, :q_len], q_len
            position_bias = None if position_bias is None else position_bias[..., :q_len]
        if sliding_window is not None and max(q_len, kv_len) > sliding_window:
            window_size = _window(sliding_window, is_causal)
        if q_len > kv_len and (is_causal or window_size != (-1, -1)):       # top-left again, where ours is bottom-right
            attention_mask = _top_left(q_len, kv_len, is_causal, window_size, query.device)
            is_causal, window_size = False, (-1, -1)
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask)

    out = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        attn_mask=attention_mask, is_causal=is_causal, window_size=window_size, layout="bshd", **options,
    )
    return out.contiguous(), None                       # [B, Sq, Hq, Dv]


def _refuse(dropout: float, kwargs: dict) -> None:
    if dropout:
        raise ValueError(f"{NAME} has no dropout, got dropout={dropout:g}: call model.eval() or set the config's attention dropout to 0")
    if kwargs.pop("output_attentions", None):
        raise ValueError(f"output_attentions=True: {NAME} keeps no attention weights; use attn_implementation='eager' to see them")
    unserved = sorted(name for name, given in kwargs.items() if given is not None and name not in HARMLESS)
    if unserved:
        raise TypeError(
            f"{NAME} does not serve the attention argument{'s' * (len(unserved) > 1)} {', '.join(unserved)}, and leaving it out could "
            f"change the result; use another attn_implementation for this model"
        )


def _alike(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What torch's SDPA does to its inputs and models rely on: one batch size (learned queries come with 1), one dtype under autocast."""
    batch, device = max(x.shape[0] for x in tensors), tensors[0].device.type
    if torch.is_autocast_enabled(device):
        tensors = [x.to(torch.get_autocast_dtype(device)) for x in tensors]
    return [x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in tensors]


def _window(sliding_window: int | None, is_causal: bool) -> tuple[int, int]:
    """transformers counts the token itself: W of 4 sees 3 tokens back. Encoders look as far ahead, as with its flash attention."""
    if sliding_window is None:
        return (-1, -1)
    return (sliding_window - 1, 0 if is_causal else sliding_window - 1)


def _top_left(q_len: int, kv_len: int, is_causal: bool, window_size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Bool [1, 1, Sq, Skv] where query i stands at key i: more queries than keys, which no cache makes, so a mask is good enough."""
    ahead = torch.arange(kv_len, device=device) - torch.arange(q_len, device=device)[:, None]      # [Sq, Skv]: j - i
    left, right = window_size
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if is_causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= (ahead >= -left) & (ahead <= right)
    return seen[None, None]


def _biased(position_bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """position_bias and mask as one float mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, -torch.inf)
    return position_bias + mask


def _both(cu_q: torch.Tensor | None, cu_k: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_q is None:
        raise ValueError("cu_seq_lens_k was given without cu_seq_lens_q: the queries' sequence boundaries are unknown")
    cu_k = cu_q if cu_k is None else cu_k
    return cu_q.to(torch.int32), cu_k.to(torch.int32)


def _packed(query, key, value, cu_q, cu_k, max_q, max_k, options: dict) -> torch.Tensor:
    """Sequences packed without padding, as flash attention takes them: the batch's tokens are one long row [B * Sq, H, D]."""
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    max_q = int(cu_q.diff().max()) if max_q is None else int(max_q)
    max_k = int(cu_k.diff().max()) if max_k is None else int(max_k)
    out = attention_varlen(*rows, cu_q, cu_k, max_q, max_k, **options)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]).contiguous()


def _within_sequences(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
    """The mask, with pairs of tokens from different packed sequences taken out."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q with a mask needs the sequences packed into one row, got a batch of {query.shape[0]}")
    of_q = torch.bucketize(torch.arange(query.shape[2], device=mask.device), cu_q[1:], right=True)
    of_k = torch.bucketize(torch.arange(key.shape[2], device=mask.device), cu_k[1:], right=True)
    same = of_q[:, None] == of_k                        # [Sq, Skv]
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)
