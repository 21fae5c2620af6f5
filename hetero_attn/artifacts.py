"""Where compiled things lie: found by name and key, made once, published in one step, swept when unused.

An artifact is one file (a shared object, a cubin) and a small JSON manifest with its SHA-256. A reader goes by the manifest, which is
renamed into place after the file, so that it never meets a half-written one; a damaged file has another sum and counts as absent, since
loading a truncated object kills the process. Makers of one name hold a file lock, which the system drops when they die.
Nothing here knows C++: cubins can lie here too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "HETERO_ATTN_CACHE_DIR"
KEEP_S = 30 * 86400                  # an artifact that nobody used for so long goes when its name is made anew
TOUCH_S = 86400                      # "used" is recorded once a day: loading need not write
LOCK_WAIT_S, LOCK_POLL_S = 1800, 0.02
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Progress = Callable[[str], None]


class CacheError(RuntimeError):
    """The folder cannot be used. The text names it, says why, and what to do."""


def cache_folder() -> Path:
    """$HETERO_ATTN_CACHE_DIR, else $XDG_CACHE_HOME/hetero_attn, else ~/.cache/hetero_attn. It need not exist.

    Raises CacheError where there is no home folder."""
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")              # by its specification a relative path there is to be ignored
    if base and os.path.isabs(base):
        return Path(base) / "hetero_attn"
    try:
        return Path.home() / ".cache" / "hetero_attn"
    except RuntimeError:
        raise CacheError(f"no home folder to keep compiled kernels in; set {VARIABLE} to a folder of yours") from None


@dataclass(frozen=True)
class Artifacts:
    """The artifacts under `folder`, a subfolder for each name.

    private: what lies here gets loaded into the process, so nobody but its user (or root) may have put it there.
    """

    folder: Path
    private: bool = True

    def objection(self) -> str | None:
        """Why artifacts must not be loaded from this folder; None = they may, or it does not exist yet."""
        try:
            found = self.folder.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{self.folder}: {error.strerror}; set {VARIABLE} to a folder of yours"
        if not self.private:
            return None
        if found.st_uid not in (os.geteuid(), 0):
            return f"{self.folder} belongs to user {found.st_uid}, expected you ({os.geteuid()}) or root; set {VARIABLE} to one of yours"
        if found.st_mode & 0o002:
            return f"{self.folder} is writable by everybody, and code is loaded from it; chmod o-w it or set {VARIABLE} to another folder"
        return None

    def keys(self, name: str) -> list[str]:
        """The keys under which there is an artifact of this name, the last used first."""
        dated = []
        for manifest in (self.folder / name).glob("*.json"):
            with contextlib.suppress(OSError):
                dated.append((-manifest.stat().st_mtime, manifest.stem))
        return [key for _, key in sorted(dated)]

    def find(self, name: str, key: str) -> Path | None:
        """The artifact's file, whole and unchanged since it was made; None if there is none, or none that may be used."""
        manifest = self.folder / name / f"{key}.json"
        try:
            facts = json.loads(manifest.read_bytes())
            path = manifest.parent / Path(facts["file"]).name
            whole = hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
            owners, age = {manifest.stat().st_uid, path.stat().st_uid}, time.time() - manifest.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not whole or self.objection() or (self.private and not owners <= {os.geteuid(), 0}):
            return None
        if self.private and age > TOUCH_S:
            with contextlib.suppress(OSError):             # a folder that cannot be written is read all the same
                os.utime(manifest)
        return path

    def facts(self, name: str, key: str) -> dict[str, Any]:
        """What the artifact's maker recorded of it; {} if there is none."""
        try:
            found = json.loads((self.folder / name / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def make(self, name: str, key: str, write: Callable[[Path], tuple[Path, Mapping[str, Any]]], *, force: bool = False,
             progress: Progress | None = None) -> Path:
        """find(name, key), or let `write(scratch folder) -> (file, facts)` make it and publish that.

        Of several processes that ask at once one makes it and the others wait. force: make it even if it is there.
        Raises CacheError, and whatever write raises; then nothing is published.
        """
        if not NAME.fullmatch(name) or not NAME.fullmatch(key):
            raise ValueError(f"artifact {name!r} {key!r}: expected letters, digits and . _ + - in name and key")
        if not force and (found := self.find(name, key)):
            return found
        with self._locked(name, progress) as folder:
            if not force and (found := self.find(name, key)):        # made by the one we waited for
                return found
            self._sweep(folder, key)
            with self._writing():
                scratch = Path(tempfile.mkdtemp(prefix="making-", dir=folder))
            try:
                made, facts = write(scratch)
                return self._publish(folder, key, made, {"name": name, **facts})
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, folder: Path, key: str, made: Path, facts: Mapping[str, Any]) -> Path:
        """The file goes first, under a name that holds its sum: a reader of the older manifest still finds the older file."""
        with self._writing():
            total = hashlib.sha256(made.read_bytes()).hexdigest()
            path, manifest = folder / f"{key}-{total[:12]}{made.suffix}", folder / f"{key}.json"
            draft = made.with_name("manifest")
            draft.write_text(json.dumps({**facts, "key": key, "file": path.name, "sha256": total}, indent=1) + "\n")
            made.replace(path)
            draft.replace(manifest)
        return path

    def _sweep(self, folder: Path, key: str) -> None:
        """Under the lock: what dead makers left, artifacts nobody used for KEEP_S, and files that no manifest names."""
        for leftover in folder.glob("making-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        named = set()
        for manifest in folder.glob("*.json"):
            with contextlib.suppress(OSError):
                if manifest.stem != key and time.time() - manifest.stat().st_mtime > KEEP_S:
                    manifest.unlink()
                else:
                    named.add(self.facts(folder.name, manifest.stem).get("file"))
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".json", ".lock") and file.name not in named:
                with contextlib.suppress(OSError):
                    file.unlink()

    @contextlib.contextmanager
    def _locked(self, name: str, progress: Progress | None) -> Iterator[Path]:
        """The name's folder, held by this process alone. The lock file stays: to remove one that others wait on would give out two."""
        folder = self.folder / name
        with self._writing():
            for each in (self.folder, folder):             # one by one: the mode is not given to parents, and the umask may be 0
                each.mkdir(parents=True, exist_ok=True, mode=0o700 if self.private else 0o777)
        if objection := self.objection():
            raise CacheError(objection)
        with self._writing():
            lock = open(folder / "made.lock", "ab")
        with lock:
            self._acquire(lock, name, progress)
            try:
                yield folder
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)          # a fork made meanwhile holds the same lock: closing ours would not free it

    def _acquire(self, lock, name: str, progress: Progress | None) -> None:
        end, told = time.monotonic() + LOCK_WAIT_S, False
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise CacheError(f"another process has held {lock.name} for {LOCK_WAIT_S} s; stop it, or delete the file") from None
            except OSError as error:
                raise CacheError(f"{lock.name} cannot be locked: {error.strerror}; set {VARIABLE} to a folder on a local disk") from None
            if progress and not told:
                progress(f"waiting for another process that makes {name}")
                told = True
            time.sleep(LOCK_POLL_S)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = f"set {VARIABLE} to a folder of yours that can be written" if self.private else "name a folder that can be written"
            raise CacheError(f"compiled kernels cannot be kept in {self.folder}: {error.strerror}; {remedy}") from None
