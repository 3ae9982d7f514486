"""Files to rows and paragraphs: text, JSON and JSON Lines by the standard library, the rest through `datasets`."""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fuyou.core.errors import ConfigError, DataError

TEXTS = (".txt", ".md")
TABLES = {".csv": ("csv", ","), ".tsv": ("csv", "\t"), ".parquet": ("parquet", "")}
ROWS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", *TABLES)

Row = tuple[dict[str, Any], str]  # fields, and "file line N" or "file row N"


def data_files(paths: Sequence[str]) -> list[Path]:
    """Every file that the paths name, in order: a pattern and a folder give theirs sorted by name. DataError for none.

    A folder is not searched below its first level; of its files, those that are neither rows nor text are passed over.
    """
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            files += _of_folder(path)
        elif path.exists():
            files.append(_known(path))
        elif glob.has_magic(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
            if not matches:
                raise DataError(f"No file matches the pattern {name}: check `data`.")
            files += [_known(match) for match in matches if match.is_file()]
        else:
            raise DataError(f"Data file {name} does not exist here, and data is not fetched from a hub: check `data`.")
    return files


def suffix_of(path: Path) -> str:
    """The part of the name that says what it holds: ".jsonl.gz" is one suffix."""
    last = "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    return last


def _known(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"Data file {path} is not a file: check `data`.")
    if suffix_of(path) not in (*TEXTS, *ROWS):
        raise DataError(
            f"Data file {path} is none of {', '.join((*TEXTS, *ROWS))}: convert it, or name files one by one."
        )
    return path


def _of_folder(folder: Path) -> list[Path]:
    there = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if any(path.name == "dataset_info.json" for path in there) and any(path.suffix == ".arrow" for path in there):
        raise DataError(
            f"Data folder {folder} was written by `Dataset.save_to_disk`: write it with `to_parquet` or `to_json`, "
            "and name that file."
        )
    rows = [path for path in there if suffix_of(path) in ROWS]
    texts = [path for path in there if suffix_of(path) in TEXTS and path.stem.upper() != "README"]
    if rows and texts:
        raise DataError(
            f"Data folder {folder} holds rows ({rows[0].name}, …) and text ({texts[0].name}, …): "
            f"say which are meant by a pattern, such as {folder / ('*' + rows[0].suffix)}."
        )
    if not rows and not texts:
        raise DataError(f"Data folder {folder} holds no file of {', '.join((*TEXTS, *ROWS))}: check `data`.")
    return rows or texts


def read_paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every paragraph; blank lines separate them, and only the text between is kept."""
    text = re.sub(r"\r\n?", "\n", "".join(line for _, line in _lines(path))).rstrip()
    line = 1
    for piece in re.split(r"((?:\n[^\S\n]*)+\n)", text):  # paragraph, blank lines, paragraph, …
        if piece.strip():
            yield line, piece
        line += piece.count("\n")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, one by one. DataError names the file and the line or row of what is not one."""
    suffix = suffix_of(path)
    if suffix in TABLES:
        yield from _table(path, *TABLES[suffix])
    elif suffix.startswith(".jsonl"):
        for number, line in _lines(path):
            if line.strip():
                yield _parsed(line, f"{path} line {number}")
    else:
        yield from _json(path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, each decoded by itself so that an error can name its line."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        number = 0
        try:
            for number, raw in enumerate(file, 1):
                yield number, (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} line {number} is not UTF-8 ({error.reason}): convert the file.") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not whole gzip after line {number} ({error}): compress it again.") from None


def _parsed(text: str, source: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON: {error}.") from None
    return _object(row, source), source


def _object(row: Any, source: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{source} holds a JSON {type(row).__name__}, not an object with fields such as `messages`.")
    return row


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, or objects one after another (as JSON Lines): one is decoded at a time."""
    text = "".join(line for _, line in _lines(path))
    space = re.compile(r"\s*")
    place = _skip(space, text, 0)
    array = text[place : place + 1] == "["
    place += array
    number = 0
    decoder = json.JSONDecoder()
    while (place := _skip(space, text, place)) < len(text) and not (array and text[place] == "]"):
        number += 1
        source = f"{path} row {number}"
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source} is not JSON: {error}.") from None
        yield _object(row, source), source
        place = _skip(space, text, place)
        if array and text[place : place + 1] == ",":
            place += 1
        elif array and text[place : place + 1] != "]":
            raise DataError(f"{source} is followed by neither a comma nor a closing bracket: the array is broken.")
    if array and text[place:].strip() != "]":
        raise DataError(f"{path} goes on after its array, or ends within it, after {number} rows: it is broken.")


def _skip(space: re.Pattern[str], text: str, place: int) -> int:
    found = space.match(text, place)
    return found.end() if found else place


def _table(path: Path, kind: str, separator: str) -> Iterator[Row]:
    """Rows of a CSV or Parquet file, streamed by `datasets` a batch at a time. `IterableDataset.from_…` asks no network,
    where `load_dataset` counts each use at the hub; what is cached goes into a folder that is removed."""
    datasets = _import_datasets(path)
    logging = datasets.utils.logging
    level, number = logging.get_verbosity(), 0
    logging.set_verbosity(logging.CRITICAL)  # what it would log is in the error below
    with tempfile.TemporaryDirectory(prefix="fuyou-datasets-") as cache:
        try:
            options: dict[str, Any] = {"cache_dir": cache}
            if kind == "csv":
                # What is written as 007, NA or nothing is meant as that text, not as a number or a null.
                text = datasets.Features({name: datasets.Value("string") for name in _header(path, separator)})
                options |= {"sep": separator, "na_filter": False, "features": text}
            read = getattr(datasets.IterableDataset, f"from_{kind}")
            for number, row in enumerate(read(glob.escape(str(path)), **options), 1):
                yield row, f"{path} row {number}"
        except (ConfigError, DataError):
            raise
        except Exception as error:  # pandas, pyarrow and datasets share no base for what a file can do wrong
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split()).rstrip(".")[:200]
            raise DataError(
                f"{path} cannot be read as {'CSV' if kind == 'csv' else 'Parquet'} after row {number} "
                f"({type(cause).__name__}: {reason}): check the file, or convert it to .jsonl."
            ) from None
        finally:
            logging.set_verbosity(level)


def _header(path: Path, separator: str) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=separator), [])
    if not any(names):
        raise DataError(f"Data file {path} is empty: its first line must name the columns.")
    return names


def _import_datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"Data file {path} is read through `datasets`, which cannot be imported ({error}): "
            "pip install 'fuyou[data]', or convert the file to .jsonl."
        ) from None
    if not hasattr(datasets.IterableDataset, "from_parquet"):
        raise ConfigError(
            f"Data file {path} is read through `datasets`, whose version {datasets.__version__} cannot stream files: "
            "pip install --upgrade datasets."
        )
    return datasets
