"""hopper-emulated: the collectives conformance suite with ranks as threads and the kernels run by csrc/simt, and what the suite does not
ask.

What is tested here is everything but the launch and the device's memory: arguments, reasons, layout, shards, meetings, time-outs, the heap.
"""

import functools
import math
import time
from dataclasses import replace

import hopper_scenarios as scenarios
import pytest
import torch
from hetero_attn_hopper import HopperBackend, abi, plan
from hetero_attn_hopper.communicator import HopperCommunicator
from hetero_attn_hopper.kernels import UNICAST
from hetero_attn_hopper.layout import Layout
from hetero_attn_hopper.making import hopper_communicator
from hopper_emulated import SIZES, EmulatedDevice, Node, emulated, emulated_profile
from native import needs_compiler

from hetero_attn import registry
from hetero_attn.collectives import choose_communicator
from hetero_attn.communicator import CommunicatorError, add_and_norm
from hetero_attn.profile import load_profile, shipped_profiles
from hetero_attn.testing.collective_cases import CASES, FULL
from hetero_attn.testing.collectives import suite_names, verdict, whole_suite
from hetero_attn.testing.rank_threads import ThreadCommunicator, on_threads
from hetero_attn.testing.simt import ORDERS

pytestmark = needs_compiler
# (ranks, whether there is a multicast address, bytes up to which an all-reduce is one-shot)
# With all ranks in one process the full grid's 4 Mi numbers take minutes, and none of its kernels: they are beyond the room, the base's.
LARGE = [case for case in CASES if math.prod(case.shape) * case.dtype.itemsize > SIZES["symmetric_room_bytes"]]
HERE = [*(case for case in CASES if case not in LARGE), *(replace(case, shape=(1 << 18,)) for case in LARGE)]
GROUPS = [(2, True, 256), (3, False, 4096), *([(4, True, 8192), (8, True, 256), (8, False, 8192)] if FULL else [])]


def results(outcomes):
    """What the ranks returned; raises with the first traceback."""
    for outcome in outcomes:
        assert not outcome.error, outcome.traceback
    return [outcome.result for outcome in outcomes]


def on_ranks(fn, world_size=2, *, node=None, **options):
    node = node or Node(world_size)
    return on_threads(fn, world_size, wrap=lambda base: emulated(base, node, **options))


@functools.cache
def suite(world_size, multicast, stage):
    """Every rank's outcomes; the group runs once, all cases in it."""
    node, threads = Node(world_size, multicast=multicast), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return on_threads(whole_suite, world_size, wrap=lambda base: emulated(base, node, symmetric_stage_bytes=stage), args=(HERE,),
                          timeout_s=60.0)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.timeout(1200 if FULL else 300)             # of the first case of a group: it runs them all
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("name", suite_names(HERE))
def test_conforms(group, name):
    assert verdict(name, suite(*group)) is None


def test_the_control_of_the_suite_on_threads():
    """Their base alone passes too, so what the suite finds is the communicator's."""
    outcomes = on_threads(whole_suite, 2)
    assert [name for name in suite_names() if verdict(name, outcomes)] == []


@pytest.mark.parametrize("world_size, multicast, order", [(2, True, 0), (4, False, 1), (8, True, 2), (8, False, 3)])
def test_fused_equals_the_definition(world_size, multicast, order):
    """To a unit in the last place of bf16: only the order of the mean's sum differs; the residual to the bit. Ragged rows, all doors and
    orders."""
    for options in ({"rows": 20}, {"rows": 5, "weight_offset": 1.0, "post": True}, {"rows": 9, "dtype": torch.float16, "width": 264},
                    {"rows": 11, "uneven": True}):
        setting = {"lates": 1, "multicast": multicast, "order": order, "options": options | {"turns": 2}}
        assert scenarios.complaints(scenarios.fused, world_size, **setting) == []


@pytest.mark.parametrize("ctas", [2, 5, 32] if FULL else [2, 5])
def test_any_number_of_ctas(ctas):
    assert scenarios.complaints(scenarios.fused, 2, lates=0, ctas=ctas, options={"rows": 70, "width": 8}) == []


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_and_weight_may_have_dtypes_of_their_own(residual, weight):
    def run(communicator):
        parts = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
        whole = torch.randn(5, 48, generator=torch.Generator().manual_seed(4)).to(residual)
        w, post = torch.linspace(0.5, 2, 48).to(weight), torch.linspace(2, 0.5, 48)
        shard = whole[communicator.rows(5)].clone()
        normed, _ = communicator.all_reduce_rms_norm(parts[communicator.rank].clone(), shard, w, 1e-5, site="a", post_weight=post)
        want = add_and_norm(parts.float().sum(0).bfloat16(), whole, w, 1e-5, 0.0, post)
        return torch.equal(shard, whole[communicator.rows(5)]), (normed.float() - want.float()).abs().max().item()

    for same, off in results(on_ranks(run)):
        assert same and off <= 2**-6


