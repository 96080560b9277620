"""Make data/bundled_{stories,problems,riddles,snippets}: text, word problems, questions and small functions, all from seeds.

    python tools/make_bundled_text.py [FOLDER]

The functions stand in nbs/lm/01_corpus.ipynb. The same versions of numpy and pyarrow give the same files, byte for byte."""
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from puzzle_research.lm.corpus import BUNDLED_ROWS, bundled_rows

SCHEMA = dict(text=pa.string(), question=pa.string(), answer=pa.string(), id=pa.string(), choices=pa.struct([('text', pa.list_(pa.string())), ('label', pa.list_(pa.string()))]), answerKey=pa.string(),
              task_id=pa.int32(), code=pa.string(), test_list=pa.list_(pa.string()), test_setup_code=pa.string(), challenge_test_list=pa.list_(pa.string()))


def main():
    folder = Path(sys.argv[1]) if sys.argv[1:] else ROOT/'data'
    for kind, n in BUNDLED_ROWS.items():
        (folder/f'bundled_{kind}').mkdir(parents=True, exist_ok=True)
        for split in ('train', 'validation', 'test'):
            rows = bundled_rows(kind, split, n)
            table = pa.Table.from_pylist(rows, schema=pa.schema([(k, SCHEMA[k]) for k in rows[0]]))
            pq.write_table(table, folder/f'bundled_{kind}'/f'{split}.parquet', compression='zstd', compression_level=19)
            print(f'bundled_{kind}/{split}: {len(rows)} rows')


if __name__ == '__main__': main()
