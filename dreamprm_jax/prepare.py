"""`task=prepare`: raw files -> a TFDS data set of ArrayRecord shards, in several processes, resumable, with a report.

1. cut     the raw files into parts of whole rows (`data/raw.py`)
2. scan    every part: rows checked, named, grouped (`data/passes.py`)
3. choose  the rows: copies out, a seeded sample, balanced over strata (`data/choice.py`)
4. look    at the chosen rows' images; where some are broken, choose again without those rows
5. write   a shard for each few parts, then metadata and report

Each pass leaves a file a part in OUTPUT/BUILDER/VERSION.work, so that a killed command goes on where it was. The set
is the same to the byte for any number of processes and kills; it has its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dreamprm_jax.data import builders, passes, prepared, raw
from dreamprm_jax.data.bad_rows import OnError
from dreamprm_jax.data.choice import choose, first_of_each
from dreamprm_jax.data.passes import BAD, Dropped, Settings
from dreamprm_jax.errors import InputError, printable
from dreamprm_jax.workers import Task, open_workers, run_tasks

SHARD_ROWS = 1024
"""A shard takes whole parts until it has so many rows."""

DROPPED_FILE, RECORD_FILE = "dropped.jsonl", "prepare.json"


class Table(NamedTuple):
    """The N rows that can be used, of all parts, in their order."""

    part: np.ndarray  # int64 [N]
    row: np.ndarray  # int64 [N]: number in its file
    key: np.ndarray  # uint64 [N]
    verdict: np.ndarray  # uint32 [N]: equal for copies that agree
    stratum: np.ndarray  # int64 [N]: by the order of their names
    source: np.ndarray  # int64 [N]: index into `sources`
    sources: list[str]


def run_prepare(cfg: Any, workdir: Path) -> dict[str, Any]:
    """Prepares the set that the config describes.

    Args:
      cfg: its `prepare` and `seed` are read.
      workdir: the output, where `prepare.output` is None.

    Returns:
      The report without its lists of files and shards; the directory; seconds.

    Raises:
      InputError: raw files that cannot be used, too many bad rows, an output of other options or in use.
    """
    began = time.monotonic()
    options = cfg.prepare
    source = _source(options)
    files = builders.row_files(source)
    directory = Path(options.output or workdir) / source.builder / prepared.VERSION
    work = directory.with_name(directory.name + ".work")
    cut = [raw.cut(name, path, raw.PART_ROWS) for name, path in files.items()]
    record = _record(cfg, source, cut)
    if directory.exists():
        report = _finished(directory, record)
        shutil.rmtree(work, ignore_errors=True)
        print(f"{directory}: was finished before", file=sys.stderr)
        return _summary(report, directory)
    with _full_disk_named(directory), _claimed(work, record), open_workers(options.processes) as workers:
        settings = Settings(source, work, cfg.seed, options.balance)
        _write_excluded(options, work)
        parts = [(part, files[file.name]) for file in cut for part in file.parts]
        if not parts:
            raise InputError(f"{source.source}: no rows; the files are empty")
        report = _prepare(cfg, settings, parts, record, directory, workers)
    shutil.rmtree(work)
    seconds = time.monotonic() - began
    print(_table(report, directory, seconds), file=sys.stderr)
    return {**_summary(report, directory), "seconds": round(seconds, 1)}


@contextlib.contextmanager
def _full_disk_named(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{directory}: cannot be written ({error}); make room, and the same command goes on"
        ) from error


def _summary(report: dict, directory: Path) -> dict[str, Any]:
    """The report without its long lists."""
    return {"directory": str(directory)} | {
        name: value for name, value in report.items() if name not in ("files", "shards", "by_source")
    }


def _source(options: Any) -> builders.Source:
    if options.source is None:
        raise InputError("--config.prepare.source is missing: give the raw files, one or a directory of them")
    return builders.Source(**{name: options[name] for name in builders.Source._fields})


def _prepare(
    cfg: Any, settings: Settings, parts: list[tuple], record: dict, directory: Path, workers: Sequence[Executor]
) -> dict[str, Any]:
    """Passes 2 to 5; returns the report."""
    options = cfg.prepare
    tasks = [
        Task(_part_name(part), part.rows, (settings, index, part, path)) for index, (part, path) in enumerate(parts)
    ]
    run_tasks(workers, "scan", passes.scan, tasks)
    table, dropped = _read_scans(settings.work, parts)
    num_read = sum(part.rows for part, _ in parts)
    on_error = OnError(cfg.data.on_error, cfg.data.max_bad_share)
    error = _too_bad(dropped, num_read, on_error, settings.work)
    if error:
        _forget(settings.work)
        raise error
    repeats = settings.source.builder in builders.REPEATING_BUILDERS
    copies = np.zeros(len(table.key), bool) if repeats else ~first_of_each(table.key)
    dropped += _copies(table, copies, parts)
    strays = builders.count_strays(settings.source)
    chosen, more = _look(settings, parts, table, ~copies, options.sample, on_error, workers)
    dropped += more
    if not len(chosen):
        first = f" (the first: {dropped[0].reason})" if dropped else ""
        raise InputError(f"{settings.source.source}: no row is left; {_by_kind(dropped)}{first}")
    incomplete = directory.with_name(directory.name + prepared.UNFINISHED)
    shards = _write(settings, parts, table, chosen, incomplete, workers)
    report = _report(record, num_read, table, dropped, options.sample, shards)
    if strays:
        report["responses_without_question"] = strays
    _finish(settings.source.builder, incomplete, report, [shard.shard for shard in shards], sorted(dropped))
    os.replace(incomplete, directory)
    return report


# --- The output: one command at a time, the same options throughout.


def _record(cfg: Any, source: builders.Source, cut: list[raw.RawFile]) -> dict[str, Any]:
    """All that the set follows from, but for the images: reading those again would take as long as preparing."""
    options = {name: cfg.prepare[name] for name in ("exclude", "sample", "balance")}
    files = [{"name": f.name, "rows": f.rows, "sha256": f.sha256} for f in (*cut, *_besides(cfg, source))]
    return {"options": {**source._asdict(), "seed": cfg.seed, **options}, "files": files}


def _besides(cfg: Any, source: builders.Source) -> Iterator[raw.RawFile]:
    """What the rows follow from beside their own files: questions or responses, and what is excluded."""
    others = {"exclude": cfg.prepare.exclude}
    others |= {"questions": source.source} if source.builder == "mmmu_pro" else {"responses": source.responses}
    for what, path in others.items():
        if path and prepared.is_prepared(path):
            yield raw.RawFile(f"{what}: {path}", 0, prepared.fingerprint(path), ())
        elif path:
            for name, file in raw.find_files(path).items():
                yield raw.cut(name, file)._replace(name=f"{what}: {name}")


def _finished(directory: Path, record: dict) -> dict[str, Any]:
    path = directory / prepared.REPORT
    if not path.is_file():
        raise InputError(f"{directory}: is there, but not of prepare (no {prepared.REPORT}); give another output")
    report = json.loads(path.read_text(encoding="utf-8"))
    _check_same(directory, report, record)
    return report


def _check_same(place: Path, old: dict, new: dict) -> None:
    advice = "give another --config.prepare.output, or remove this one to start over"
    for name, value in new["options"].items():
        if old["options"].get(name) != value:
            raise InputError(f"{place}: was begun with {name}={old['options'].get(name)}, now {name}={value}; {advice}")
    before, now = ({file["name"]: file["sha256"] for file in record["files"]} for record in (old, new))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            what = "is new" if name not in before else "is gone" if name not in now else "has changed"
            raise InputError(f"{place}: {name} {what} since it was begun; {advice}")


@contextlib.contextmanager
def _claimed(work: Path, record: dict) -> Iterator[None]:
    """Makes `work` this command's own, or goes on with what the same one left in it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise InputError(f"{work}: cannot be written ({error}); give another --config.prepare.output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{work}: another command is preparing this set; wait for it") from error
        path = work / RECORD_FILE
        if path.is_file():
            _check_same(path, json.loads(path.read_text(encoding="utf-8")), record)
        else:
            passes.write_json(path, record)
        yield


