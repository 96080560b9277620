"""Make data/bundled_prose: English prose from the language reference that comes inside Python, in WikiText's layout (one column, text).

    python tools/make_bundled_prose.py [FOLDER]

Nothing is downloaded. A row is a paragraph, its lines joined; the split is by topic. Python 3.11.7's `pydoc_data/topics.py` gives the same files, byte for byte."""
import hashlib
import inspect
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydoc_data.topics as source

SHA256 = 'abaa56a64551d8eead1b19cbae3c6db443f99f0cab81df07bed3cb75c0db9346'
EVERY = {'validation': (3, 10), 'test': (7, 10)}   # the third and the seventh of every ten topics, by name; the rest is train


def paragraphs(text):
    "Paragraphs of prose: no rules, grammar, code or tables, which are indented by four or hold signs in columns."
    for p in text.split('\n\n'):
        lines = p.split('\n')
        prose = not any(l.startswith('    ') or '::=' in l or '+--' in l or l.startswith(('***', '===', '---', '| ')) for l in lines)
        joined = ' '.join(l.strip() for l in lines)
        if prose and len(joined) >= 40: yield f' {joined} \n'


def splits():
    rows = {'train': [], 'validation': [], 'test': []}
    for i, name in enumerate(sorted(source.topics)):
        split = next((s for s, (k, n) in EVERY.items() if i % n == k), 'train')
        rows[split] += paragraphs(source.topics[name])
    seen = set()
    for split in ('test', 'validation', 'train'):    # topics quote each other: a paragraph stays in one split
        rows[split] = [p for p in dict.fromkeys(rows[split]) if p not in seen]
        seen |= set(rows[split])
    return rows


def make(folder):
    found = hashlib.sha256(Path(inspect.getfile(source)).read_bytes()).hexdigest()
    if found != SHA256: raise ValueError(f'pydoc_data/topics.py is another one (sha256 {found}, expected {SHA256}): use Python 3.11.7')
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits().items():
        pq.write_table(pa.table({'text': rows}), folder/f'{split}.parquet', compression='zstd', use_dictionary=False, write_statistics=False)
        print(f'{split}: {len(rows)} paragraphs, {sum(map(len, rows)):,} characters, {(folder/f"{split}.parquet").stat().st_size/1e6:.2f} MB')


if __name__ == '__main__':
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]/'data'/'bundled_prose')
