"""Under vocabulary 'master' nothing that leaves rank 0 is a token id; what does leave it can be inverted, and a test shows that too."""

import mmap
import os
import re
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from tiny_checkpoint import write_checkpoint

from hetero_attn.collectives import init_communicator
from hetero_attn.models.generate import generate
from hetero_attn.models.load import load_model
from hetero_attn.models.sampling import SamplingParams
from hetero_attn.parallel.launch import run_ranks

pytestmark = pytest.mark.ranks
PROMPT = [211, 187, 302, 145, 263, 219, 230, 198, 177, 301, 164, 255]
SENDS = ("all_reduce", "all_gather", "broadcast", "reduce_scatter", "linear_all_reduce", "all_reduce_rms_norm")


def spied(folder, vocabulary):
    """Every tensor that this rank hands to a collective or gets from one: (operation, site, values) for integers, embeddings apart."""
    communicator = init_communicator("edge")
    seen, embedded = [], []

    def watch(name):
        real = getattr(communicator, name)

        def call(*args, **options):
            receives = name == "broadcast" and communicator.rank != 0            # into memory that holds nothing yet
            before = [] if receives else [each.clone() for each in args if isinstance(each, torch.Tensor)]
            out = real(*args, **options)
            for each in [*before, *([out] if isinstance(out, torch.Tensor) else [])]:
                if not each.is_floating_point():
                    seen.append((name, options.get("site", ""), each.flatten().tolist()))
                elif options.get("site") == "embed":
                    embedded.append(each.clone())
            return out

        setattr(communicator, name, call)

    for name in SENDS:
        watch(name)
    model = load_model(folder, "edge", communicator=communicator, vocabulary=vocabulary)
    seen.clear()                                                                     # settings as text: there is no prompt yet
    tokens = generate(model, [PROMPT], SamplingParams(max_new_tokens=8, ignore_eos=True))
    return seen, embedded[0].tolist(), [list(each.token_ids) for each in tokens]


def test_ranks_of_other_hosts_need_no_prompt(folder):
    from hetero_attn.cli import parser
    from hetero_attn.cli.errors import CommandError
    from hetero_attn.cli.request import checked

    args = parser().parse_args(["generate", str(folder), "--profile", "edge"])
    assert checked(args, 2, rank=1).prompts == ()
    with pytest.raises(CommandError, match="no prompt: give"):
        checked(args, 2, rank=0)


MARKER = "zebra-crossing-7291"                        # of the prompt, the system message and the stop text


def worked(request):
    """A rank of `hetero-attn generate` as it is started here, and how often its whole memory then holds the marker."""
    from hetero_attn.cli.work import work

    code = work(request)
    found, wanted, overlap = 0, re.compile(rb"[z]ebra-crossing-7291[!]"), len(MARKER)          # which is not found in itself
    for line in open("/proc/self/maps"):
        place, access, *rest = line.split()
        if not access.startswith("r") or rest[-1] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            continue
        start, end = (int(each, 16) for each in place.split("-"))
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            before = b""
            while start < end:                       # a read may give less than was asked for
                try:
                    content = memory.read(min(end - start, 64 << 20))
                except OSError:                      # a page that nobody may read: on with the next
                    start, before = (start // mmap.PAGESIZE + 1) * mmap.PAGESIZE, b""
                    memory.seek(start)
                    continue
                if not content:
                    break
                start += len(content)
                content = before + content
                found += len(wanted.findall(content))
                before = content[-overlap:]
    with open(f"{request.model}/found.{os.environ['RANK']}", "w") as file:
        file.write(str(found))
    return code


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_started_here_never_has_the_text_in_its_memory(folder, monkeypatch, capsys):
    from hetero_attn.cli import parser
    from hetero_attn.cli import work as module
    from hetero_attn.cli.request import checked

    words = ["generate", str(folder), "--prompt", f"{MARKER}!", "--stop", f"{MARKER}!", "--chat", "--system", f"{MARKER}!", "--profile",
             "edge", "--tp", "2", "--max-new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["hetero-attn", *words])
    monkeypatch.setattr(module, "work", worked)
    assert module.in_own_ranks(checked(parser().parse_args(words), 2)) == 0
    assert sys.argv[1:] == words
    assert [int((folder / f"found.{rank}").read_text()) > 0 for rank in range(2)] == [True, False]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def integers(seen):
    return [value for name, site, values in seen if site != "agreement" for value in values]


def test_no_token_id_is_sent(folder):
    ranks = run_ranks(spied, (folder, "master"), 2, threads=1)
    new = ranks[0][2][0]
    for seen, _, _ in ranks:
        sent = integers(seen)
        assert not set(PROMPT) & set(sent), "a prompt's token id travelled"
        assert not {token for token in new if token > 64} & set(sent)
        # every integer is a code, a count, a length or a place in the cache: small, whatever the prompt holds
        assert max(sent) <= 64


def test_the_check_sees_token_ids_where_they_do_travel(folder):
    """The negative control: under 'sharded' the control record carries them."""
    ranks = run_ranks(spied, (folder, "sharded"), 2, threads=1)
    assert set(PROMPT) <= set(integers(ranks[1][0]))


def test_input_embeddings_of_a_public_model_are_inverted_by_nearest_neighbour(folder):
    """What the README warns of: a worker with the public checkpoint reads the prompt from the activations it was sent."""
    from safetensors.torch import load_file

    received = torch.tensor(run_ranks(spied, (folder, "master"), 2, threads=1)[1][1])           # [T, C], on the worker
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.cdist(received, table.float()).argmin(-1).tolist() == PROMPT
