"""Folders of files, one sub-folder per class, as WebDataset tars: `<key>.<suffix>` and `<key>.cls` (class index as text).

`images.py`, `texts.py` and `audio.py` have what is special to one kind of file, each as a `Kind`.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np

from potluck.data.packing import Array, Packing, check_class_names, reading, some
from potluck.errors import InvalidData
from potluck.wire.values import DataFormat, Dataset, DataShard
from potluck.wording import counted

BAD_SHARE_LIMIT = 0.01
NAMED_LIMIT = 1000
"""How many skipped items a manifest names."""
LEARNT = frozenset({"train", "training"})
TRIED = frozenset({"val", "valid", "validation", "dev", "eval", "evaluation"})
UNLABELLED = frozenset({"pred"})
PARTS = LEARNT | TRIED | UNLABELLED | {"test", "testing"}
"""Names of folders that hold parts of a set, not classes."""
AROUND = frozenset({"", "data", "image", "images", "img", "seg", "split", "x", "y"})
"""Other words in names of parts, which name no class: `seg_train`, `test_images`."""
LEFT_BEHIND = frozenset({"thumbs.db", "desktop.ini", "__macosx", "__pycache__"})
"""Files that other systems leave in folders, and that are hidden there."""
_CHECKS_AT_ONCE = 1024
_CONVERT = "such files cannot be read: convert it to JPEG or PNG"


class Unusable(Exception):
    """Says why a file cannot be an item."""


@dataclass(frozen=True)
class Item:
    """A file to pack: its key in the set, its class (-1: none), and how to get its bytes."""

    key: str
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Checked:
    """A usable file: its approximate size in a shard, its suffix there (empty: it is encoded again), and the rate of a recording."""

    size: int
    suffix: str
    rate: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of file. `check` checks a whole file, `write` gives (suffix, bytes) for a shard; both raise Unusable."""

    name: Literal["images", "texts", "audio"]
    one: str
    many: str
    suffixes: frozenset[str]
    check: Callable[[bytes], Checked]
    write: Callable[[bytes, Checked], tuple[str, bytes]]
    unread: frozenset[str] = frozenset()
    """Suffixes of files of this kind that cannot be read: they are left out, and named."""


def pack_folder(folder: Path, labels: bool, packing: Packing, kinds: Sequence[Kind]) -> Dataset:
    """Pack class folders with files of one of `kinds`; an empty folder is a class without items, as in Keras. With `labels` False:
    all such files in and below `folder`, without classes; its folders may then have any name.

    Raises InvalidData: no class folders, parts of a set instead of classes, a class with only other files, nothing to pack, several
    kinds, or too many unusable files.
    """
    with reading(folder):
        entries = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
        parts = _parts([path for path in entries if path.is_dir()]) if labels else []
        if parts:
            raise InvalidData(_no_classes(folder, parts))
        files = {path: files_in(path, kinds) for path in entries if path.is_dir()}
    plain = [path for path in entries if path.is_file()]
    direct = [path for path in plain if _is_of(path, kinds)]
    below = [path for found in files.values() for path in found]
    kind, others = _kind_of(folder, (below or direct) if labels else direct + below, kinds, labels)
    beside = [path for path in direct if _is_of(path, [kind])]
    unread = unread_in(folder, kind)
    convert = [f"{_text(path.relative_to(folder).as_posix())}: {_CONVERT}" for path in unread]
    unknown = {path: _unknown_in(path, kinds) for path in files}
    links = {path: _links_in(path) for path in files}
    left_out = others.union(set(plain) - set(beside) - set(unread), *unknown.values())
    nowhere = [path for path in entries if path.is_symlink() and not path.exists()]
    unfollowed = [*nowhere, *chain.from_iterable(links.values())]
    remarks = [*_about_files(left_out, folder), *_about_links(unfollowed, folder)]
    if not labels:
        every = [_item(path, folder, -1) for path in sorted({*beside, *below} - others)]
        return pack_items(kind, every, (), packing, left_out=convert, remarks=remarks)
    empty: list[str] = []
    items: list[Item] = []
    classes: list[str] = []
    for class_folder, found in files.items():
        of_class = [_item(path, folder, len(classes)) for path in found if path not in others]
        unread_text = _unread_text(class_folder, [kind])
        if not of_class and (found or unread_text or unknown[class_folder] or links[class_folder] or not below):
            links_text = "; links to folders are not followed" if links[class_folder] else ""
            raise InvalidData(
                f"class folder {class_folder} has no {kind.many} ({_suffixes([kind])}){unread_text}{links_text}: add some, or remove the folder"
            )
        if not of_class:
            empty.append(_text(class_folder.name))
        classes.append(_text(class_folder.name))
        items += of_class
    if not items:
        raise InvalidData(
            f"{folder} has {counted(len(beside), kind.one, kind.many)} but no class folders: put each {kind.one} into a folder named for its class"
        )
    skipped = [f"{_text(path.name)}: is not in a class folder" for path in beside]
    if empty:
        remarks.append(
            f"{counted(len(empty), 'class folder')} empty, but still a class (remove a folder that is no class): {some(empty)}"
        )
    check_class_names(classes, str(folder))
    return pack_items(kind, items, classes, packing, skipped, convert, remarks)


