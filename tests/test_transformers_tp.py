"""transformers' own tensor parallelism over our communicator: two real ranks, the logits of one process, every sum counted.

One set of ranks does all the work, because importing torch and transformers is most of the time.
"""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.21")
pytest.importorskip("accelerate", reason="transformers shards a model in from_pretrained only with accelerate installed")

from hf_models import TOLERANCE, config_of, make_batch, make_model  # noqa: E402

from hetero_attn.communicator import SoloCommunicator  # noqa: E402
from hetero_attn.integrations import transformers as adapter  # noqa: E402
from hetero_attn.integrations import transformers_tp  # noqa: E402
from hetero_attn.testing.ranks import on_ranks  # noqa: E402

MODELS = {                                              # model type -> the sums of its layer
    "llama": ["self_attn.o_proj", "mlp.down_proj"],     # with biases, which have to be added once, not twice
    "gemma2": ["self_attn.o_proj", "mlp.down_proj"],
    "mixtral": ["self_attn.o_proj", "mlp.experts"],
}
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}}


def shard_and_run(communicator, folder: str) -> dict:
    """In a rank: each model sharded with transformers' styles, then with ours; its logits, tokens and what was summed where."""
    transformers.logging.set_verbosity_error()
    sites, theirs = [], []
    all_reduce, torch_all_reduce = communicator.all_reduce, torch.distributed.all_reduce
    communicator.all_reduce = lambda x, *, site="": sites.append(site) or all_reduce(x, site=site)
    torch.distributed.all_reduce = lambda x, *a, **o: theirs.append(x.shape) or torch_all_reduce(x, *a, **o)
    adapter.register()
    transformers_tp.register_tensor_parallel(communicator)
    results = {}
    for model_type in MODELS:
        for own in (False, True):
            model = load(f"{folder}/{model_type}", own)
            del sites[:], theirs[:]
            with torch.no_grad():
                logits = model(**make_batch("left")).logits
            results[model_type, own] = {"logits": logits, "sites": list(sites), "theirs": len(theirs)}
        with torch.no_grad():
            results[model_type, "tokens"] = model.generate(**make_batch("left"), max_new_tokens=6, do_sample=False)
    results["with gradients"] = error_of(lambda: model(**make_batch("left")))
    transformers_tp.register_tensor_parallel(SoloCommunicator())
    model = load(f"{folder}/llama", True)
    with torch.no_grad():
        results["another world"] = error_of(lambda: model(**make_batch("left")))
    return results


def load(path: str, own: bool):
    config = transformers.AutoConfig.from_pretrained(path)
    plan = transformers_tp.tp_plan_for(config) if own else None
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="hetero_attn", distributed_config=transformers.distributed.DistributedConfig(tp_size=2, tp_plan=plan)
    ).eval()


def error_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The models, saved for the ranks; the logits and tokens of one process."""
    folder, expected = tmp_path_factory.mktemp("models"), {}
    for model_type in MODELS:
        model = make_model(model_type, **BIASES.get(model_type, {}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):                   # transformers starts them at 0
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / model_type)
        with torch.no_grad():
            logits = model(**make_batch("left")).logits
            expected[model_type] = logits, model.generate(**make_batch("left"), max_new_tokens=6, do_sample=False)
    return folder, expected


@pytest.fixture(scope="module")
def ranks(alone):
    outcomes = on_ranks(shard_and_run, (str(alone[0]),), world_size=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].traceback or outcomes[1].traceback
    return [outcome.result for outcome in outcomes]


@pytest.mark.ranks
@pytest.mark.parametrize("model_type", MODELS)
def test_two_ranks_equal_one_process(model_type, alone, ranks):
    logits, tokens = alone[1][model_type]
    real = make_batch("left")["attention_mask"].bool()
    for result in ranks:
        for own in (False, True):
            error = (result[model_type, own]["logits"] - logits).abs()[real]
            assert error.max() < TOLERANCE * logits.abs().max()
        assert torch.equal(result[model_type, "tokens"], tokens)
    assert torch.equal(ranks[0][model_type, True]["logits"], ranks[1][model_type, True]["logits"])      # the same bits


@pytest.mark.ranks
@pytest.mark.parametrize("model_type", MODELS)
def test_every_sum_goes_through_the_communicator(model_type, ranks):
    """As many as there are row-parallel layers, each under its name; with transformers' own styles, none."""
    summed = [f"model.layers.{layer}.{name}" for layer in range(2) for name in MODELS[model_type]]
    for result in ranks:
        assert result[model_type, True]["sites"] == summed
        assert result[model_type, False]["sites"] == []
        assert result[model_type, False]["theirs"] == len(summed)


@pytest.mark.ranks
def test_what_the_communicator_cannot_do_is_refused(ranks):
    for result in ranks:
        assert "torch.no_grad()" in result["with gradients"]
        assert "over 2 ranks and the communicator spans 1" in result["another world"]


def test_plans_name_only_what_is_summed():
    registered = transformers_tp.register_tensor_parallel(SoloCommunicator())
    assert registered["rowwise"] == "hetero_attn_rowwise" and "colwise" not in registered
    assert transformers_tp.register_tensor_parallel(SoloCommunicator()) == registered       # no twins of twins
    assert transformers_tp.tp_plan_for(config_of("llama")) == {
        "model.layers.*.self_attn.o_proj": "hetero_attn_rowwise", "model.layers.*.mlp.down_proj": "hetero_attn_rowwise"}
    assert transformers_tp.tp_plan_for(config_of("llama"), transformers.LlamaModel).keys() == {
        "layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"}
    with pytest.raises(ValueError, match="GPT2LMHeadModel sums nothing"):
        transformers_tp.tp_plan_for(config_of("gpt2"))
