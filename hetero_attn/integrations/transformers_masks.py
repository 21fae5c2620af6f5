"""The masks that transformers builds for hetero_attn, and which models can be trusted with what.

A mask of None is the fast one, so masks are left out where causality says the same (as for transformers' own sdpa) and, for the model
types listed, where the window does. transformers checks none of this for a registered name: it builds every model with it. So the model's
source is read once: one that does its own attention is refused, one that was not made for sdpa gets the masks that eager gets.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys

import torch

try:
    from transformers.masking_utils import eager_mask, sdpa_mask
except ImportError as error:
    raise ImportError(f"the Hugging Face adapter needs transformers >= 4.56 ({error}); pip install 'hetero-attn[hf]'") from error

NAME = "hetero_attn"

# Model types whose attention layers pass `sliding_window` to the interface (not all do: qwen2_moe and phimoe don't). For them a mask
# that says only "causal, within the window" is left out, and the kernel bounds its own loops instead of reading Sq x Skv booleans.
WINDOW_BY_KEYWORD = frozenset({"gemma2", "gemma3_text", "gpt_oss", "mistral", "mixtral", "phi3", "qwen2", "qwen3"})


def make_mask(*args, **kwargs) -> torch.Tensor | None:
    """transformers' mask interface: bool [B, 1, Sq, Skv], True = attend, or None where causality and the window say it all.

    Models that were not made for sdpa get eager's float mask (0 or finfo.min), always. All arguments are transformers' own.
    Raises ValueError for a model that asks for masks here but computes its attention itself.
    """
    config = kwargs["config"]
    own_attention, spell_out = _judge(type(config))
    if own_attention is not None:
        raise ValueError(
            f"model type {config.model_type!r} computes its attention itself ({own_attention} never calls transformers' "
            f"AttentionInterface), so {NAME} cannot serve it; use attn_implementation='eager' or 'sdpa'"
        )
    if config.model_type in WINDOW_BY_KEYWORD:
        if not torch.compiler.is_compiling() and _window_says_it_all(**kwargs):
            return None
    elif spell_out:
        return eager_mask(*args, **kwargs | {"allow_is_bidirectional_skip": False})
    return sdpa_mask(*args, **kwargs)


def _window_says_it_all(
    config, q_length: int | None = None, kv_length: int = 0, q_offset=0, kv_offset: int = 0, attention_mask: torch.Tensor | None = None,
    local_size: int | None = None, allow_is_causal_skip: bool = True, **_,
) -> bool:
    """Whether a mask would only repeat what attention_forward does by itself with the layer's `sliding_window`."""
    if local_size is None or not allow_is_causal_skip or q_length is None:
        return False
    if local_size != getattr(config, "sliding_window", None):
        return False
    if q_length != 1 and q_length != kv_length:         # attention_forward takes fewer queries than keys for an empty static cache
        return False
    if int(q_offset) + q_length != kv_offset + kv_length:               # a static cache with room behind the last query
        return False
    if attention_mask is None:
        return True
    seen = attention_mask[:, kv_offset:kv_offset + kv_length]           # [B, Skv]; shorter than that: transformers pads it with False
    return seen.shape[-1] == kv_length and bool(seen.all())


_judged: dict[type, tuple[str | None, bool]] = {}


@torch.compiler.assume_constant_result                  # torch.compile must not trace into this
def _judge(config_class: type) -> tuple[str | None, bool]:
    """What the modeling code of this config allows: (the module that computes its attention itself, whether masks must be spelled out).

    transformers lets every model be built with any registered name and has no list of what is safe, so we read the source, as it does
    for a similar check. A model that asks for masks and never calls the interface (bloom, mpt) would add our booleans to its scores. One
    that was not made for sdpa need not say the truth in is_causal (nllb-moe's decoder says False, markuplm nothing), and may compute some
    of its attention itself (bigbird_pegasus): it knows eager's masks, so it gets those, and so does code that cannot be read.
    """
    if config_class not in _judged:
        package, name = config_class.__module__.rpartition(".")[0], config_class.__name__
        loaded = [module for module in list(sys.modules) if package and module.startswith(f"{package}.modeling_")]
        modules = [module for module in loaded if name in _source(module)]
        if not modules:                                 # not loaded yet, perhaps: no verdict to keep
            return None, True
        own = [module for module in modules if re.search(r"create_\w*mask\(", _source(module)) and not _goes_through(module)]
        _judged[config_class] = (own[0] if own else None, not all(_made_for_sdpa(module) for module in modules))
    return _judged[config_class]


@functools.cache
def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError):
        return ""


def _goes_through(module: str) -> bool:
    return re.search(r"ALL_ATTENTION_FUNCTIONS|AttentionInterface|_supports_attention_backend = True", _source(module)) is not None


def _made_for_sdpa(module: str) -> bool:
    return "_supports_sdpa = True" in _source(module) and "is_causal" in _source(module)


@torch.compiler.assume_constant_result
def causal_unless_said(module: str) -> bool:
    """What a layer without `is_causal` means: causal to sdpa, but not in a model that was not made for sdpa (markuplm, clap)."""
    return _made_for_sdpa(module) or "PreTrainedModel)" not in _source(module)
