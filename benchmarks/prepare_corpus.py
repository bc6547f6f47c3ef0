"""Measure `muonscale prepare`: rate, CPU time and peak memory of all of its processes.

    python benchmarks/prepare_corpus.py text --megabytes 300
    python benchmarks/prepare_corpus.py files --count 20000
    python benchmarks/prepare_corpus.py encode

The text is the source of this machine's Python library, repeated: as one file, or as small files
of 2 kB, each of which begins with its number. Memory is sampled every 0.2 s: the sum over the
processes of their resident memory in which shared pages are divided among them (PSS, from
/proc/PID/smaps_rollup), and of anonymous memory, which leaves out the pages of mapped files. Needs
Linux and psutil. CPU time is of all processes, so that a busy machine does not change it.

`encode` encodes 16 MB on one thread, in turn as `muonscale prepare` does and with
`tokenizers.Tokenizer.encode_batch` on the same pieces, and prints the ratio of their CPU times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psutil

from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.sources import read_documents

FILE_BYTES = 2000
INTERVAL = 0.2
TURNS = 5


def library() -> Iterator[str]:
    """Yield files of the Python library, again and again."""
    for turn in count():
        for document in read_documents(DataSection(source="python-stdlib")):
            yield f"# {turn} {document.name}\n{document.text}"


def write_text(path: Path, size: int) -> None:
    """Write one file of text."""
    with path.open("w") as file:
        for text in library():
            file.write(text)
            if file.tell() >= size:
                return


def write_files(folder: Path, number: int) -> None:
    """Write small files, in folders of 1000."""
    done = 0
    for text in library():
        for start in range(0, len(text), FILE_BYTES):
            place = folder / f"{done // 1000:03d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{done:06d}.txt").write_text(f"{done}\n{text[start : start + FILE_BYTES]}")
            done += 1
            if done == number:
                return


def memory(process: psutil.Process) -> dict[str, int]:
    """Return PSS and anonymous bytes of a process and those below it."""
    found = {"Pss": 0, "Anonymous": 0}
    try:
        together = [process, *process.children(recursive=True)]
    except psutil.Error:
        return found
    for one in together:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        values = dict(line.split(":", 1) for line in lines)
        for key in found:
            found[key] += int(values[key].split()[0]) * 1024
    return found


def measure(path: Path, home: Path, processes: int) -> None:
    """Prepare a path in a process of its own, and print what it took."""
    given = [f"data.path={path}", f"data.cache={home / 'cache'}", "data.vocab_size=32000"]
    command = [sys.executable, "-m", "muonscale", "prepare", *given, "--processes", str(processes)]
    begun, peak = time.monotonic(), {"Pss": 0, "Anonymous": 0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        process = psutil.Process(started.pid)
        while started.poll() is None:
            for key, value in memory(process).items():
                peak[key] = max(peak[key], value)
            time.sleep(INTERVAL)
        print(started.stdout.read() if started.stdout else "", end="")
    assert started.returncode == 0, "it failed"
    seconds, used = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size, cpu = sum(file.stat().st_size for file in files), used.ru_utime + used.ru_stime
    print(
        f"{len(files):,} files of {size / 1e6:,.1f} MB with {processes} processes: {seconds:,.0f} s,"
        f" {cpu:,.1f} s of CPU, {size / 1e6 / cpu:.2f} MB per CPU second, "
        f"{len(files) / cpu:,.0f} files per CPU second; peak {peak['Pss'] / 2**20:,.0f} MiB, "
        f"of which anonymous {peak['Anonymous'] / 2**20:,.0f} MiB"
    )


def compare_encoding(home: Path) -> None:
    """Print the CPU times of our encoding and of `encode_batch`, and their ratio."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from muonscale.lab.data.document_store import DocumentStore
    from muonscale.lab.data.encode import CHUNK_BYTES, WORKER_BATCH_BYTES, batches
    from muonscale.lab.data.encode_chunk import Encoder
    from muonscale.lab.data.files import Document
    from muonscale.lab.data.tokenizer import train_tokenizer

    store, texts = DocumentStore(home / "text"), library()
    documents = (Document(str(number), text) for number, text in enumerate(texts))
    taken: list[Document] = []
    while sum(len(document.text) for document in taken) < CHUNK_BYTES:
        taken.append(next(documents))
    store.fill(iter(taken), lambda done: None)
    cuts = list(store.cuts([(0, store.size)]))
    tokenizer = train_tokenizer((text.text for text in taken[:500]), 32000)
    tokenizer.backend_tokenizer.save(str(home / "tokenizer.json"))
    setting = {"tokenizer": str(home / "tokenizer.json"), "text": str(home / "text")}
    setting |= {"dtype": "<u2", "end": 0, "batch_bytes": WORKER_BATCH_BYTES}
    content = (home / "text").read_bytes()
    pieces = [content[start:end].decode() for start, end, _ in cuts]
    plain, ratios = tokenizer.backend_tokenizer, []
    with Encoder(setting) as encoder:
        for _ in range(TURNS):
            begun = time.process_time()
            encoder.write(cuts, home / "train-00000.bin")
            ours = time.process_time() - begun
            begun = time.process_time()
            for batch in batches(pieces, len, WORKER_BATCH_BYTES):
                plain.encode_batch(batch, add_special_tokens=False)
            theirs = time.process_time() - begun
            ratios.append(ours / theirs)
            megabytes = store.size / 1e6
            print(
                f"ours {megabytes / ours:.2f} MB per CPU second, encode_batch "
                f"{megabytes / theirs:.2f}: {ours / theirs:.3f} times its CPU time"
            )
    print(json.dumps({"median": statistics.median(ratios), "turns": ratios}))


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["text", "files", "encode"])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if arguments.what == "encode":
            compare_encoding(home)
            return
        path = home / ("text.txt" if arguments.what == "text" else "files")
        if arguments.what == "text":
            write_text(path, arguments.megabytes * 10**6)
        else:
            write_files(path, arguments.count)
        measure(path, home, arguments.processes)


if __name__ == "__main__":
    main()