def unread_in(folder: Path, kind: Kind) -> list[Path]:
    """Files below `folder` that have a suffix of this kind but cannot be read."""
    return files_in(folder, [replace(kind, suffixes=kind.unread)])


def _parts(folders: Sequence[Path]) -> list[Path]:
    """The folders that are parts of a set, by their names; then no folder is a class. Empty where they are classes.

    Folders named exactly like parts must be two or more. Folders with other words in their names are parts only if all of them are, and
    of different parts (`test1` and `test2` may be classes); a folder that is alone is a part if it has sub-folders.
    """
    parts = [path for path in folders if path.name.casefold() in PARTS]
    if len(parts) > 1:
        return parts
    words = {_part(path.name) for path in folders}
    alone = len(folders) == 1 and any(path.is_dir() and not _is_hidden(path.name) for path in folders[0].iterdir())
    return list(folders) if "" not in words and (len(words) > 1 or alone) else []


def _part(name: str) -> str:
    """The part of a set that this folder name means: "train" for `train_images2`. Empty where it has words that mean something else."""
    words = [word.removesuffix("set") for word in re.findall(r"[^\W\d_]+", name.casefold())]
    return next((word for word in words if word in PARTS), "") if PARTS.union(AROUND).issuperset(words) else ""


def _no_classes(folder: Path, parts: Sequence[Path]) -> str:
    """An error for a folder one level too high: it names the parts and what to type."""
    names = " and ".join(_text(path.name) for path in parts)
    what = f"is a part of a data set, not a class: give {parts[0]}"
    if len(parts) > 1:
        what = "are parts of a data set, not classes: give one of them"
    learnt = next((path for path in parts if _part(path.name) in LEARNT), None)
    held_out = min(
        (path for path in parts if _part(path.name) not in LEARNT | UNLABELLED),
        key=lambda path: _part(path.name) not in TRIED,
        default=None,
    )
    if learnt is None or held_out is None:
        return f"{folder}: {names} {what}"
    return (
        f"{folder}: {names} {what}. To train: potluck train MODEL {shlex.quote(str(learnt))} --validation "
        f"{shlex.quote(str(held_out))} (in Python: client.train(model, {str(learnt)!r}, validation={str(held_out)!r}))"
    )


