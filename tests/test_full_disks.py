"""Disks that are full and folders that cannot be written: one line that says so, and nothing half-written that passes for whole."""

import contextlib
import os
import resource
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="transformers writes the checkpoints these tests read")

from tiny_checkpoint import write_checkpoint

from hetero_attn.cli.work import forget
from hetero_attn.models.config import ModelError
from hetero_attn.models.export import check, export
from hetero_attn.models.load import open_model
from hetero_attn.models.restart import RestartLog
from hetero_attn.models.sampling import SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/sys, /dev/full, RLIMIT_FSIZE")
UNWRITABLE = "/sys/hetero-attn"                      # for root too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), intermediate_size=512)


@pytest.fixture(scope="module")
def midway(folder, tmp_path_factory):
    """A limit that rank 1's attention slices keep and its MLP slices do not."""
    (made,) = export(folder, tmp_path_factory.mktemp("whole"), 2, ranks=[1])
    attention, mlp = (made.folder.joinpath(f"layer-000.{name}.safetensors").stat().st_size for name in ("attention", "mlp"))
    assert attention < mlp
    return mlp - 1


@contextlib.contextmanager
def largest_file(nbytes):
    """No file of this process may grow beyond it: as a full disk, errors come from write()."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("early", [True, False], ids=["at once", "midway"])
def test_a_full_disk_is_one_line_and_the_export_goes_on(folder, midway, tmp_path, early):
    says = r"writing .* failed: File too large; the export goes on from here"
    with largest_file(1000 if early else midway), pytest.raises(ModelError, match=says) as caught:
        export(folder, tmp_path, 2, ranks=[1])
    assert "\n" not in str(caught.value)
    own = tmp_path / "rank-1-of-2"
    assert not list(tmp_path.rglob("*.part")) and not (own / "shard.json").exists()
    with pytest.raises(ModelError, match="unfinished export"):
        open_model(own)
    (made,) = export(folder, tmp_path, 2, ranks=[1])
    assert check(made.folder) and bool(made.kept) is not early


def test_a_journal_cut_off_in_a_line_costs_that_file_alone(folder, midway, tmp_path):
    with largest_file(midway), pytest.raises(ModelError):
        export(folder, tmp_path, 2, ranks=[1])
    journal = tmp_path / "rank-1-of-2" / "export.jsonl"
    whole = journal.read_text()
    assert whole.count("\n") >= 2
    journal.write_text(whole[:-20])
    with largest_file(midway), pytest.raises(ModelError):
        export(folder, tmp_path, 2, ranks=[1])
    assert journal.read_text() == whole
    assert check(export(folder, tmp_path, 2, ranks=[1])[0].folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system is root's")
def test_a_file_system_without_room_is_refused_beforehand(folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this place allows no mounts")
    try:
        with pytest.raises(ModelError, match=r"small has 0\.0 GB free, the export needs .* GB more; free some"):
            export(folder, small, 2)
        assert not list(small.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def command(*words, **options):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "hetero_attn", *map(str, words)], env=env, stderr=subprocess.PIPE, text=True, timeout=120,
                          **options)


def test_commands_say_in_a_line_what_cannot_be_written(folder, tmp_path):
    ran = command("shard", folder, "--tp", 2, "--out", UNWRITABLE)
    assert ran.returncode == 2 and ran.stderr.startswith("hetero-attn: error: writing /sys/hetero-attn failed: ")
    assert ran.stderr.count("\n") == 1
    ran = command("generate", folder, "--prompt", "A", "--restart", "--max-new-tokens", 2, env={"HETERO_ATTN_CACHE_DIR": UNWRITABLE},
                  stdout=subprocess.PIPE)
    assert ran.returncode == 2, ran.stderr
    assert "that --restart would go on from cannot be written to /sys/hetero-attn/restart" in ran.stderr and "Traceback" not in ran.stderr
    (tmp_path / "file").write_text("no folder")
    ran = command("generate", folder, "--prompt", "A", "--restart", "--max-new-tokens", 2, "--tp", 2, stdout=subprocess.PIPE,
                  env={"HETERO_ATTN_CACHE_DIR": str(tmp_path / "file")})
    assert ran.returncode == 2 and "cannot be written to" in ran.stderr, ran.stderr
    assert ran.stderr.count("hetero-attn: error") == 1 and "Traceback" not in ran.stderr, ran.stderr
    with open("/dev/full", "w") as full:
        ran = command("generate", folder, "--prompt", "A", "--max-new-tokens", 2, stdout=full)
    assert ran.returncode == 2 and "hetero-attn: error: No space left on device" in ran.stderr and "Traceback" not in ran.stderr


def test_a_log_that_grows_too_long_is_one_line(tmp_path):
    params = SamplingParams(seed=3)
    log = RestartLog(tmp_path / "log", ["A"], params)
    with largest_file(300), pytest.raises(ModelError, match=r"cannot be written to .*log: (File too large|No space left on device)"):
        for count in range(50):
            log.note_shown(count + 1)
    assert RestartLog(tmp_path / "log", ["A"], params).shown > 0         # the whole lines are still good


def test_a_log_that_cannot_be_removed_is_one_line_after_a_good_run(tmp_path, capsys):
    log = RestartLog(tmp_path / "log", ["A"], SamplingParams(seed=3))
    log.path.unlink()
    forget(log)                                      # gone already: nothing to say
    assert capsys.readouterr().err == ""
    log.path.mkdir()
    with pytest.raises(ModelError, match="log cannot be removed: Is a directory; delete it, the token ids of the text are in it"):
        log.remove()
    forget(log)
    said = capsys.readouterr().err
    assert said.startswith("hetero-attn: ") and said.count("\n") == 1 and "cannot be removed" in said
