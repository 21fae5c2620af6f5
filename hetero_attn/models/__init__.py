"""The tensor-parallel decoder: config, weights, cache, layers, and (beside them) tokenizer, sampling and generation.

`load_model` is the one name most callers want. It is imported on first use, so that `hetero_attn.models.config` or `.tokenizer` can be
read without building a decoder.
"""


def __getattr__(name: str):
    if name == "load_model":
        from hetero_attn.models.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