def test_a_tensor_from_empty_is_taken_where_it_lies():
    node = Node(2)

    def run(communicator):
        x = communicator.empty((6, 16), torch.bfloat16).fill_(1)
        normed, _ = communicator.all_reduce_rms_norm(x, torch.zeros(3, 16, dtype=torch.bfloat16), torch.ones(16), 0.0, site="a")
        part = communicator.all_reduce(x[:1])            # 16 channels: whole units of it
        odd = communicator.empty((5, 3), torch.float32).fill_(1)
        views = communicator.all_reduce(odd[:3])         # ends within a unit, which the other rows share: by a copy
        return (normed.data_ptr() == x.data_ptr(), part.data_ptr() == x.data_ptr(), views.data_ptr() == odd.data_ptr(),
                (views == 2).all().item(), (odd[3:] == 1).all().item())

    assert results(on_ranks(run, node=node, symmetric_stage_bytes=256)) == [(True,) * 5] * 2


def test_memory_is_given_back_and_the_heap_may_be_full():
    def run(communicator):
        for _ in range(100):
            communicator.empty((1000,), torch.float32)       # dropped at once
        heap = communicator._heap
        kept = [communicator.empty((100_000,), torch.float32) for _ in range(3)]      # the third is too much: 1 MiB in all
        symmetric = [heap.begin <= each.data_ptr() - communicator._memory.address < heap.end for each in kept]
        sums = [(communicator.all_reduce(each.fill_(1)) == 2).all().item() for each in kept]
        del kept
        whole = communicator.empty((1 << 18,), torch.float32)
        return symmetric, sums, heap.begin == whole.data_ptr() - communicator._memory.address

    assert results(on_ranks(run)) == [([True, True, False], [True] * 3, True)] * 2


def test_ranks_may_hold_unlike_tensors_of_one_call():
    """One rank's x is symmetric and the other's is not: the kernel is told where each lies, and does without the switch."""
    def run(communicator):
        x = communicator.empty((4, 64), torch.bfloat16) if communicator.rank else torch.empty(4, 64, dtype=torch.bfloat16)
        normed, _ = communicator.all_reduce_rms_norm(x.fill_(1), torch.zeros(2, 64, dtype=torch.bfloat16), torch.ones(64), 0.0, site="a")
        return normed.float().sum().item(), communicator.reduce_scatter(x.fill_(3)).float().sum().item()

    assert results(on_ranks(run)) == [(256.0, 768.0)] * 2


def test_what_goes_to_the_base_says_why():
    def run(communicator):
        communicator.all_reduce(torch.ones(3, dtype=torch.int64))
        communicator.all_gather(torch.ones(3))
        communicator.all_reduce(torch.ones(1 << 21))
        norm = lambda channels, dtype: communicator.all_reduce_rms_norm(
            torch.ones(2, channels, dtype=dtype), torch.zeros(1, channels, dtype=dtype), torch.ones(channels, dtype=dtype), 1e-5, site="a")
        norm(12, torch.float32)
        norm(16, torch.float64)
        return sorted(communicator.objections), repr(communicator.ctas), communicator.door

    (objections, _, door), _ = results(on_ranks(run))
    assert door == "multimem" and objections == sorted([
        "all_reduce: dtype is int64, the kernels sum float32, bfloat16 and float16",
        "all_gather: sizes are not given, and asking the other ranks for theirs would stop the host",
        "all_reduce: the tensor has 8.0 MiB, the symmetric room for one holds 4.0; raise symmetric_room_bytes",
        "all_reduce_rms_norm: rows have 12 channels, the kernel takes multiples of 8",
        "all_reduce_rms_norm: dtype is float64, the kernels sum float32, bfloat16 and float16",
        "all_reduce_rms_norm: residual is float64, the kernel has float32, bfloat16 and float16",
        "all_reduce_rms_norm: a norm's weight is float64, the kernel has float32, bfloat16 and float16",
    ])
    long_row = plan.norm_objections(torch.bfloat16, torch.bfloat16, [torch.float32], (4, 65536), Layout(256, 1 << 20, 256), 227 << 10)
    assert long_row == ["rows have 65536 channels, the kernel holds a row in shared memory: up to 57856"]


