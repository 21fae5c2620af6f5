"""KV in host memory within a device memory that is enforced: accounts, pinned pages, how many sequences fit, ranks, and the commands."""

import gc
import json
import mmap
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from tiny_checkpoint import write_checkpoint

from hetero_attn.collectives import init_communicator
from hetero_attn.models import placing as models_placing
from hetero_attn.models.control import Driver
from hetero_attn.models.conversation import Conversation
from hetero_attn.models.generate import generate
from hetero_attn.models.hosts import Host, Hosts
from hetero_attn.models.load import load_model
from hetero_attn.models.placing import Placing, host_room
from hetero_attn.models.planning import plan_model
from hetero_attn.models.restart import RestartLog
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.models.tokenizer import Tokenizer
from hetero_attn.parallel import offload
from hetero_attn.parallel.launch import run_ranks
from hetero_attn.parallel.offload import DeviceAccount
from hetero_attn.parallel.pinned import pinned_bytes, registered
from hetero_attn.parallel.placement import DeviceMemoryError, Placement
from hetero_attn.parallel.trace import FETCHES, HOST, STORES
from hetero_attn.profile import load_profile

PROMPT_TOKENS = 90


# ---- memory ------------------------------------------------------------------------------------------------------------------------


def test_the_account_counts_what_lives_and_refuses_what_does_not_fit():
    account = DeviceAccount(limit=1000, held=200)
    first = account.empty((100,), torch.float32, torch.device("cpu"))
    assert account.held == 600
    with pytest.raises(DeviceMemoryError, match="out of device memory: 404 B more are asked for, 600 B of 1000 B are held"):
        account.empty((101,), torch.float32, torch.device("cpu"))
    second = account.empty((100,), torch.float32, torch.device("cpu"))
    del first, second
    gc.collect()
    assert account.held == 200 and account.peak == 1000


