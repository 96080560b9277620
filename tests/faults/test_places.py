"Sets in several files: shards, folders of `save_to_disk`, and the file in the cache that they are joined to."
import datasets
import numpy as np
import pytest
import pyarrow as pa
import pyarrow.parquet as pq

import puzzle_research.core.data as data
from damage import damages
from puzzle_research.core.fingerprint import cache_folder
from puzzle_research.core.parquet import find
from shared import png, write_pictures

EACH = [1, pytest.param(20, marks=pytest.mark.slow)]


@pytest.fixture
def shards(lake):
    path = write_pictures(lake/'cifar10', [png(k) for k in range(40)])
    table = pq.read_table(path)
    path.unlink()
    for k in range(2):
        pq.write_table(table[20*k:20*k + 20], lake/'cifar10'/f'train-0000{k}-of-00002.parquet')
    return lake/'cifar10', table


def loaded():
    return data.load('cifar10', 'train', 'real', limit_rate=1.)


@pytest.mark.parametrize('each', EACH)
def test_the_joined_file_in_the_cache(faults, shards, each):
    "Damaged in the cache, it is joined anew from the shards."
    want = np.array(loaded().arrays['image'])
    joined = find('cifar10', 'train')
    whole = joined.read_bytes()
    for damage, bad in damages(whole, each):
        joined.write_bytes(bad)
        same = np.array_equal(loaded().arrays['image'], want) and joined.read_bytes() == whole
        faults.count('joined shards in the cache', damage, 'right' if same else 'lost')


@pytest.mark.parametrize('each', EACH)
def test_a_damaged_shard(faults, shards, each):
    "The pictures read are those written; what is broken is refused by name, or dropped and named."
    folder, _ = shards
    shard, want = folder/'train-00001-of-00002.parquet', np.array(loaded().arrays['image'])
    for damage, bad in damages(shard.read_bytes(), each):
        shard.write_bytes(bad)
        outcome, said = _read(want, shard.name)
        faults.count('shard in Parquet', damage, outcome, said)


def _read(want, name): # -> outcome, what was said
    try:
        found = loaded()
    except (ValueError, FileNotFoundError) as e:
        named = any(word in str(e) for word in (name, 'cifar10/train', 'train.parquet'))
        return 'refused' if named else 'lost', str(e)
    whole = len(found) + len(found.dropped) == len(want)
    same = np.array_equal(found.arrays['image'], want[found.rows])
    return 'right' if whole and same else 'lost', 'other data'


@pytest.mark.parametrize('each', EACH)
@pytest.mark.parametrize('name', ['data-00000-of-00001.arrow', 'state.json'])
def test_an_arrow_folder(faults, shards, name, each):
    "Its pictures are PNG, whose checksum tells; the numbers beside them have none."
    folder, table = shards
    for shard in folder.glob('*.parquet'):
        shard.unlink()
    datasets.Dataset(pa.table(table)).save_to_disk(folder/'train')
    want, file = np.array(loaded().arrays['image']), folder/'train'/name
    for damage, bad in damages(file.read_bytes(), each):
        file.write_bytes(bad)
        outcome, said = _read(want, name)
        faults.count(f'Arrow folder, {file.suffix}', damage, outcome, said)


def test_a_torn_write_of_the_joined_file(faults, shards):
    "What another process left half-written beside it is not taken."
    want = np.array(loaded().arrays['image'])
    joined = find('cifar10', 'train')
    joined.parent.joinpath('XXH3SUMS').unlink()
    joined.write_bytes(joined.read_bytes()[:200])
    same = np.array_equal(loaded().arrays['image'], want)
    faults.count('joined shards in the cache', 'no seal', 'right' if same else 'lost')
    assert not list((cache_folder()/'joined').glob('.*.tmp'))
