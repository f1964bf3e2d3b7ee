"""The package as it would be published: built, looked through, installed and used: `python -m tests.package`."""

from __future__ import annotations

import email
import email.message
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NAME = "llama_index_milvus_async_ext"
MOST_BYTES = 2_000_000  # of the source archive, most of which are the pictures of the measurements
_TARGETS = re.compile(r"\]\(([^)\s]+)|^\[[^\]]+\]:\s*(\S+)|\b(?:src|srcset|href)=[\"']([^\"']+)", re.MULTILINE)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def run(*command: str | Path, cwd: Path = REPOSITORY) -> str:
    """What a program prints, which must end well. It sees nothing of this interpreter's own packages."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def links_of(page: str) -> list[str]:
    return ["".join(found) for found in _TARGETS.findall(_CODE.sub("", page))]


def checked_metadata(wheel: Path, source: Path) -> email.message.Message:
    """The wheel's metadata, if wheel and source archive hold what they should, and every link leads somewhere."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [name] = [each for each in names if each.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    folder = name.removesuffix("/METADATA")
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / NAME).rglob("*.py")}
    about = {f"{folder}/{each}" for each in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert set(names) == modules | about | {f"{NAME}/py.typed"}, sorted(set(names) ^ modules)

    with tarfile.open(source) as archive:
        kept = {each.partition("/")[2] for each in archive.getnames()}
    if (REPOSITORY / ".git").exists():
        ours = set(run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines())
        assert kept - {"PKG-INFO"} <= ours, f"not of the repository: {sorted(kept - ours)}"
    for needed in ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "hatch_build.py", "tests/smoke.py"):
        assert needed in kept, f"{needed} is not in {source.name}"
    assert source.stat().st_size < MOST_BYTES, f"{source.name} has {source.stat().st_size:,} bytes"

    repository = dict(url.split(", ") for url in metadata.get_all("Project-URL", []))["Repository"]
    page = metadata.get_payload()
    assert isinstance(page, str)
    links = links_of(page)
    assert links, "the README has no links, or they were not found"
    for link in links:
        assert link.startswith(("https://", "http://", "mailto:", "#")), f"the README links to {link}, beside itself"
        if link.startswith(repository):
            path = re.sub(r"^/(blob|raw)/HEAD/", "", link.removeprefix(repository)).partition("#")[0]
            assert (REPOSITORY / path.lstrip("/")).exists(), f"the README links to {path}, which is not there"
    pictures = [link for link in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", page) if link.startswith(repository)]
    assert not [link for link in pictures if "/blob/" in link], "a picture's link leads to a page about the picture"
    return metadata


def main() -> None:
    python = Path(sys.executable)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Without --wheel, the wheel is made from the source archive.
        run(python, "-m", "build", "--installer", "uv", "--outdir", folder, REPOSITORY)
        [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
        run(python, "-m", "twine", "check", "--strict", wheel, source)
        metadata = checked_metadata(wheel, source)
        print(f"{source.name} {source.stat().st_size:,} bytes, {wheel.name} {wheel.stat().st_size:,} bytes: in order")

        empty = folder / "empty"
        run(python, "-m", "uv", "venv", "--quiet", "--python", python, empty)
        inside = empty / ("Scripts" if os.name == "nt" else "bin") / "python"
        run(python, "-m", "uv", "pip", "install", "--quiet", "--link-mode", "copy", "--python", inside, wheel)
        run(python, "-m", "uv", "pip", "check", "--python", inside)
        version = run(inside, "-I", REPOSITORY / "tests" / "smoke.py", cwd=folder).strip()
        assert version == metadata["Version"], f"{version} was installed, and {metadata['Version']} was built"
        print(f"{metadata['Name']} {version} is installed in an empty environment, writes, searches and deletes")


if __name__ == "__main__":
    main()