class StandInCudart:
    """Registers pages as CUDA's runtime does: none twice, errors as codes. Takes down what happens in order."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.said, self.pages = code, [], {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.said.append("register")
        own = set(range(address // mmap.PAGESIZE, -(-(address + nbytes) // mmap.PAGESIZE)))
        assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0 and not any(own & each for each in self.pages.values())
        if not self.code:
            self.pages[address] = own
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        self.said.append("unregister")
        del self.pages[address]
        return 0


@pytest.mark.parametrize("shape", [(3, 4, 2, 8), (0, 4, 2, 8), (5 << 20,)])
def test_host_pages_are_registered_used_and_unregistered_in_order(shape):
    cudart = StandInCudart()

    def synchronize():
        cudart.said.append("synchronize")
        assert all(cudart.pages), "still registered while copies may run"

    tensors = [registered(shape, torch.float16, cudart, synchronize) for _ in range(3)]
    for place, tensor in enumerate(tensors):
        assert tensor.shape == shape and tensor.dtype == torch.float16
        tensor.fill_(place)
    assert all((tensor == place).all() for place, tensor in enumerate(tensors))
    if not tensors[0].numel():
        assert not cudart.said
        return
    taken = sum(map(len, cudart.pages.values())) * mmap.PAGESIZE
    assert cudart.said == ["register"] * 3 and taken == 3 * pinned_bytes(tensors[0].nbytes, "cuda")
    del tensor, tensors
    gc.collect()
    assert cudart.said == ["register"] * 3 + ["synchronize", "unregister"] * 3 and not cudart.pages


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog):
    cudart, forgotten = StandInCudart(code=2), []
    tensor = registered((4, 4), torch.float32, cudart, lambda: None, lambda: forgotten.append(True)).fill_(1)
    assert tensor.sum() == 16 and forgotten and "are not pinned (cudaHostRegister: error 2)" in caplog.text
    del tensor
    gc.collect()
    assert cudart.said == ["register"]


def test_what_pinned_memory_takes():
    layer = (262144 + 64) * 8 * 128 * 2                                # K of one layer, 256K tokens, 8 heads of 128, 16 bits
    assert pinned_bytes(layer, "cuda") == layer and pinned_bytes(layer + 1, "cuda") == layer + mmap.PAGESIZE
    assert pinned_bytes(layer, "npu") == 1 << 30 and pinned_bytes(1 << 30, "npu") == 1 << 30
    assert pinned_bytes(layer, "cpu") == layer and pinned_bytes(0, "npu") == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), context_length=256, num_hidden_layers=6)


def prompts(count=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 300, (PROMPT_TOKENS - 20 * place,), generator=generator).tolist() for place in range(count)]


def profile_with(**values):
    return load_profile("cpu", sets=["kv_block_size=4", "prefill_chunk=32", *(f"{key}={value}" for key, value in values.items())])


def tokens_of(folder, values, count=2, **options):
    model = load_model(folder, profile_with(**values), **options)
    found = generate(model, prompts(count), SamplingParams(max_new_tokens=12, ignore_eos=True))
    placing = model.placing
    return [each.token_ids for each in found], placing.last, placing.account, placing.traffic


def budget_for(folder, layers: float) -> int:
    """Device memory in which, of this model's cache for two prompts, so many layers' KV have room."""
    model = load_model(folder, profile_with(device_memory="1GiB"))
    generate(model, prompts(), SamplingParams(max_new_tokens=12, ignore_eos=True))
    figures = model.placing.figures(model, 2)
    return int(figures.weights + figures.activations + layers * model.placing.last.layer_bytes)


def test_a_prompt_longer_than_the_device_holds(folder):
    """Half of the layers fit: the same tokens, the account never beyond its limit, and all-device refused with what to do."""
    expected, last, _, traffic = tokens_of(folder, {})
    assert not last.host and not traffic.stored
    limit = budget_for(folder, 4.5)
    found, last, account, traffic = tokens_of(folder, {"device_memory": f"{limit}B"}, cache_tokens=None)
    # sequences wait for one another rather than share the host
    assert found == expected and not last.host
    long = int(budget_for(folder, 0) + 4.2 * 2 * 4 * (-(-(PROMPT_TOKENS + 12) // 4) + 1) * 2 * 8 * 4)
    found, last, account, traffic = tokens_of(folder, {"device_memory": f"{long}B"}, count=1)
    assert found == expected[:1]
    assert last.host and last.device and account.peak <= long and traffic.fetched and traffic.stored and traffic.crossed
    with pytest.raises(DeviceMemoryError, match=r"needs a KV cache of 101 tokens, memory holds \d+ \(placement all-device\).*"
                                                r"hetero-attn plan .*--context 101 --device-memory"):
        tokens_of(folder, {"device_memory": f"{long}B", "placement": "all-device"}, count=1)
    with pytest.raises(DeviceMemoryError, match=r"out of device memory|needs at least"):
        model = load_model(folder, profile_with(device_memory=f"{long}B", placement="all-device"))
        model.new_cache(PROMPT_TOKENS + 12, 1)
    with pytest.raises(DeviceMemoryError, match="nothing of the device's memory is left for KV"):
        load_model(folder, profile_with(device_memory="50KiB"))


def test_every_family_of_limits_gives_the_same_tokens(folder):
    expected = tokens_of(folder, {})[0]
    for host in (1, 3, 6):
        assert tokens_of(folder, {"placement": f"{host}-host-layers"})[0] == expected


def few_at_a_time(folder, layers: float, count: int):
    """`count` prompts in memory for so many layers' KV of the longest alone -> (tokens, placement, most that ran together, limit kept)."""
    model = load_model(folder, profile_with(device_memory="1GiB"))
    model.new_cache(PROMPT_TOKENS + 11, 1)
    figures = model.placing.figures(model, 1)
    limit = int(figures.weights + figures.activations + layers * model.placing.last.layer_bytes)
    model, running = load_model(folder, profile_with(device_memory=f"{limit}B")), []
    forward = model.forward
    model.forward = lambda step, cache: (running.append(len(cache.sequences)), forward(step, cache))[1]
    found = generate(model, prompts(count), SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=0.0))
    return [each.token_ids for each in found], model.placing.last, max(running), model.placing.account.peak <= limit


