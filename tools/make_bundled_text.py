"""Make data/bundled_{stories,problems,riddles,snippets}: stories, word problems, questions, small functions.

    python tools/make_bundled_text.py [FOLDER]

The functions stand in nbs/lm/11_bundled_text.ipynb. The same numpy and pyarrow give the same files."""
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from puzzle_research.lm.bundled_text import BUNDLED_ROWS, bundled_rows  # noqa: E402

TEXT, TEXTS = pa.string(), pa.list_(pa.string())
SCHEMA = {
    'text': TEXT,
    'question': TEXT,
    'answer': TEXT,
    'id': TEXT,
    'choices': pa.struct([('text', TEXTS), ('label', TEXTS)]),
    'answerKey': TEXT,
    'task_id': pa.int32(),
    'code': TEXT,
    'test_list': TEXTS,
    'test_setup_code': TEXT,
    'challenge_test_list': TEXTS,
}


def main():
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT/'data'
    for kind, n in BUNDLED_ROWS.items():
        (folder/f'bundled_{kind}').mkdir(parents=True, exist_ok=True)
        for split in ('train', 'validation', 'test'):
            rows = bundled_rows(kind, split, n)
            table = pa.Table.from_pylist(rows, schema=pa.schema([(k, SCHEMA[k]) for k in rows[0]]))
            file = folder/f'bundled_{kind}'/f'{split}.parquet'
            pq.write_table(table, file, compression='zstd', compression_level=19)
            print(f'bundled_{kind}/{split}: {len(rows)} rows')


if __name__ == '__main__':
    main()