def pack_items(
    kind: Kind,
    items: Sequence[Item],
    classes: Sequence[str],
    packing: Packing,
    skipped: Sequence[str] = (),
    left_out: Sequence[str] = (),
    remarks: Sequence[str] = (),
) -> Dataset:
    """Check every file, and pack the usable ones. Raises InvalidData when more than 1 % are unusable.

    `skipped` count as unusable files. `left_out` are named with them, but do not count. `remarks` go into the manifest.
    """
    total = len(items)
    threads = min(8, (os.cpu_count() or 1) + 2)
    with ThreadPoolExecutor(threads, thread_name_prefix="ThreadPoolExecutor-files") as pool:
        kept: list[tuple[Item, Checked]] = []
        bad = list(skipped)
        for done, (item, result) in enumerate(_checked(kind, items, pool), 1):
            if isinstance(result, Checked):
                kept.append((item, result))
            else:
                bad.append(f"{item.key}: {result}")
            if done % 100 == 0 or done == total:
                packing.progress(done // 2, total)
        kept, rate = _at_one_rate(kept, bad)
        labels = _usable(kind, items, kept, bad, classes)
        order = packing.order(labels, len(kept)).tolist()
        shards: list[DataShard] = []
        for start, stop in packing.cuts([kept[place][1].size for place in order]):
            part = [kept[place] for place in order[start:stop]]
            files = pool.map(lambda pair: _shard_file(kind, *pair), part)
            shards.append(
                DataShard(blob=packing.put(_tar(files, [item.label for item, _ in part], start)), count=len(part))
            )
            packing.progress(total // 2 + (total - total // 2) * stop // len(order), total)
    described = DataFormat(kind=kind.name, classes=tuple(classes), rate=rate)
    keys = [kept[place][0].key for place in order]
    return packing.dataset(described, shards, keys, labels, [*bad, *left_out][:NAMED_LIMIT], remarks)


def _kind_of(folder: Path, files: Sequence[Path], kinds: Sequence[Kind], labels: bool) -> tuple[Kind, set[Path]]:
    """The kind of most files, and the files of other kinds. Raises InvalidData without files, and for a mixture.

    A few files of another kind are no mixture (notes in a folder of images): one file, or up to 1 %, is left out.
    """
    found = {kind.name: [path for path in files if _is_of(path, [kind])] for kind in kinds}
    kind = max(kinds, key=lambda kind: len(found[kind.name]))
    if not found[kind.name]:
        raise InvalidData(
            f"{folder} has no {'class folders with ' if labels else ''}{', '.join(kind.many for kind in kinds)}: "
            f"expected {folder}/{'<class>/' if labels else ''}<file> ({_suffixes(kinds)}){_unread_text(folder, kinds)}"
        )
    others = {path for name, paths in found.items() if name != kind.name for path in paths}
    if len(others) > max(1, len(files) * BAD_SHARE_LIMIT) or 2 * len(others) >= len(files):
        counts = ", ".join(
            f"{counted(len(found[kind.name]), kind.one, kind.many)} (such as {_text(found[kind.name][0].relative_to(folder).as_posix())})"
            for kind in kinds
            if found[kind.name]
        )
        raise InvalidData(
            f"{folder} is a mixture of {counts}: a data set holds one kind; move the others to another folder"
        )
    return kind, others


def _at_one_rate(kept: list[tuple[Item, Checked]], bad: list[str]) -> tuple[list[tuple[Item, Checked]], int]:
    """The items with the most frequent rate, and that rate; the others are added to `bad`."""
    rates = Counter(checked.rate for _, checked in kept)
    if len(rates) < 2:
        return kept, next(iter(rates), 0)
    rate = max(rates, key=lambda rate: (rates[rate], -rate))
    bad += [
        f"{item.key}: has {checked.rate} samples a second, but most have {rate}: resample it"
        for item, checked in kept
        if checked.rate != rate
    ]
    return [(item, checked) for item, checked in kept if checked.rate == rate], rate


def _usable(
    kind: Kind,
    items: Sequence[Item],
    kept: Sequence[tuple[Item, Checked]],
    bad: Sequence[str],
    classes: Sequence[str],
) -> Array:
    """The labels of the items to pack. Raises InvalidData when too few are usable."""
    count = len(kept) + len(bad)
    if len(bad) > count * BAD_SHARE_LIMIT:
        shown = "; ".join(bad[:5]) + ("; ..." if len(bad) > 5 else "")
        raise InvalidData(
            f"{len(bad)} of {counted(count, kind.one, kind.many)} cannot be used (1 % may be skipped): {shown}"
        )
    left = {item.label for item, _ in kept}
    for label in sorted({item.label for item in items} - left):
        raise InvalidData(f"class {classes[label]!r} has no {kind.one} that can be decoded")
    return np.asarray([item.label for item, _ in kept], np.int64)


def _checked(kind: Kind, items: Sequence[Item], pool: ThreadPoolExecutor) -> Iterator[tuple[Item, Checked | str]]:
    rest = iter(items)
    while some := list(islice(rest, _CHECKS_AT_ONCE)):
        yield from zip(some, pool.map(lambda item: _check(kind, item), some), strict=True)


def _check(kind: Kind, item: Item) -> Checked | str:
    """What a shard needs to know of a usable file; else the reason why it is unusable."""
    try:
        data = item.read()
        return kind.check(data) if data else "an empty file"
    except (Unusable, OSError, LookupError) as error:
        return str(error) or type(error).__name__


def _shard_file(kind: Kind, item: Item, checked: Checked) -> tuple[str, bytes]:
    """(suffix, bytes) for a shard. Raises InvalidData for a file that has changed since it was checked."""
    try:
        return kind.write(item.read(), checked)
    except (Unusable, OSError, LookupError) as error:
        raise InvalidData(f"{item.key} changed while it was packed: {error}") from error


def _tar(files: Iterator[tuple[str, bytes]], labels: Sequence[int], first: int) -> bytes:
    """A tar whose bytes depend only on its items: no times, no owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for number, ((suffix, data), label) in enumerate(zip(files, labels, strict=True), first):
            add(f"{number:09}.{suffix}", data)
            if label >= 0:
                add(f"{number:09}.cls", str(label).encode())
    return buffer.getvalue()


def _is_of(path: Path, kinds: Sequence[Kind]) -> bool:
    return any(path.suffix.lower() in kind.suffixes for kind in kinds)


def files_in(folder: Path, kinds: Sequence[Kind]) -> list[Path]:
    """All files of these kinds below `folder`, at any depth, without hidden files and folders."""
    return sorted(path for path in _visible(folder) if _is_of(path, kinds) and path.is_file())


def _unknown_in(folder: Path, kinds: Sequence[Kind]) -> list[Path]:
    """All other files below `folder`, without hidden ones."""
    return sorted(path for path in _visible(folder) if _is_unknown(path, kinds) and path.is_file())


def _links_in(folder: Path) -> list[Path]:
    """Links below `folder` to folders, or to nothing. They are not followed: they could lead in circles."""
    return sorted(path for path in _visible(folder) if path.is_symlink() and not path.is_file())


def _visible(folder: Path) -> Iterator[Path]:
    """Everything below `folder`, without hidden files and folders and without what is behind these or behind links to folders."""
    return (path for path in folder.rglob("*") if not any(map(_is_hidden, path.relative_to(folder).parts)))


def _is_unknown(path: Path, kinds: Sequence[Kind]) -> bool:
    suffix = path.suffix.lower()
    return not any(suffix in kind.suffixes or suffix in kind.unread for kind in kinds)


def _about_files(left_out: Iterable[Path], folder: Path) -> list[str]:
    """A sentence about files of other kinds; none where there are no such files."""
    if not (left_out := sorted(left_out)):
        return []
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in left_out)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
    names = some([_text(path.relative_to(folder).as_posix()) for path in left_out])
    return [
        f"{counted(len(left_out), 'file')} of other kinds left out ({counts}{', ...' if len(suffixes) > 5 else ''}): {names}"
    ]


def _about_links(links: Sequence[Path], folder: Path) -> list[str]:
    """A sentence about links that were not followed; none where there are no such links."""
    if not links:
        return []
    names = some([_text(path.relative_to(folder).as_posix()) for path in links])
    return [
        f"{counted(len(links), 'link')} to folders or to nothing left out (replace a link by a copy to include its files): {names}"
    ]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in LEFT_BEHIND


def _unread_text(folder: Path, kinds: Sequence[Kind]) -> str:
    """For an error about a folder without readable files: names those that cannot be read; empty where there are none."""
    found = [path for kind in kinds for path in unread_in(folder, kind)]
    if not found:
        return ""
    return (
        f"; {len(found)} in other formats, such as {_text(found[0].name)}, cannot be read: convert them to JPEG or PNG"
    )


def _item(path: Path, folder: Path, label: int) -> Item:
    return Item(_text(path.relative_to(folder).as_posix()), label, path.read_bytes)


def _text(name: str) -> str:
    """A file's name as text, even if it is not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _suffixes(kinds: Sequence[Kind]) -> str:
    return ", ".join(sorted(suffix for kind in kinds for suffix in kind.suffixes))
