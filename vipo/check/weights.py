"""Lines on weights and tokenizers: where they are, whether they are whole, and which commit they are of."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from vipo.check.hub import (
    Refused,
    Told,
    ask,
    cached_commit,
    fetch_command,
    missing_files,
    named,
    snapshot_of,
)
from vipo.check.line import Line, ok, to_do
from vipo.check.wanted import Wanted


def weight_lines(items: Iterable[Wanted], root: Path, online: bool) -> Iterator[Line]:
    """A line for each thing that is wanted, and one more where its commit is not pinned.

    Args:
        items: of an experiment, each once.
        root: repository root, where relative paths start.
        online: whether the hub may be asked.
    """
    for item in items:
        place = item.local(root)
        if place is not None:
            yield _here(item, place)
        elif item.repository is None:
            yield to_do(
                item.what,
                f"{item.field} {item.written!r}: no such file or folder; put it there, or name it",
            )
        else:
            yield from _on_hub(item, online)


def _here(item: Wanted, place: Path) -> Line:
    if missing := missing_files(item, place):
        return to_do(item.what, f"{place} lacks {named(missing)}; copy it again, or name another folder")
    return ok(item.what, str(place))


def _on_hub(item: Wanted, online: bool) -> Iterator[Line]:
    told: Told | None = None
    refused = ""
    if online:
        try:
            told = ask(str(item.repository), item.revision or "main")
        except Refused as error:
            refused = str(error)
    commit = item.revision or (None if told is None else told.commit)
    folder = snapshot_of(item)
    missing = None if folder is None else missing_files(item, folder, cached=True)
    if folder is not None and not missing:
        yield ok(item.what, f"{item.repository} in the cache: {folder}" + (f"; {refused}" if refused else ""))
    elif refused:
        yield to_do(item.what, refused)
    else:
        yield to_do(item.what, _to_fetch(item, commit, missing, told))
    if item.revision is None and item.revision_field is not None:
        yield to_do(f"{item.what}: revision", _to_pin(item, told))


def _to_fetch(item: Wanted, commit: str | None, missing: list[str] | None, told: Told | None) -> str:
    absent = "is not in the cache" if missing is None else f"lacks {named(missing)} in the cache"
    if told is not None and item.is_pipeline and (alone := told.parts_of_variants(item)):
        fetched = f"hf download {item.repository} --revision {told.commit} --local-dir FOLDER"
        why = f"weights of {named(alone)} are variants, which are read from a folder alone"
        return f"{item.repository} {absent}: {why}: {fetched}, and name the folder"
    access = "" if told is None else f" ({told.size(item) / 2**30:.1f} GiB{', gated: you have access' * told.gated})"
    hint = "" if told is not None else " (if it is gated: accept its terms on its page, then 'hf auth login')"
    return f"{item.repository} {absent}: {fetch_command(item, commit)}{access}{hint}"


def _to_pin(item: Wanted, told: Told | None) -> str:
    commit = told.commit if told is not None else cached_commit(str(item.repository), "main")
    where = f"{item.override}.{item.revision_field}" if item.override else f"{item.revision_field} beside {item.field}"
    if commit is None:
        return f"no commit of {item.repository} is named: vipo check ... --online --pin FILE writes {where}"
    return f"no commit of {item.repository} is named: {where}={commit}, or --pin FILE writes it"


def commits(
    items: Iterable[Wanted], root: Path, branch: str, online: bool
) -> tuple[dict[tuple[str, str], str], list[Line]]:
    """The commits that a branch stands for of what names none, by the key and the text that name the repository.

    Args:
        items, root: as of `weight_lines`.
        branch: or tag.
        online: ask the hub; else the branch is what it was when it was last fetched.

    Returns:
        Commits, and a line for each repository of which none is known.
    """
    found: dict[tuple[str, str], str] = {}
    lines = []
    for item in items:
        if item.repository is None or item.revision is not None or item.revision_field is None:
            continue
        if item.local(root) is None:
            try:
                commit = ask(item.repository, branch).commit if online else cached_commit(item.repository, branch)
            except Refused as error:
                lines.append(to_do(f"{item.what}: pinned", str(error)))
                continue
            if commit is None:
                told = f"{item.repository}: its branch {branch!r} was never fetched here; add --online"
                lines.append(to_do(f"{item.what}: pinned", told))
            else:
                found[item.field, item.written] = commit
    return found, lines
