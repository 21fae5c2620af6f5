"""hetero_attn in thirty lines: one call, why it ran where it ran, packed sequences, and a model on this machine."""

import torch

import hetero_attn

q = torch.randn(1, 32, 128, 64)                                     # [B, Hq, S, D]
k, v = torch.randn(1, 8, 128, 64), torch.randn(1, 8, 128, 64)       # [B, Hkv, S, D]: four query heads share a key head

out = hetero_attn.attention(q, k, v, is_causal=True, window_size=(63, 0))
print(out.shape)

# Which backend ran it, and what the others say; what a V100 would say of bfloat16.
print(hetero_attn.explain(q, k, v, is_causal=True, window_size=(63, 0)))
with hetero_attn.use_profile("v100"):
    print(hetero_attn.explain(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True))

# Two sequences of 3 and 5 tokens, packed: each its own causal problem.
starts = torch.tensor([0, 3, 8], dtype=torch.int32)
q, k, v = torch.randn(8, 32, 64), torch.randn(8, 8, 64), torch.randn(8, 8, 64)
out, lse = hetero_attn.attention_varlen(q, k, v, starts, starts, 5, 5, is_causal=True, return_lse=True)
print(out.shape, lse.shape)

# A decoder that uses nothing but the calls above.
model = hetero_attn.load_model("examples/tiny-llama")
for result in hetero_attn.generate(model, ["def add(a, b):"], hetero_attn.SamplingParams(max_new_tokens=24)):
    print(result.text)
