"One's own data in place of a set that a notebook names. See nbs/core/01j_own."
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from PIL import Image

from puzzle_research.core import own as own_data
from puzzle_research.core.config import BaseConfig, make_config
from puzzle_research.core.data import load
from puzzle_research.core.params import parse_parameters
from puzzle_research.lm.corpus import build_corpus
from puzzle_research.ternary.operations import open_operations
from shared import puzzle


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache'))


def png(i):
    out = io.BytesIO()
    Image.fromarray(np.full((40, 50 + i, 3), 5*i, np.uint8)).save(out, 'PNG')
    return out.getvalue()


@pytest.fixture
def photos(tmp_path):
    for i in range(20):
        path = tmp_path/'photos'/('cats' if i % 2 else 'dogs')/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path/'photos'


def test_a_folder_stands_in_and_says_what_it_is(photos):
    train = load('cifar10', 'train', str(photos))
    assert train.arrays['image'].shape == (18, 3, 32, 32) and set(train.arrays['label']) == {0, 1}
    about = train.describe()
    assert about['origin'] == 'local' and about['name'].startswith('own_photos_')
    assert 'your own' in about['note']
    greys = {i for split in ('train', 'test') for i in
             load('cifar10', split, str(photos)).arrays['image'][:, 0, 0, 0].tolist()}
    assert greys == {5*i for i in range(20)}                        # every picture once, in one split


def test_another_file_is_another_set(photos):
    before = load('cifar10', 'train', str(photos))
    (photos/'cats'/'21.png').write_bytes(png(3))
    after = load('cifar10', 'train', str(photos))
    assert before.name != after.name and before.fingerprint != after.fingerprint


def test_what_is_broken_is_named(photos):
    (photos/'dogs'/'2.png').write_bytes(png(2)[:60])
    own_data.own(str(photos), 'cifar10')
    with pytest.raises(ValueError, match='items are broken .*2.png'):
        for split in ('train', 'test'):
            load('cifar10', split, str(photos))


def test_splits_that_are_there_stay(tmp_path):
    for split, n in (('train', 20), ('test', 4)):
        (tmp_path/'sounds'/split).mkdir(parents=True)
        for i in range(n):
            noise = np.random.default_rng(i).normal(0, .1, 8000)
            soundfile.write(tmp_path/'sounds'/split/f'{i}.wav', noise, 8000)
    splits, place = ('train', 'validation', 'test'), str(tmp_path/'sounds')
    assert [len(load('speech_commands', s, place)) for s in splits] == [18, 2, 4]


def test_a_column_of_a_set_on_the_hub(tmp_path, monkeypatch):
    "`datasets` finds the repository in the working folder as it would on the hub."
    (tmp_path/'owner'/'faces').mkdir(parents=True)
    column = pa.array([dict(bytes=png(i), path=f'{i}.png') for i in range(30)])
    pq.write_table(pa.table(dict(photo=column)), tmp_path/'owner'/'faces'/'train.parquet')
    monkeypatch.setattr(own_data, 'hub_problem', lambda repository: '')
    monkeypatch.chdir(tmp_path)
    assert len(load('cifar10', 'train', 'hub:owner/faces:photo')) == 27
    with pytest.raises(ValueError, match="no column 'face'; it has photo"):
        load('cifar10', 'train', 'hub:owner/faces:face')
    with pytest.raises(ConnectionError, match='owner/nobody cannot be fetched'):
        load('cifar10', 'train', 'hub:owner/nobody')


def test_own_text_for_the_language_model(tmp_path):
    (tmp_path/'prose').mkdir()
    for i in range(12):
        (tmp_path/'prose'/f'{i}.txt').write_text(f'The {i}. page of a book.\n'*200)
    corpus = build_corpus(str(tmp_path/'prose'), vocab=384, length=64)
    name, = corpus.train
    assert name.startswith('own_prose_') and corpus.stages == [(name,)]
    assert len(corpus.valid[name]) and len(corpus.test[name])


