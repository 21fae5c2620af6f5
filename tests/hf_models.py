"""Tiny random transformers models, one of each kind of attention that the adapter has to get right.

Weights are wide (std 0.2 instead of 0.02), so that attention decides the logits and a wrong mask cannot hide. Windows and chunks are
shorter than the prompts.
"""

from __future__ import annotations

import torch
import transformers

TOLERANCE = 2e-5                # fp32, of the largest logit: rounding measures 6e-7 (t5: 6e-6), a wrong mask 2e-3 and more
VOCAB = 97
LENGTH = 12
SLIDING_TYPES = ["sliding_attention", "full_attention"]
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0}
DECODER = COMMON | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "bos_token_id": 1, "eos_token_id": None,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT = {"vocab_size": VOCAB, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

DECODERS = {                    # model type -> what makes it this family; the window is 5 wherever there is one
    "llama": DECODER,
    "mistral": DECODER | {"sliding_window": 5},
    "mixtral": DECODER | MOE | {"sliding_window": 5},
    "qwen2": DECODER | {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING_TYPES},
    "qwen3": DECODER | {"use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING_TYPES},
    "qwen2_moe": DECODER | {                            # windowed, but never tells the attention: the mask must
        "use_sliding_window": True, "sliding_window": 5, "layer_types": SLIDING_TYPES, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "gemma2": DECODER | {
        "sliding_window": 5, "layer_types": SLIDING_TYPES, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": DECODER | {"sliding_window": 5, "layer_types": SLIDING_TYPES, "query_pre_attn_scalar": 8},
    "phi3": DECODER | {"sliding_window": 5},
    "gpt_oss": DECODER | MOE | {"sliding_window": 5, "layer_types": SLIDING_TYPES},
    "deepseek_v3": DECODER | {                          # values narrower than keys
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1},
    "llama4_text": DECODER | {                          # chunked attention
        "attention_chunk_size": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "gpt2": GPT | {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": GPT | {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.2,
        "max_position_embeddings": 64},
}
ENCODER = COMMON | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": COMMON | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "modernbert": ENCODER | {                           # a window to both sides
        "local_attention": 4, "global_attn_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
        "sep_token_id": 2},
    "splinter": ENCODER,                                # not made for sdpa: its layers don't say that they are not causal
}
BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "init_std": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}
SEQ2SEQ = {
    "bart": BART | {"forced_eos_token_id": None},
    "nllb-moe": BART | {"num_experts": 2},              # not made for sdpa: its decoder's layers say that they are not causal
    "bigbird_pegasus": BART | {"attention_type": "original_full"},      # the encoder computes its attention itself
    "t5": {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 2.0,
        "tie_word_embeddings": False, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": 0,
        "eos_token_id": 2, "decoder_start_token_id": 0},
}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 4,
       "initializer_range": 0.2}


def config_of(model_type: str, **changes) -> transformers.PretrainedConfig:
    known = DECODERS | ENCODERS | SEQ2SEQ | {"vit": VIT}
    return transformers.AutoConfig.for_model(model_type, **(known[model_type] | changes))


def make_model(model_type: str, attn_implementation: str = "eager", **changes) -> transformers.PreTrainedModel:
    """The model type's tiny model in evaluation mode, fp32, the same weights at every call."""
    kinds = [(DECODERS, transformers.AutoModelForCausalLM), (SEQ2SEQ, transformers.AutoModelForSeq2SeqLM)]
    auto_class = next((auto for kind, auto in kinds if model_type in kind), transformers.AutoModel)
    torch.manual_seed(0)
    model = auto_class.from_config(config_of(model_type, **changes), attn_implementation=attn_implementation).eval()
    if model.can_generate():
        model.generation_config.eos_token_id = None     # every sequence runs to max_new_tokens
    return model


def make_batch(padding: str) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [3, LENGTH]: whole, or three lengths padded on the "left" or "right"."""
    ids = torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 7)):
        if pads and padding != "none":
            mask[row, slice(None, pads) if padding == "left" else slice(-pads, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
