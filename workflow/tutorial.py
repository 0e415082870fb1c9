"""Follow docs/tutorial.md as a reader does: write its files, type its commands. `make docs-run` runs it whole."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
_FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# What of a checkout its commands need, beside the package.
_FOLDERS = ("configs", "workflow", "data/prompts", "data/demo-generator")
_FILES = ("Snakefile", "requirements.lock", "CITATION.cff", "local")


@dataclass(frozen=True)
class Step:
    """A fenced block of the page.

    Attributes:
        language: `bash` is typed, `python` without a file is run; a block without a language is for the reader alone.
        file: where its content is written, if it names a file.
        content: the text.
    """

    language: str
    file: str | None
    content: str


def steps(page: Path = PAGE) -> Iterator[Step]:
    """The page's blocks, in order."""
    for language, file, content in _FENCE.findall(page.read_text(encoding="utf-8")):
        yield Step(language, file or None, content)


def checkout(folder: Path) -> None:
    """A folder with what a checkout holds, to follow the page in.

    Raises:
        FileExistsError: there is one already.
    """
    folder.mkdir(parents=True)
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    for name in _FILES:
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def follow(folder: Path, replaced: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Do what the page says, in one shell, as its reader would.

    Args:
        folder: a `checkout`.
        replaced: texts of the page and what stands in their place, such as a smaller number of updates.
        environment: of the shell.

    Raises:
        ValueError: a text to be replaced is not on the page.
        subprocess.CalledProcessError: a command failed.
    """
    lines = ["set -euo pipefail"]
    seen = set()
    for number, step in enumerate(steps()):
        content = step.content
        for old, new in replaced.items():
            if old in content:
                seen.add(old)
                content = content.replace(old, new)
        if step.file:
            lines.append(f"mkdir -p {Path(step.file).parent}\ncat > {step.file} <<'END_OF_FILE'\n{content}END_OF_FILE")
        elif step.language == "bash":
            lines.append(content)
        elif step.language == "python":
            lines.append(f"cat > step{number}.py <<'END_OF_FILE'\n{content}END_OF_FILE\npython step{number}.py")
    if absent := set(replaced) - seen:
        raise ValueError(f"{PAGE}: does not say {', '.join(map(repr, sorted(absent)))}")
    subprocess.run(["bash", "-c", "\n".join(lines)], cwd=folder, env=dict(environment), check=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    checkout(place)
    follow(place, {}, os.environ)
