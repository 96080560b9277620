"Data sets as they lie on disks: shards, other layouts, other columns, and what is nearly there."
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import puzzle_research.core.data as D
from shared import png, write_pictures

def test_shards_and_saved_folders_are_found(lake):
    table = pa.table(dict(text=[f'line {i}' for i in range(9)]))
    (lake/'wikitext-2-v1'/'data').mkdir(parents=True)
    for k in range(3):
        pq.write_table(table[3*k:3*k + 3], lake/f'wikitext-2-v1/data/train-0000{k}-of-00003.parquet')
    found = D.load('wikitext-2-v1', 'train')
    assert found.origin == 'local'
    assert [bytes(found.item(i)['text']) for i in (0, 8)] == [b'line 0', b'line 8']
    (lake/'wikitext-2-v1/data/train-00001-of-00003.parquet').unlink()
    with pytest.raises(ValueError, match='has 2 of 3 files of train; number 1 is missing'):
        D.load('wikitext-2-v1', 'train')


def test_a_column_of_another_name_is_mapped_or_named(lake, monkeypatch):
    write_pictures(lake/'cifar10', [png(k) for k in range(9)], columns=('image', 'label'))
    with pytest.raises(ValueError, match=r"no column 'img'; the nearest is 'image'.*--column OURS=THEIRS"):
        D.load('cifar10', 'train')
    monkeypatch.setenv('PUZZLE_COLUMN', 'img=image')
    assert len(D.load('cifar10', 'train')) == 9


def test_what_is_no_damage_is_not_called_so(lake):
    (lake/'cifar10').mkdir()
    (lake/'cifar10'/'train.parquet').write_text('version https://git-lfs.github.com/spec/v1\nsize 12\n')
    with pytest.raises(ValueError, match='is a Git LFS pointer'):
        D.load('cifar10', 'train')
    rows = pa.table(dict(img=['a.png', 'b.png'], label=[0, 1]))
    pq.write_table(rows, lake/'cifar10'/'train.parquet')
    with pytest.raises(ValueError, match='img holds str.*its columns hold something else'):
        D.load('cifar10', 'train')


def test_a_near_miss_is_named_before_the_bundled_set_stands_in(lake, caplog):
    (lake/'CIFAR-10').mkdir()
    assert "expected a folder 'cifar10'" in D.load('cifar10', 'train').fallback
    assert "has 'CIFAR-10'" in caplog.text


@pytest.mark.parametrize('name', ['uoft-cs/cifar10/train.parquet', 'cifar10_train.parquet', 'train.parquet'])
def test_other_near_misses(lake, caplog, name):
    path = write_pictures(lake/'elsewhere', [png(k) for k in range(3)])
    (lake/name).parent.mkdir(parents=True, exist_ok=True)
    path.rename(lake/name)
    assert "expected a folder 'cifar10'" in D.load('cifar10', 'train').fallback


@pytest.mark.parametrize('name', ['train-00000-of-00001-b42a775f407cee45.parquet',
                                  'default/train/0000.parquet'])
def test_other_layouts_of_the_hub(lake, name):
    path = write_pictures(lake/'elsewhere', [png(k) for k in range(9)])
    (lake/'cifar10'/name).parent.mkdir(parents=True, exist_ok=True)
    path.rename(lake/'cifar10'/name)
    assert len(D.load('cifar10', 'train')) == 9


@pytest.mark.parametrize('label', ['3', 3., True, 12])
def test_labels_of_another_type_are_no_damage(lake, label):
    rows = pa.table(dict(img=[dict(bytes=png(k), path='') for k in range(9)], label=[label]*9))
    (lake/'cifar10').mkdir()
    pq.write_table(rows, lake/'cifar10'/'train.parquet')
    with pytest.raises(ValueError, match='its columns hold something else'):
        D.load('cifar10', 'train')


def test_a_home_that_is_nobodys(lake, monkeypatch, caplog):
    monkeypatch.setenv('PUZZLE_DATA', '~nobody-here/data')
    D.load('cifar10', 'train')
    assert 'which is not a folder' in caplog.text