def _write_excluded(options: Any, work: Path) -> None:
    """The questions that must not come in, for the passes."""
    path = work / passes.EXCLUDED_FILE
    if path.is_file():
        return
    questions = builders.read_all_questions(options.exclude, None) if options.exclude else ()
    ids, texts, pixels = [], [], set()
    for question in questions:
        if isinstance(question, InputError):
            raise question
        if not question.id.isdecimal():  # a number is but the place in a file without ids
            ids.append(question.id)
        texts.append(builders.text_to_exclude(question))
        pixels |= {prepared.pixel_hash(image, question.place) for image in question.images}
    passes.write_json(path, {"ids": ids, "texts": texts, "pixels": sorted(pixels)})


# --- Choosing.


def _read_scans(work: Path, parts: list[tuple]) -> tuple[Table, list[Dropped]]:
    scans = [passes.read_scan(work, index) for index in range(len(parts))]
    names = sorted({name for scan in scans for name in scan.names})
    number = {name: index for index, name in enumerate(names)}

    def column(field: str) -> np.ndarray:
        """Indices into the parts' own names become indices into all."""
        own = [np.array([number[name] for name in scan.names], np.int64) for scan in scans]
        return np.concatenate([names[scan.rows[field]] for names, scan in zip(own, scans, strict=True)])

    rows = np.concatenate([scan.rows for scan in scans])
    part = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans])
    table = Table(part, rows["row"], rows["key"], rows["verdict"], column("stratum"), column("source"), names)
    return table, [row for scan in scans for row in scan.dropped]