def test_a_rank_that_does_not_come_is_named_with_its_slot():
    for world_size, absent in ((2, 1), (3, 0)):
        assert scenarios.complaints(scenarios.absent, world_size, lates=absent, timeout_s=1.0) == []


def test_after_a_failure_every_call_raises_it_again_and_none_waits():
    def run(communicator):
        communicator.timeout_s = 0.3
        if communicator.rank:
            return None
        x, texts = torch.ones(4), []
        for call in (communicator.all_reduce, communicator.reduce_scatter, lambda x: communicator.start_all_reduce(x).wait(),
                     lambda x: communicator.raise_if_broken()):
            began = time.monotonic()
            with pytest.raises(CommunicatorError, match=r"rank 0 of 2: all_reduce of x \[4\] float32 failed .*rank 1 did not come "
                                                        r"\(CTA \d, meeting 1 of the call, slot \d+\)"):
                call(x)
            texts.append(time.monotonic() - began)
        return texts

    took = results(on_ranks(run))[0]
    assert took[0] < 3 and max(took[1:]) < 0.1


def test_ranks_that_make_unlike_calls_are_told():
    def run(communicator):
        x, began = torch.ones(4 + communicator.rank), time.monotonic()
        with pytest.raises(CommunicatorError, match=r"rank [01] made another call: operation, dtype, sizes or CTAs differ"):
            communicator.all_reduce(x)
        return time.monotonic() - began < 5          # at once: not after the time-out of 30 s

    assert results(on_ranks(run)) == [True, True]


def test_a_closed_communicator_says_so():
    def run(communicator):
        communicator.close()
        with pytest.raises(CommunicatorError, match="has been closed"):
            communicator.all_reduce(torch.ones(4))
        return communicator.empty((2,), torch.float32).shape

    assert results(on_ranks(run)) == [(2,)] * 2


# ---- the choice --------------------------------------------------------------------------------------------------------------------


def reasons(world_size=2, *, device=EmulatedDevice, node=None, door=None, **changes):
    """Why there is no communicator, in one line: every rank's alike."""
    node, made = node or Node(world_size), {}

    def wrap(base):
        made[base.rank] = hopper_communicator(base, emulated_profile(**changes), device(node, base.rank), door)
        return base

    results(on_threads(lambda communicator: None, world_size, wrap=wrap))
    assert all(each == made[0] for each in made.values())
    return "; ".join(made[0])


def test_without_a_multicast_address_it_is_the_unicast_twin():
    found = results(on_ranks(lambda communicator: (communicator.door, communicator.why_not_multimem), node=Node(2, multicast=False)))
    assert found == [(UNICAST, ["compute capability is 8.0, multimem instructions need 9.0",
                                "the ranks' memory has no multicast address (it takes NVSwitch, and each rank a GPU of its own)"])] * 2
    assert results(on_ranks(lambda communicator: communicator.door, door=UNICAST)) == [UNICAST] * 2
    assert "door multimem was asked for" in reasons(door="multimem", node=Node(2, multicast=False))


def test_reasons_against_it():
    assert "codec is 'int8_group32', which travels over torch.distributed; say codec: none" in reasons(codec="int8_group32")
    assert "overlap.attention_ctas is 33, the kernels take 2 to 32 CTAs" in reasons(**{"overlap.attention_ctas": 33})

    class Elsewhere(EmulatedDevice):
        def objections(self, facts, rank):
            return ["rank 0 is on another host"] if rank else []

    class Full(EmulatedDevice):
        def symmetric(self, base, layout, facts):
            raise RuntimeError("CUDA out of memory")

    class Broken(EmulatedDevice):
        def prepare(self, kernels, device):
            if self.rank:
                raise ValueError("no kernel image")

    class Unsure(EmulatedDevice):
        def objections(self, facts, rank):
            if rank:
                raise AssertionError("Invalid peer device id")
            return []

    class Mute(EmulatedDevice):
        def facts(self, device):
            if self.rank:
                raise RuntimeError("NVML: not supported")
            return super().facts(device)

    began = time.monotonic()
    assert "rank 1: whether it reaches the others' devices cannot be told: AssertionError: Invalid peer" in reasons(device=Unsure)
    assert "rank 1: its device does not describe itself: RuntimeError: NVML" in reasons(device=Mute)
    assert time.monotonic() - began < 5
    assert "rank 1: rank 0 is on another host" in reasons(device=Elsewhere)
    assert "got no memory in common (5 MiB each): CUDA out of memory" in reasons(device=Full)
    assert "the kernels: rank 1: ValueError: no kernel image" in reasons(device=Broken)