@pytest.mark.parametrize("layers", [6.0, 7.0, 2.1, 3.5])
def test_prompts_that_fit_one_by_one_run_as_many_together_as_fit(folder, layers):
    """However little there is beside what one of them needs, four of them do not fail, nor move to the host what the device holds."""
    alone, placement, _, _ = few_at_a_time(folder, layers, 1)
    assert bool(placement.host) == (layers < 6)
    expected = tokens_of(folder, {}, count=4)[0]
    found, placement, together, held = few_at_a_time(folder, layers, 4)
    assert found == expected and found[0] == alone[0] and held
    assert bool(placement.host) == (layers < 6) and 1 <= together < 4


def test_sequences_by_what_memory_holds():
    """Rank 0 has 4 blocks of 16 tokens with all KV on its device, 16 at most, and one less for each further sequence beside its own."""
    placing = Placing(ranks=((4, 16, 1, 1, 16), (-1, 20, 0, 0, 16)))
    assert placing.tokens(1) == (255, 63) and placing.tokens(2) == (223, 31) and placing.tokens(3) == (191, 0)
    assert [placing.sequences(tokens, 8) for tokens in (10, 31, 32, 63, 64, 223, 255, 256)] == [2, 2, 1, 1, 6, 2, 1, 0]
    assert placing.sequences(10, 1) == 1 and Placing(ranks=((-1, -1, 0, 0, 16),)).sequences(10**9, 5) == 5