def _copies(table: Table, copies: np.ndarray, parts: list[tuple]) -> list[Dropped]:
    (found,) = np.nonzero(copies)
    order = np.argsort(table.key, kind="stable")
    first = order[np.searchsorted(table.key[order], table.key[found])]
    return [
        Dropped(
            parts[table.part[i]][0].file,
            int(table.row[i]),
            "duplicate" if table.verdict[i] == table.verdict[j] else "duplicate with other labels",
            f"of {_place(table, j, parts)}",
        )
        for i, j in zip(found, first, strict=True)
    ]


def _place(table: Table, index: int, parts: list[tuple]) -> str:
    return f"{parts[table.part[index]][0].file} row {table.row[index]}"


def _look(
    settings: Settings,
    parts: list[tuple],
    table: Table,
    usable: np.ndarray,
    sample: int | None,
    on_error: OnError,
    workers: Sequence[Executor],
) -> tuple[np.ndarray, list[Dropped]]:
    """The rows taken, by position in `table`: chosen, looked at, and chosen again until all their images are whole."""
    usable, looked = usable.copy(), np.zeros(len(usable), bool)
    dropped: list[Dropped] = []
    for turn in range(len(usable) + 1):
        (positions,) = np.nonzero(usable)
        chosen = positions[choose(table.key[positions], _dense(table.stratum[positions]), sample)]
        by_part = _by_part(table, chosen[~looked[chosen]])
        if not by_part:
            break
        tasks = [
            Task(_part_name(parts[i][0]), len(rows), (settings, turn, i, *parts[i], rows))
            for i, rows in by_part.items()
        ]
        run_tasks(workers, "images", passes.look, tasks)
        looked[chosen] = True
        for i in by_part:
            found = passes.read_look(settings.work, turn, i)
            dropped += found
            usable &= ~((table.part == i) & np.isin(table.row, [row.row for row in found]))
        error = _too_bad(dropped, int(looked.sum()), on_error, settings.work)
        if error:
            raise InputError(f"{error}. Where images have been mended, remove {settings.work} first") from error
    return chosen, dropped


def _dense(strata: np.ndarray) -> np.ndarray:
    return np.unique(strata, return_inverse=True)[1]


def _by_part(table: Table, positions: np.ndarray) -> dict[int, np.ndarray]:
    """The row numbers at these positions, by part."""
    parts = table.part[positions]
    return {int(part): table.row[positions[parts == part]] for part in np.unique(parts)}


def _too_bad(dropped: list[Dropped], num_rows: int, on_error: OnError, work: Path) -> InputError | None:
    """The error where bad rows are not to be skipped, or are too many of `num_rows`."""
    bad = [row for row in dropped if row.kind.startswith(BAD)]
    if not bad or (on_error.action == "skip" and len(bad) <= on_error.max_share * num_rows):
        return None
    path = work / DROPPED_FILE
    path.write_text(_lines(bad), encoding="utf-8")
    first = f"{bad[0].file} row {bad[0].row}: {bad[0].reason}"
    if on_error.action == "raise":
        return InputError(first + (f" (and {len(bad) - 1} more bad rows: {path})" if len(bad) > 1 else ""))
    return InputError(
        f"{len(bad)} of {num_rows} rows cannot be used ({_by_kind(bad)}), more than --config.data.max_bad_share="
        f"{on_error.max_share}; all are in {path}, the first is {first}"
    )


def _forget(work: Path) -> None:
    """Leaves the list of bad rows alone: they or the options will be mended, and a scan is soon done again."""
    for path in work.iterdir():
        if path.name not in ("lock", DROPPED_FILE) and path.is_file():
            path.unlink()


def _by_kind(dropped: list[Dropped]) -> str:
    counts = Counter(row.kind for row in dropped)
    return ", ".join(f"{kind}: {count}" for kind, count in counts.most_common()) or "the files are empty"


# --- Writing.


