"""Make data/bundled_prose: English prose of Python's language reference, in WikiText's layout.

    python tools/make_bundled_prose.py [FOLDER]

Nothing is downloaded. A row is a paragraph, its lines joined; the split is by topic. Python 3.11.7's
`pydoc_data/topics.py` gives the same files, byte for byte."""
import hashlib
import inspect
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pydoc_data.topics as source

SHA256 = 'abaa56a64551d8eead1b19cbae3c6db443f99f0cab81df07bed3cb75c0db9346'
EVERY = {'validation': (3, 10), 'test': (7, 10)}   # of every ten topics, by name, the third and the seventh


def paragraphs(text):
    "Paragraphs of prose: no rules, grammar, code or tables, which are indented or hold signs in columns."
    def is_set(line):
        return line.startswith(('    ', '***', '===', '---', '| ')) or '::=' in line or '+--' in line
    for p in text.split('\n\n'):
        lines = p.split('\n')
        joined = ' '.join(line.strip() for line in lines)
        if len(joined) >= 40 and not any(map(is_set, lines)):
            yield f' {joined} \n'


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
    if found != SHA256:
        raise ValueError(f'pydoc_data/topics.py has sha256 {found}, expected {SHA256}: use Python 3.11.7')
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits().items():
        table, file = pa.table({'text': rows}), folder/f'{split}.parquet'
        pq.write_table(table, file, compression='zstd', use_dictionary=False, write_statistics=False)
        size = file.stat().st_size/1e6
        print(f'{split}: {len(rows)} paragraphs, {sum(map(len, rows)):,} characters, {size:.2f} MB')


if __name__ == '__main__':
    default = Path(__file__).resolve().parents[1]/'data'/'bundled_prose'
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