@pytest.mark.parametrize('data, said', [
    ('rael', "expected 'auto', 'real' or 'bundled', or your own"),
    ('./photos', ''),
    ('hub:owner/name:img', '')])
def test_a_parameter_names_a_set_or_a_path(data, said):
    Config = make_config(parse_parameters("data:str = 'auto' # of training"), {})
    assert issubclass(Config, BaseConfig)
    if said:
        with pytest.raises(ValueError, match=said):
            Config(data=data)
    else:
        assert Config(data=data).data == data


def test_what_has_no_stand_in_says_so():
    class cfg:
        data = './operations'
    with pytest.raises(ValueError, match='nothing else stands in for all ternary operations'):
        open_operations(cfg)


def bench(*args, status=0):
    done = puzzle('bench', *args)
    assert done.returncode == status, done.stderr
    return done


def test_own_pictures_beside_the_formats_of_all(photos, tmp_path):
    (photos/'torn.png').write_bytes(b'\x89PNG\r\n\x1a\ntorn')
    (photos/'readme.md').write_text('a text')
    Image.new('RGBA', (51, 40), (255, 0, 0, 128)).save(photos/'cats'/'1.png')
    done = bench(photos, '--items', 6, '--json', '--out', tmp_path/'out')
    told = json.loads(done.stdout)
    assert told['modality'] == 'picture' and told['total'] == 21
    rows = {row['coder']: row for row in told['rows']}
    assert list(rows) == ['puzzles, stream', 'puzzles, grid', 'AVIF 4:4:4, speed 6', 'WebP', 'JPEG 4:4:4',
                          'PNG, lossless']
    wide = [50 + int(Path(name).stem) for name in told['items']]
    tiles = np.mean([2*-(-w//32) for w in wide])
    assert rows['puzzles, stream']['bytes'] == pytest.approx(373.717*tiles, abs=.01)      # of 900 digits
    assert rows['WebP']['bytes'] <= rows['puzzles, stream']['bytes']
    assert rows['PNG, lossless']['fidelity'] == 99 > rows['puzzles, grid']['fidelity'] > 20
    assert 'photos also holds 1 text, left out' in done.stderr
    assert told['dropped'] == {'transparency laid on white': 1}
    assert '1 of them: transparency laid on white' in done.stderr
    text = (tmp_path/'out'/'bench.md').read_text()
    assert '| AVIF 4:4:4, speed 6 |' in text and '](bench.png)' in text
    assert (tmp_path/'out'/'bench.png').exists()


def test_own_texts_in_a_column_come_back_to_the_character(tmp_path):
    texts = ['Some words, and some more.\n'*20, 'ein Satz']
    pq.write_table(pa.table(dict(id=[1, 2], body=texts)), tmp_path/'t.parquet')
    done = bench('--data', f'{tmp_path}/t.parquet:body', '--json')
    rows = {row['coder']: row for row in json.loads(done.stdout)['rows']}
    assert {row['fidelity'] for row in rows.values()} == {100.} and set(rows) >= {'xz -9', 'zstd -19'}
    assert rows['puzzles, stream']['bytes'] < rows['xz -9']['bytes']


@pytest.mark.parametrize('name, options, said', [
    ('', (), 'holds no pictures, sounds or texts (0 other files)'),
    ('a.png', (), 'none of 1 pictures can be read; the first: a.png: '),
    ('a.txt', ('--modality', 'sound'), 'holds no sounds'),
    ('a.txt', ('--modality', 'video'), "unknown modality 'video'"),
    ('a.txt', ('--data', 'b'), 'give a codec or a folder, or --data'),
])
def test_what_cannot_be_shown_is_said_in_one_line(tmp_path, command, name, options, said):
    folder = tmp_path/'mine'
    folder.mkdir()
    if name:
        (folder/name).write_bytes(b'not much')
    status, told = command('bench', folder, *options)
    assert status == 2 and told.count('\n') == 1 and said in told