def _write(
    settings: Settings,
    parts: list[tuple],
    table: Table,
    chosen: np.ndarray,
    directory: Path,
    workers: Sequence[Executor],
) -> list[passes.Written]:
    directory.mkdir(parents=True, exist_ok=True)
    groups = _shards(_by_part(table, chosen))
    names = [prepared.shard_name(settings.source.builder, i, len(groups)) for i in range(len(groups))]
    tasks = []
    for name, group in zip(names, groups, strict=True):
        rows = [(*parts[i], numbers) for i, numbers in group.items()]
        tasks.append(Task(name, sum(map(len, group.values())), (settings, directory, name, rows)))
    run_tasks(workers, "write", passes.write, tasks)
    return [passes.read_written(settings.work, name) for name in names]


def _shards(by_part: dict[int, np.ndarray]) -> list[dict[int, np.ndarray]]:
    """Neighbouring parts together until they have SHARD_ROWS rows; a short rest goes to the last."""
    groups: list[dict[int, np.ndarray]] = [{}]
    for part, rows in by_part.items():
        if sum(map(len, groups[-1].values())) >= SHARD_ROWS:
            groups.append({})
        groups[-1][part] = rows
    return groups


def _report(
    record: dict, num_read: int, table: Table, dropped: list[Dropped], sample: int | None, shards: list[passes.Written]
) -> dict[str, Any]:
    """report.json: counts of rows and of what is in those kept. It has no time in it: the same set, the same report."""
    counts: Counter[str] = Counter()
    for written in shards:
        counts.update(written.counts)
    kept = sum(written.shard.rows for written in shards)
    usable = np.bincount(table.source, minlength=len(table.sources)).tolist()
    by_kind = Counter(row.kind for row in dropped)
    return {
        **record,
        "version": prepared.VERSION,
        "read": num_read,
        "kept": kept,
        "short_of_sample": max(0, (sample or 0) - kept),
        "not_in_sample": num_read - kept - len(dropped),
        "dropped": dict(sorted(by_kind.items())),
        "by_source": {
            name: {"usable": number, "kept": counts.pop(f"source: {name}", 0)}
            for name, number in zip(table.sources, usable, strict=True)
            if number
        },
        "counts": dict(sorted(counts.items())),
        "bytes": sum(written.shard.bytes for written in shards),
        "shards": [written.shard._asdict() for written in shards],
    }


def _finish(builder: str, directory: Path, report: dict, shards: list[prepared.Shard], dropped: list[Dropped]) -> None:
    expected = {shard.name for shard in shards}
    for path in directory.iterdir():  # what a killed writer left
        if path.name not in expected:
            path.unlink()
    questions = builder in builders.QUESTION_BUILDERS
    features = prepared.question_features() if questions else prepared.chain_features()
    description = f"{report['kept']} of {report['read']} rows of {builder}; report.json says which"
    prepared.write_metadata(directory, builder, features, shards, description)
    (directory / DROPPED_FILE).write_text(_lines(dropped), encoding="utf-8")
    (directory / prepared.REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _lines(rows: list[Dropped]) -> str:
    return "".join(json.dumps(row._asdict()) + "\n" for row in rows)


def _table(report: dict, directory: Path, seconds: float) -> str:
    """What a person wants to know of it."""
    lines = [
        f"{directory}",
        f"  read {report['read']:>12,}   in {seconds:.1f} s, {report['read'] / seconds:,.0f} rows/s",
        f"  kept {report['kept']:>12,}",
    ]
    lines += [f"  {count:>17,}   {kind}" for kind, count in report["dropped"].items()]
    lines += [f"  {report['not_in_sample']:>17,}   not in the sample"] * bool(report["not_in_sample"])
    lines += [f"  {count:>17,}   {name}" for name, count in report["counts"].items()]
    lines += [f"  {n['kept']:>9,} of {n['usable']:>9,}   {name}" for name, n in report["by_source"].items()]
    bad = sum(count for kind, count in report["dropped"].items() if kind.startswith(BAD))
    if bad:
        lines.append(f"WARNING: {bad} rows cannot be used; {directory / DROPPED_FILE} says which and why")
    if "responses_without_question" in report:
        strays = report["responses_without_question"]
        lines.append(f"WARNING: {strays} responses are to no question of the source and are left out")
    if report["short_of_sample"]:
        lines.append(f"WARNING: the sample is {report['short_of_sample']} rows short: there are no more")
    if report["counts"].get(passes.VALIDATION):
        lines.append("WARNING: questions of MMMU's validation split are in it, the test set: give them as exclude")
    return "\n".join(map(printable, lines))  # sources have the names that rows give


def _part_name(part: raw.Part) -> str:
    return f"{part.file} rows {part.first_row} to {part.first_row + part.rows - 1}"
