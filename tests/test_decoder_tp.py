"""Every family over 2, 3 and 4 real ranks, against transformers: heads, FFN columns and vocabulary rows that nothing divides evenly.

One set of ranks is spawned for each world size and runs all of it (a spawn costs seconds, a tiny model milliseconds); the tests read what
the ranks wrote. The world of one is in test_decoder_families.py.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, TOLERANCE, Expected, decode, difference, save_family

from hetero_attn.models.load import load_model
from hetero_attn.profile import load_profile
from hetero_attn.registry import use_backend
from hetero_attn.testing.ranks import on_ranks

WORLD_SIZES = (2, 3, 4)
VOCABULARIES = ("sharded", "master")
MIXED = "llama3.1"                                      # run again with another backend on every second rank


def all_families(communicator, folder: str) -> dict[str, dict]:
    """On each rank: all families in both vocabularies, each compared with transformers' logits where this rank has any."""
    folder, report = Path(folder), {}
    profile = load_profile("cpu", sets=["kv_block_size=4", "dtype=auto"])
    for name in FAMILIES:
        for vocabulary in VOCABULARIES:
            report[f"{name} {vocabulary}"] = one(folder / name, profile, communicator, vocabulary)
    with use_backend("reference") if communicator.rank % 2 else nullcontext():
        report["mixed"] = one(folder / MIXED, profile, communicator, "sharded")
    return report


def one(folder: Path, profile, communicator, vocabulary: str) -> dict:
    expected = Expected(**torch.load(folder / "expected.pt"))
    decoder = load_model(folder, profile, communicator.world_size, communicator=communicator, vocabulary=vocabulary)
    continuations, logits = decode(decoder, expected.prompts)
    report = {"has_logits": logits is not None, "q_heads": decoder.layers[0].attention.q_heads, "bytes": bytes_of(decoder)}
    if logits is not None:
        report["difference"] = difference(logits, expected)
        report["greedy"] = continuations == expected.continuations
        report["bits"] = hashlib.sha256(torch.cat(logits).numpy().tobytes()).hexdigest()
    return report


def bytes_of(decoder) -> int:
    return sum({parameter.data_ptr(): parameter.nbytes for parameter in decoder.parameters()}.values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    pytest.importorskip("transformers", reason="transformers is the definition these tests compare with")
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        expected = save_family(name, folder / name)
        torch.save(vars(expected), folder / name / "expected.pt")
    return folder


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda tp: f"tp{tp}")
def reports(request, checkpoints):
    """The reports of all ranks of one world size, in rank order."""
    outcomes = on_ranks(all_families, (str(checkpoints),), request.param)
    assert not any(outcome.error for outcome in outcomes), "\n".join(outcome.traceback for outcome in outcomes)
    return [outcome.result for outcome in outcomes]


@pytest.mark.ranks
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_transformers(reports, name, vocabulary):
    ranks = [report[f"{name} {vocabulary}"] for report in reports]
    assert [rank["has_logits"] for rank in ranks] == [vocabulary == "sharded" or index == 0 for index in range(len(ranks))]
    for rank in ranks:
        if rank["has_logits"]:
            assert rank["difference"] <= TOLERANCE
            assert rank["greedy"]
            assert rank["bits"] == ranks[0]["bits"]             # every rank would sample the same token


@pytest.mark.ranks
def test_work_is_divided(reports):
    """A rank has a part of the heads and holds less than a world of one would, unevenly where the sizes are."""
    for name, (_, keys) in FAMILIES.items():
        ranks = [report[f"{name} sharded"] for report in reports]
        assert sum(rank["q_heads"] for rank in ranks) == keys["num_attention_heads"]
        assert max(rank["q_heads"] for rank in ranks) < keys["num_attention_heads"]
        assert max(rank["bytes"] for rank in ranks) < 0.8 * sum(rank["bytes"] for rank in ranks)


@pytest.mark.ranks
def test_ranks_of_different_backends_agree(reports):
    for report in reports:
        assert report["mixed"]["difference"] <= TOLERANCE and report["mixed"]["greedy"]
        assert report["mixed"]["bits"] == reports[0]["mixed"]["bits"]