@pytest.mark.parametrize("arguments, room", [
    ((None, 1, "cpu", 100, "auto", 6), None),
    ((1000, 1, "cuda", 100, "auto", 6), 900),                            # nine tenths, of each rank its part
    ((1000, 4, "cuda", None, 3, 6), 225),
    ((1000, 2, "cpu", 100, "auto", 6), 350),                             # the device is a part of the same memory
    ((1000, 2, "cpu", 500, "auto", 6), 0),
    ((1000, 1, "cpu", None, 2, 6), 900 * 2 // 8),                        # two layers of host, six and their buffers of device
])
def test_what_of_host_memory_a_rank_may_fill(arguments, room):
    assert host_room(*arguments) == room


def test_host_memory_is_read_once(folder, monkeypatch):
    monkeypatch.setattr(models_placing, "available_bytes", lambda: 1 << 30)
    model = load_model(folder, profile_with(placement="2-host-layers"))
    monkeypatch.setattr(models_placing, "available_bytes", lambda: pytest.fail("read again"))
    model.new_cache(100, 1)
    assert model.placing.host_room == int(0.9 * (1 << 30)) * 2 // 8


@pytest.mark.ranks
def test_ranks_place_for_themselves(folder):
    """One rank's KV on the host, the other's on its device; limits on both; a rank that has no room is heard of by all."""
    limits = [{"device_memory": "1GiB"}, {"placement": "6-host-layers", "device_memory": "1GiB"}]
    rounds = [[{}, {}], [{"placement": "4-host-layers"}, {}], limits]
    plain, first, second = zip(*run_ranks(rank_tokens, (folder, rounds), 2, threads=1))
    assert [len(each[1].host) for each in first] == [4, 0] and first[0][0] == plain[0][0]
    assert [len(each[1].host) for each in second] == [0, 6] and second[0][0] == plain[0][0] and second[1][2].stored


def rank_tokens(folder, rounds):
    found = []
    with init_communicator(load_profile("cpu")) as communicator:
        for values in rounds:
            tokens, last, _, traffic = tokens_of(folder, values[communicator.rank], communicator=communicator)
            found.append((tokens, last, traffic))
    return found


@pytest.mark.ranks
def test_a_rank_without_room_is_heard_of_by_all(folder):
    with pytest.raises(Exception, match=r"nothing of the device's memory is left for KV|rank 1 has no device memory left for KV"):
        run_ranks(rank_tokens, (folder, [[{}, {"device_memory": "30KiB"}]]), 2, threads=1)


def talk(folder, values):
    with Driver(load_model(folder, profile_with(**values))) as driver:
        said = Conversation(driver, Tokenizer.from_dir(folder), SamplingParams(max_new_tokens=20, seed=1, ignore_eos=True))
        turns = [["".join(piece.text for piece in said.say(text)), said.prefilled] for text in ("Hello, how are you?", "And then?")]
        return turns, driver.model.placing


def test_a_conversation_goes_on_over_kv_in_host_memory(folder):
    expected, _ = talk(folder, {})
    found, placing = talk(folder, {"placement": "5-host-layers"})
    assert found == expected and placing.traffic.crossed and found[1][1] < 60
    found, placing = talk(folder, {"device_memory": f"{budget_for(folder, 0) + 100 * 1024}B"})
    assert found == expected and placing.last.host
    small = f"{budget_for(folder, 0) + 2 * 1024}B"
    with pytest.raises(DeviceMemoryError, match="the conversation needs"):
        talk(folder, {"device_memory": small})


def test_a_restart_rebuilds_kv_on_the_host(folder, tmp_path):
    params, model = SamplingParams(max_new_tokens=12, ignore_eos=True, seed=5, temperature=1.0), None
    model = load_model(folder, profile_with(placement="3-host-layers"))
    expected = [each.token_ids for each in generate(model, prompts(), params)]
    log = RestartLog(Path(tmp_path) / "log", prompts(), params)
    generate(model, prompts(), params, log=log)
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(lines[: len(lines) // 2]))                     # lost half-way
    log = RestartLog(log.path, prompts(), params)
    assert 0 < log.tokens < 24
    assert [each.token_ids for each in generate(model, prompts(), params, log=log)] == expected


def test_weights_from_the_disk_keep_their_kv(folder):
    from hetero_attn.models.config import ModelError

    with pytest.raises(ModelError, match="leave placement and device memory out, or the budget"):
        load_model(folder, profile_with(placement="2-host-layers"), memory_budget="1GiB")
    with pytest.raises(ModelError, match="placement is 7-host-layers, the model has 6 layers"):
        load_model(folder, profile_with(placement="7-host-layers"))


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def run_command(capsys, *words) -> tuple[int, str, str]:
    from hetero_attn.cli import main

    capsys.readouterr()
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_generate_says_where_kv_lay_and_plan_says_the_same(folder, capsys, tmp_path):
    few = ["--profile", "cpu", "--set", "kv_block_size=4", "--set", "prefill_chunk=32"]
    wanted = ["generate", str(folder), "--prompt", "The quick brown fox jumps over the lazy dog. " * 3, "--max-new-tokens", "9", "--json",
              "--temperature", "0", "--ignore-eos", *few]
    code, out, _ = run_command(capsys, *wanted)
    plain = json.loads(out)
    assert code == 0 and plain["placement"] == []
    trace = tmp_path / "trace.json"
    code, out, err = run_command(capsys, *wanted, "--placement", "4-host-layers", "--trace", str(trace))
    found = json.loads(out)
    assert code == 0 and found["results"][0]["text"] == plain["results"][0]["text"]
    (rank,) = found["placement"]
    assert rank["host_layers"] == [1, 2, 4, 5] and rank["device_layers"] == [0, 3] and rank["stored"] and rank["crossed"]
    assert "rank 0: KV of layers 0, 3 on device, 1-2, 4-5 on host: " in err and err.strip().endswith(f"trace: {trace}")
    lanes = {event["cat"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert lanes == {"compute", FETCHES, STORES, HOST}                     # of one rank, which sends nothing
    code, out, err = run_command(capsys, *wanted, "--device-memory", "1GiB", "--trace", str(trace))
    assert code == 0 and "(nothing is in it: one rank sums nothing, and all KV lay on the device)" in err
    # within a budget: as many layers as the plan says
    tokens = plain["results"][0]["prompt_tokens"] + 8
    limit = f"{budget_for(folder, 0) + 5 * 2 * 4 * (tokens // 4 + 1) * 2 * 8 * 4}B"
    code, out, err = run_command(capsys, *wanted, "--device-memory", limit)
    (rank,) = json.loads(out)["placement"]
    assert code == 0 and rank["host_layers"] and rank["device_layers"] and rank["device_peak"] <= rank["device_memory"]
    assert json.loads(out)["results"][0]["text"] == plain["results"][0]["text"]
    rates = [word for name in ("memory_gbps", "host_memory_gbps", "bus_gbps") for word in ("--set", f"hardware.{name}=10")]
    code, out, _ = run_command(capsys, "plan", str(folder), "--context", str(tokens), "--device-memory", limit, "--json", *few, *rates)
    planned = json.loads(out)["ranks"][0]
    assert (planned["host_layers"], planned["device_layers"]) == (rank["host_layers"], rank["device_layers"])


def test_the_plan_counts_a_step_as_the_run_does(folder):
    """A chunk's activations do not shrink with the context that is asked for: the cache's size is not known when they are placed."""
    profile = profile_with(device_memory="1GiB", **{f"hardware.{name}": 10 for name in ("memory_gbps", "host_memory_gbps", "bus_gbps")})
    model = load_model(folder, profile)
    figures = model.placing.figures(model, 1)
    for context in (8, 200):
        (rank,) = plan_model(folder, Hosts((Host(profile, "cpu"),)), context=context).ranks
        assert rank.activations == figures.activations


def test_out_of_memory_names_a_command_that_runs(folder, capsys):
    few = ["--profile", "cpu", "--set", "kv_block_size=4", "--set", "prefill_chunk=32"]
    limit = f"{budget_for(folder, 0) + 3 * 1024}B"
    code, out, err = run_command(capsys, "generate", str(folder), "--prompt", "Hello world " * 8, "--device-memory", limit, *few)
    assert code == 2 and not out and "memory holds" in err
    command = shlex.split(err.partition("in host memory: ")[2])
    assert command[:2] == ["hetero-attn", "plan"]
    command[-1] = "3MiB"                                               # with what would do, it shows the way
    code, out, _ = run_command(capsys, *command[1:])
    assert code == 0 and "layers' KV fit on the device" in out
    for words, says in ((["--placement", "most"], "is no placement"), (["--placement", "7"], "the model has 6 layers"),
                        (["--device-memory", "3"], "is no size"), (["--placement", "2", "--memory-budget", "1GiB"], "leave placement")):
        code, out, err = run_command(capsys, "generate", str(folder), "--prompt", "A", *words, *few)
        assert code == 2 and says in err and "\n" not in err.strip(), err


def test_an_account_or_host_that_runs_out_is_told_what_to_do(folder, monkeypatch):
    model = load_model(folder, profile_with(device_memory="1GiB", placement="2-host-layers"))
    command = r"; what would fit.*: hetero-attn plan .* --context 16 --device-memory 1024MiB"
    model.placing.account.held = model.placing.account.limit
    monkeypatch.setattr(model.placing, "place", lambda *arguments: Placement(6, (2, 5), 4096))
    with pytest.raises(DeviceMemoryError, match="rank 0: out of device memory: .* more are asked for.*" + command):
        model.new_cache(16, 1)

    def full(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(offload.host_memory, "empty", full)
    with pytest.raises(DeviceMemoryError, match="rank 0: the host has no .* of memory for a layer's KV .*" + command):
        model.new_cache(16, 1)


def test_a_device_that_runs_out_is_told_what_to_do(folder):
    """torch's own out-of-memory error, from wherever in a forward pass, becomes ours with the way out."""
    model = load_model(folder, profile_with(device_memory="1GiB"))
    cache = model.new_cache(16, 1)
    sequence = cache.add_sequence()

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 31.7 GiB")

    model.layers[2].attention.qkv_proj.joined = full
    with pytest.raises(DeviceMemoryError, match=r"rank 0: CUDA out of memory. Tried to allocate 2.00 GiB.; what would fit.*: hetero-attn "
                                                r"plan .* --context 20 --device-memory 1024MiB"):
        model(cache.step([sequence], [3], [5, 6, 7]), cache)