def test_memory_is_left_when_there_is_no_communicator_after_all():
    left = []

    class Broken(EmulatedDevice):
        def symmetric(self, base, layout, facts):
            memory = super().symmetric(base, layout, facts)
            memory.leave = lambda: left.append(self.rank)
            return memory

        def prepare(self, kernels, device):
            raise ValueError("no kernel image")

    assert "no kernel image" in reasons(device=Broken) and sorted(left) == [0, 1]


def test_the_collectives_do_not_need_attention():
    """A torch without FlashAttention, or a device too old for it, keeps the communicator."""
    class Operators:
        device = "cpu"

        def unavailable_reasons(self, index=None):
            return ["this torch is built without FlashAttention"]

    class Collectives(HopperBackend):
        def communicator(self, base, profile):
            return hopper_communicator(base, profile, EmulatedDevice(node, base.rank))

    node, profile = Node(2), replace(emulated_profile(), communicators=("half-hopper", "distributed"))
    backend = Collectives(Operators(), EmulatedDevice(node, 0))
    assert backend.unavailable_reasons() and not backend.communicator_unavailable_reasons()
    with registry.register("half-hopper", lambda: backend):
        outcomes = on_threads(lambda communicator: type(communicator), 2, wrap=lambda base: choose_communicator(profile, base)[0])
    assert results(outcomes) == [HopperCommunicator] * 2


def test_a_world_of_one_has_nothing_to_exchange():
    assert "world size is 1, these kernels serve 2 to 16 ranks" in reasons(1)


def test_it_is_never_chosen_automatically():
    assert all("hopper-emulated" not in load_profile(path).communicators for path in shipped_profiles().values())


def test_threads_that_fail_do_not_hold_up_the_others():
    def run(communicator):
        if communicator.rank:
            raise ValueError("mine")
        communicator.barrier()

    began = time.monotonic()
    outcomes = on_threads(run, 2)
    assert time.monotonic() - began < 5 and [outcome.error for outcome in outcomes] == ["CommunicatorError", "ValueError"]
    assert issubclass(ThreadCommunicator, object) and ORDERS


def test_the_struct_is_call_h_s():
    """Fields, order, sizes and constants of csrc/hopper/call.h against abi.py and layout.py."""
    import re

    from hetero_attn_hopper import layout

    from hetero_attn.jit import csrc_dir

    text = re.sub(r"//[^\n]*", "", (csrc_dir() / "hopper" / "call.h").read_text())
    body = text.split("struct Call {")[1].split("};")[0]
    kinds = {"unsigned long long": "pointer", "long long": "int64", "unsigned": "uint32", "int": "int32", "float": "float"}
    found = []
    for kind, names in re.findall(r"(unsigned long long|long long|unsigned|int|float)\s+([^;]+);", body):
        for name in names.split(","):
            array = re.fullmatch(r"\s*(\w+)\s*(\[MAX_RANKS\])?\s*", name)
            found.append((array[1], kinds[kind], abi.MAX_RANKS if array[2] else 1))
    assert found == list(abi.CALL)
    constant = lambda name: re.search(rf"constexpr int {name} = ([^;]+);", text)[1]
    names = {"MAX_RANKS": abi.MAX_RANKS, "MAX_CTAS": abi.MAX_CTAS, "UNIT": abi.UNIT, "SLOT_BYTES": layout.SLOT_BYTES}
    assert all(int(constant(name)) == value for name, value in names.items())
    values = names | {"CHANNELS": abi.CHANNELS, "SLOTS_BYTES": layout.SLOTS_BYTES, "EPOCHS_AT": layout.EPOCHS_AT}
    for name, value in {"CHANNELS": abi.CHANNELS, "SLOTS_BYTES": layout.SLOTS_BYTES, "EPOCHS_AT": layout.EPOCHS_AT,
                        "BROKEN_AT": layout.BROKEN_AT}.items():
        assert eval(constant(name), {}, values) == value
    with pytest.raises(ValueError, match=r"call has fields \['sourse'\]"):
        abi.pack({"sourse": 1})
    status = abi.Status.of(1 << 56 | 3 << 48 | 33 << 40 | 2 << 32 | 77)
    assert status == (1, 3, 33, 2, 77) and status.words == "rank 3 did not come (CTA 1, meeting 2 of the call, slot 531)"
