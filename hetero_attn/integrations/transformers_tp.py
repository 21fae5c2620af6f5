"""hetero_attn's communicator under transformers' own tensor parallelism, for any model that transformers can shard.

transformers shards the model and names a style for every module in its tp_plan. The styles whose output is summed over all ranks get a
twin that sums through our communicator; nothing else of theirs is touched. Their side has been rewritten twice in a year, so this file
leans on one method, transform_output_post_forward, and says so when it is missing. Inference only: collectives carry no gradient.
"""

from __future__ import annotations

import torch

from hetero_attn.communicator import Communicator

try:
    from transformers.integrations import tensor_parallel as hf
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel

    if not hasattr(RowwiseParallel, "transform_output_post_forward"):       # once called _prepare_output_fn, with other arguments
        raise ImportError("RowwiseParallel has no transform_output_post_forward")
    SUMMING = (RowwiseParallel, hf.AllReduceParallel, hf.MoeExpertsParallel)    # the styles whose output is a partial sum
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"our communicator needs the parallel styles of transformers >= 5.21 ({error}); pip install -U transformers, or load the model "
        f"with hetero_attn.load_model, which shards it itself"
    ) from error

PREFIX = "hetero_attn_"


def register_tensor_parallel(communicator: Communicator) -> dict[str, str]:
    """Register a twin "hetero_attn_<style>" of every style that sums over ranks; returns {transformers' name: ours}.

    The communicator must span the ranks of transformers' mesh (init_communicator() under torchrun does); each forward of a
    layer that is checked against it raises ValueError if it does not. Calling it again replaces the communicator. One process
    has one communicator, so models that were loaded before use the new one only after being loaded again.
    """
    ours = {}
    for name, style in list(ALL_PARALLEL_STYLES.items()):
        if type(style) in SUMMING and not name.startswith(PREFIX) and _sums(style):
            ALL_PARALLEL_STYLES.register(PREFIX + name, _twin(style, communicator))
            ours[name] = PREFIX + name
    return ours


def tp_plan_for(config, model_class=None) -> dict[str, str]:
    """The part of a model's tp_plan that sums over ranks, in our styles: {"model.layers.*.self_attn.o_proj": "hetero_attn_rowwise", ...}.

    Pass it to from_pretrained(distributed_config=DistributedConfig(tp_size=..., tp_plan=...)): transformers keeps its own rule for
    every module that is not named. model_class defaults to AutoModelForCausalLM; the names depend on it. Call
    register_tensor_parallel() before. Raises ValueError when transformers has no plan for the model.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):                          # names only: no weight is allocated
        model = model_class(config) if model_class is not None else AutoModelForCausalLM.from_config(config)
    plan = {name: PREFIX + style for name, style in model.tp_plan.items() if PREFIX + style in ALL_PARALLEL_STYLES}
    if not plan:
        raise ValueError(
            f"transformers' tensor-parallel plan for {type(model).__name__} sums nothing over ranks (plan: {model.tp_plan or 'none'}), so "
            f"there is nothing for a communicator to do; is register_tensor_parallel() still to be called?"
        )
    return plan


def _sums(style) -> bool:
    """A row-parallel style may also scatter its sum; only the one that gives every rank the whole sum is ours."""
    from torch.distributed.tensor import Replicate

    return isinstance(getattr(style, "output_layouts", Replicate()), Replicate)


def _twin(style, communicator: Communicator):
    """style, except that the sum over ranks goes through the communicator. A subclass of the style's own class."""

    class Summed(type(style)):
        def validate_param(self, module, param, mesh, parameter_name=None):
            super().validate_param(module, param, mesh, parameter_name=parameter_name)
            module._hetero_attn_site = (parameter_name or "").rpartition(".")[0]        # "model.layers.3.self_attn.o_proj"

        def transform_output_post_forward(self, module, output, mesh):
            if type(output) is not torch.Tensor or output.requires_grad:        # a DTensor: transformers is recording gradients
                raise ValueError(
                    f"the communicator sums local tensors without gradients, {type(module).__name__} gave a {type(output).__name__} with "
                    f"requires_grad={getattr(output, 'requires_grad', None)}: call the model under torch.no_grad(); train with "
                    f"transformers' own styles"
                )
            if mesh.size() != communicator.world_size:
                raise ValueError(f"transformers shards over {mesh.size()} ranks and the communicator spans {communicator.world_size}")
            output = communicator.all_reduce(output, site=getattr(module, "_hetero_attn_site", ""))
            bias = module._parameters.get("bias") if isinstance(self, RowwiseParallel) else None
            if bias is None:                            # transformers hides a row-parallel bias from the forward: it is added once
                return output
            return output + (bias.to_local() if hasattr(bias, "to_local") else bias)

    Summed.__name__ = Summed.__qualname__ = f"Summed{type(style).__name__}"
    twin = Summed.__new__(Summed)
    twin.__dict__.update(style.__dict__)                # the layouts it was registered with
    return twin
