"Reading, broken items, the cache, finding: what crosses processes, fills disks or is damaged."
import errno, hashlib, json, os, subprocess, sys
from pathlib import Path

import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import ImageFile

import puzzle_research.core.arrays as arrays
import puzzle_research.core.data as D
import puzzle_research.core.fingerprint as fingerprint
from puzzle_research.core.params import root
from puzzle_research.core.sources import PHOTOS
from shared import heavy_imports, load_tool, pixels, png, write_pictures


def left_in_cache():
    return sorted(p.name for p in (D.cache_folder()/'decoded').glob('*'))


def python(code):
    return subprocess.Popen([sys.executable, '-c', code], cwd=root(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def write_texts(folder, **columns):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder/'test.parquet')


# reading

def test_arrays_equal_pillow_pixel_for_pixel(lake):
    files = [png(k, kind) for k, kind in enumerate(['png', 'webp']*30)]
    write_pictures(lake/'cifar10', files)
    ds = D.load('cifar10', 'train')
    for image, file in zip(ds.arrays['image'], files, strict=True):
        assert np.array_equal(image, pixels(file))
    assert ds.arrays['label'].tolist() == [k % 10 for k in range(60)]
    assert ds.arrays['label'].dtype == np.int16
    assert ds.rows.tolist() == list(range(60)) and ds.origin == 'local'


def test_second_load_does_not_decode_or_hash(lake, monkeypatch):
    write_pictures(lake/'cifar10', [png(k) for k in range(5)])
    first = D.load('cifar10', 'train')
    def never(*args):
        raise AssertionError('called again')
    monkeypatch.setattr(fingerprint, '_hash_file', never)
    monkeypatch.setattr(arrays, '_fill', never)
    assert D.load('cifar10', 'train').fingerprint == first.fingerprint


@pytest.mark.parametrize('keep', [0, 3, 100, 0.5, 0.99])
def test_truncated_parquet_is_one_clear_error(lake, keep):
    path = write_pictures(lake/'cifar10', [png(k) for k in range(50)])
    data = path.read_bytes()
    path.write_bytes(data[:int(keep*len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r'train\.parquet is not a readable Parquet file of cifar10 .*cut '
                                         'short; expected a complete file.*puzzle data fetch cifar10'):
        D.load('cifar10', 'train')
    assert left_in_cache() == []


def test_damage_inside_a_parquet_never_gives_silently_other_pixels(lake):
    path = write_pictures(lake/'cifar10', [png(k) for k in range(200)])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (lake/'SHA256SUMS').write_text(f'{digest}  ./cifar10/train.parquet\n')
    data = bytearray(path.read_bytes())
    for at in range(5000, 5400):
        data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match='differs from SHA256SUMS'):
        D.load('cifar10', 'train')


def test_damaged_page_header_is_the_clear_error(lake):
    path = write_pictures(lake/'cifar10', [png(k) for k in range(200)])
    data = bytearray(path.read_bytes())
    data[4:40] = b'\xff'*36
    path.write_bytes(data)
    with pytest.raises(ValueError, match='not a readable Parquet file of cifar10'):
        D.load('cifar10', 'train')
    assert left_in_cache() == []


def test_missing_column_names_the_nearest(lake):
    write_pictures(lake/'cifar10', [png(0)], columns=('image', 'label'))
    with pytest.raises(ValueError, match="has no column 'img'; the nearest is 'image'. "
                                         'Expected for cifar10: img, label'):
        D.load('cifar10', 'train')


def test_damaged_local_file_is_not_replaced_by_the_bundled_set(lake):
    (lake/'cifar10').mkdir()
    (lake/'cifar10/train.parquet').write_bytes(b'<html>404</html>')
    with pytest.raises(ValueError, match='not a readable Parquet'):
        D.load('cifar10', 'train', data='auto')


# broken items

@pytest.mark.parametrize('bad, why', [
    (b'PNG, honestly', 'not a PNG, WebP or JPEG picture'),
    (png(1)[:-200], ''),
    (png(1, 'jpeg')[:-300], 'truncated'),
    (png(1, 'webp')[:-50], ''),
    (png(1, size=33), 'RGB picture of 33x33'),
    (b'', 'no image bytes'),
    (None, 'no image bytes'),
])
def test_a_broken_item_is_dropped_counted_and_named(lake, bad, why):
    files = [png(k) for k in range(150)]
    files[70] = bad
    write_pictures(lake/'cifar10', files)
    ds = D.load('cifar10', 'train')
    assert [(d['row'], d['item'], d['kind']) for d in ds.dropped] == [(70, '70.png', 'broken')]
    assert why in ds.dropped[0]['why'] and ds.dropped[0]['why']
    assert len(ds) == 149 and 70 not in ds.rows
    assert np.array_equal(ds.arrays['image'][70], pixels(files[71]))


def test_more_than_one_percent_broken_fails_and_lists_the_first(lake):
    files = [png(k) for k in range(200)]
    for k in (5, 50, 150):
        files[k] = b'nothing'
    write_pictures(lake/'cifar10', files)
    for _ in range(2):                   # the second time from the cache
        with pytest.raises(ValueError, match=r'3 of 200 items are broken \(1.50%, limit 1.00%\): '
                                             r'row 5 \(5.png\).*row 50.*row 150'):
            D.load('cifar10', 'train')
    assert len(D.load('cifar10', 'train', limit_rate=.02)) == 197


def test_exactly_one_percent_passes(lake):
    write_pictures(lake/'cifar10', [b'nothing']*2 + [png(k) for k in range(198)])
    assert D.load('cifar10', 'train').describe()['dropped'] == dict(broken=2, listed=0)


def test_all_items_broken_fails_whatever_the_limit(lake):
    write_pictures(lake/'cifar10', [b'x']*20)
    with pytest.raises(ValueError, match='20 of 20 items are broken'):
        D.load('cifar10', 'train', limit_rate=1.)


def test_a_bug_in_the_decoder_is_not_a_broken_item(lake):
    write_pictures(lake/'cifar10', [png(k) for k in range(5)])
    with pytest.raises(KeyError):
        D.load('cifar10', 'train', decoder=D.Decoder('bug', lambda row: row['imgs']))
    assert left_in_cache() == []


def test_listed_rows_are_dropped_by_name_and_do_not_count_as_broken(lake):
    write_pictures(lake/'cifar10', [png(k) for k in range(100)])
    listed = [dict(split='train', row=r, path=f'{r}.png') for r in range(30)]
    listed.append(dict(split='test', row=99, path=''))
    (lake/'cifar10/lossy_rows.json').write_text(json.dumps(listed))
    ds = D.load('cifar10', 'train')
    assert ds.describe()['dropped'] == dict(broken=0, listed=30)
    assert ds.rows.tolist() == list(range(30, 100))
    (lake/'cifar10/lossy_rows.json').unlink()
    again = D.load('cifar10', 'train')
    assert len(again) == 100 and again.fingerprint != ds.fingerprint and again.sha256 == ds.sha256


@pytest.mark.parametrize('text, why', [
    ('[{"split": "train"}]', 'is damaged'),
    ('{', 'is damaged'),
    ('[{"split": "train", "row": 0, "path": "other.png"}]', 'belongs to another copy'),
    ('[{"split": "train", "row": 2}]', 'lists row 2 of train, which has 2 rows: .*belongs to another copy'),
])
def test_a_wrong_list_of_rows_is_an_error(lake, text, why):
    write_pictures(lake/'cifar10', [png(0), png(1)])
    (lake/'cifar10/lossy_rows.json').write_text(text)
    with pytest.raises(ValueError, match=why):
        D.load('cifar10', 'train')


def test_lenient_pillow_is_refused(lake, monkeypatch):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    write_pictures(lake/'cifar10', [png(0)])
    with pytest.raises(AssertionError, match='LOAD_TRUNCATED_IMAGES'):
        D.load('cifar10', 'train')


# cache

class DiskFull(arrays.NpyAppender):
    "A disk with room for 40 rows of each array."
    def append(self, block):
        if self.n + len(block) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().append(block)


class FullAtTheEnd(arrays.NpyAppender):
    "A disk that fills at the last flush."
    def close(self):
        with open('/dev/full', 'wb') as f:
            f.write(b'x'*10)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full on this system')
@pytest.mark.parametrize('disk', [DiskFull, FullAtTheEnd])
def test_full_disk_leaves_no_half_cache(lake, monkeypatch, disk):
    write_pictures(lake/'cifar10', [png(k) for k in range(60)])
    with monkeypatch.context() as m:
        m.setattr(arrays, 'NpyAppender', disk)
        with pytest.raises(OSError, match='No space left on device while decoding cifar10/train into '
                                          '.*PUZZLE_CACHE') as e:
            D.load('cifar10', 'train')
    assert e.value.errno == errno.ENOSPC and left_in_cache() == []
    assert len(D.load('cifar10', 'train')) == 60


def test_a_damaged_entry_is_decoded_again(lake, caplog):
    write_pictures(lake/'cifar10', [png(k) for k in range(20)])
    whole = np.array(D.load('cifar10', 'train').arrays['image'])
    [entry] = (D.cache_folder()/'decoded').iterdir()
    def torn_json(): (entry/'meta.json').write_text('{')
    def short_array(): os.truncate(entry/'image.npy', 5000)
    def no_array(): (entry/'label.npy').unlink()
    for damage in (short_array, torn_json, no_array):
        damage()
        assert np.array_equal(D.load('cifar10', 'train').arrays['image'], whole)
    assert 'damaged' in caplog.text


def test_decoder_version_and_options_change_the_fingerprint(lake):
    write_pictures(lake/'cifar10', [png(k) for k in range(3)])
    decode = D.DECODERS['cifar10'].fn
    decoders = [D.Decoder('image', decode, version, options=dict(size=32, classes=classes))
                for version, classes in ((1, 10), (2, 10), (1, 11))]
    assert len({D.load('cifar10', 'train', decoder=d).fingerprint for d in decoders}) == 3
    assert len(left_in_cache()) == 3


def test_changed_file_of_the_same_size_is_noticed(lake):
    path = write_pictures(lake/'cifar10', [png(0)])
    first = D.load('cifar10', 'train')
    path.write_bytes(path.read_bytes().replace(b'0.png', b'9.png', 1))
    assert D.load('cifar10', 'train').sha256 != first.sha256


RACE = '''
import time, pathlib, puzzle_research.core.data as D
gate, seen = pathlib.Path({gate!r}), []
def slow(row, **options):
    if not seen:
        seen.append(1)
        (gate/{me!r}).touch()
        while len(list(gate.iterdir())) < 2:
            time.sleep(.005)
    return D.DECODERS['cifar10'].fn(row, **options)
ds = D.load('cifar10', 'train', decoder=D.Decoder('image', slow, options=dict(size=32, classes=10)))
print(len(ds), int(ds.arrays['image'].astype('int64').sum()))
'''


def test_two_processes_decoding_at_once_do_not_clash(lake, tmp_path):
    files = [png(k) for k in range(600)]
    write_pictures(lake/'cifar10', files)
    (tmp_path/'gate').mkdir()
    both = [python(RACE.format(gate=str(tmp_path/'gate'), me=me)) for me in 'ab']
    done = [(p.communicate(timeout=120), p.returncode) for p in both]
    assert [code for _, code in done] == [0, 0], done
    total = sum(int(pixels(file).sum()) for file in files)
    assert [out.split() for (out, _), _ in done] == [['600', str(total)]]*2
    assert len(left_in_cache()) == 1


KILLED = '''
import os, signal, puzzle_research.core.data as D
seen = []
def die(row, **options):
    seen.append(1)
    if len(seen) == 700:
        os.kill(os.getpid(), signal.SIGKILL)
    return D.DECODERS['cifar10'].fn(row, **options)
D.load('cifar10', 'train', decoder=D.Decoder('image', die, options=dict(size=32, classes=10)))
'''


def test_killed_in_the_middle_leaves_no_entry(lake):
    write_pictures(lake/'cifar10', [png(k) for k in range(1000)])
    process = python(KILLED)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert [name for name in left_in_cache() if not name.startswith('.')] == []
    assert len(D.load('cifar10', 'train')) == 1000 and len(left_in_cache()) == 1   # what it left is swept


def test_ragged_items(lake):
    texts = ['one', '', 'naïve', 'x'*3000]*300
    write_texts(lake/'wikitext-2-v1', text=texts)
    ds = D.load('wikitext-2-v1', 'test')
    assert [bytes(ds.item(i)['text']).decode() for i in range(len(ds))] == texts
    write_texts(lake/'svamp', text=texts)
    with pytest.raises(ValueError, match='svamp has no decoder of its own: pass decoder='):
        D.load('svamp', 'test')


# finding

def test_search_order(lake, tmp_path, monkeypatch):
    other = tmp_path/'second'
    here, there = write_pictures(lake/'cifar10', [png(0)]), write_pictures(other/'cifar10', [png(1)])
    monkeypatch.setenv('PUZZLE_DATA', f'{other}{os.pathsep}{lake}')
    assert D.find('cifar10', 'train') == there
    there.unlink()
    assert D.find('cifar10', 'train') == here
    here.unlink()
    assert D.find('cifar10', 'train') in (None, root()/'data/cifar10/train.parquet')


def test_a_named_folder_goes_before_the_data_folder_of_the_project(lake, tmp_path, monkeypatch):
    (tmp_path/'project').mkdir()
    monkeypatch.setenv('PUZZLE_ROOT', str(tmp_path/'project'))
    named = write_pictures(lake/'cifar10', [png(0)])
    own = write_pictures(tmp_path/'project/data/cifar10', [png(1)])
    assert D.find('cifar10', 'train') == named
    named.unlink()
    assert D.find('cifar10', 'train') == own


def test_relative_folders_count_from_the_project_root(tmp_path, monkeypatch):
    path = write_pictures(tmp_path/'cifar10', [png(0)])
    monkeypatch.setenv('PUZZLE_DATA', os.path.relpath(tmp_path, root()))
    monkeypatch.setenv('PUZZLE_ROOT', str(Path(D.__file__).parents[2]))
    monkeypatch.chdir('/')
    assert D.find('cifar10', 'train').resolve() == path.resolve()


def test_a_folder_that_is_not_there_is_said_once(lake, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'typo'))
    for _ in range(3):
        D.find('cifar10', 'train')
    assert caplog.text.count('which is not a folder') == 1


def test_bundled_is_announced_and_recorded(lake, no_cifar10, caplog):
    ds = D.load('cifar10', 'train')
    assert ds.origin == 'bundled' and ds.name == 'bundled_photos'
    assert 'not cifar10 numbers' in ds.describe()['fallback']
    assert 'USING THE BUNDLED SET' in caplog.text and 'HF_HUB_OFFLINE' in caplog.text
    with pytest.raises(FileNotFoundError, match='cifar10/train is not on this machine.*PUZZLE_DATA'):
        D.load('cifar10', 'train', data='real')
    with pytest.raises(ValueError, match='is the bundled set'):
        D.load('bundled_photos', 'train', data='real')
    with pytest.raises(FileNotFoundError, match='no bundled set stands in for it.*hub has no copy'):
        D.load('asdiv', 'validation')


def test_manifest_entry_is_json_without_a_path_of_the_machine(lake, tmp_path):
    write_pictures(lake/'cifar10', [png(k) for k in range(3)])
    for data in ('auto', 'bundled'):
        text = json.dumps(D.load('cifar10', 'train', data=data).describe())
        assert str(tmp_path) not in text and str(root()) not in text


# the rest

def test_check_reports_and_never_stops(lake):
    write_pictures(lake/'cifar10', [png(k) for k in range(10)])
    (lake/'cifar10/test.parquet').write_bytes(b'half')
    (lake/'corrupt_audio').mkdir()
    (lake/'corrupt_audio/a.flac').write_bytes(b'fLaC')
    write_texts(lake/'gsm8k', question=['1+1?'], answers=['2'])
    lines = {(line['name'], line.get('split')): line for line in D.check()}
    assert lines['cifar10', 'train']['rows'] == 10 and lines['cifar10', 'train']['status'] == 'ok'
    assert 'cut short' in lines['cifar10', 'test']['status']
    assert "has no column 'answer'; the nearest is 'answers'" in lines['gsm8k', 'test']['status']
    assert lines['corrupt_audio', '*.flac']['rows'] == 1
    assert lines['bundled_photos', 'test']['status'] == 'ok'
    assert 'not found' in lines['re-arc', None]['status']
    assert {name for name, _ in lines} == set(D.SOURCES)


def test_bundled_photos_are_cut_from_the_pictures_as_the_tool_says(tmp_path, monkeypatch):
    tool = load_tool('make_bundled_images')
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    assert tuple(name for _, name, *_ in tool.PICTURES) == PHOTOS
    patches = {}
    for split, name, package, file in tool.PICTURES:
        patches |= tool.patches(tool.picture(package, file), name, split)
    for split in ('train', 'test'):
        ds = D.load('bundled_photos', split)
        rows = pq.read_table(D.find('bundled_photos', split))['img'].to_pylist()
        assert len(ds) == D.SOURCES['bundled_photos'].splits[split]
        for image, row in zip(ds.arrays['image'], rows, strict=True):
            assert row['path'].startswith(split)
            assert np.array_equal(image.transpose(1, 2, 0), patches.pop(row['path'])), row['path']
    assert not patches
    monkeypatch.setitem(tool.SHA256, 'chelsea.png', 'f'*64)
    with pytest.raises(ValueError, match='chelsea.png has sha256 596aa1e7.*install the pinned versions'):
        tool.picture('skimage.data', 'chelsea.png')


def test_bundled_photos_are_small_and_in_the_layout_of_the_hub():
    files = [D.find('bundled_photos', split) for split in ('train', 'test')]
    image = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    for file in files:
        assert pq.read_schema(file).equals(pa.schema([('img', image), ('label', pa.int64())]))
    assert sum(file.stat().st_size for file in files) < 4e6


def test_bundled_prose_is_what_the_tool_makes(tmp_path, monkeypatch):
    tool = load_tool('make_bundled_prose')
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    sets = {split: D.load('bundled_prose', split) for split in ('train', 'validation', 'test')}
    stored = {s: [bytes(ds.item(i)['text']).decode() for i in range(len(ds))] for s, ds in sets.items()}
    assert {s: len(rows) for s, rows in stored.items()} == D.SOURCES['bundled_prose'].splits
    every = [row for rows in stored.values() for row in rows]
    assert len(every) == len(set(every))             # no paragraph in two splits, none twice
    if hashlib.sha256(Path(tool.source.__file__).read_bytes()).hexdigest() != tool.SHA256:
        pytest.skip('another Python: another reference')
    assert tool.splits() == stored


def test_bundled_texts_are_what_the_tool_makes(tmp_path, monkeypatch):
    tool = load_tool('make_bundled_texts')
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    ds = D.load('bundled_texts', 'test')
    stored = [bytes(ds.item(i)['text']).decode() for i in range(len(ds))]
    assert list(tool.OUR_OWN.values()) == stored[len(tool.OF_PYTHON):]
    try:
        made = tool.texts()
    except (ValueError, FileNotFoundError):
        pytest.skip('another Python: another random.py')
    assert list(made.values()) == stored


def test_holdout_is_frozen():
    train, valid = D.holdout(50_000, 5000, 0)
    assert len(train) == 45_000 and len(np.union1d(train, valid)) == 50_000
    assert not np.isin(valid, train).any()
    assert valid[:5].tolist() == [14, 22, 24, 28, 64]
    for n in (0, -1, 50_000):
        with pytest.raises(ValueError, match='n_valid'):
            D.holdout(50_000, n)


def test_import_is_light():
    names = ('torch', 'datasets', 'pandas', 'pyarrow', 'PIL', 'matplotlib')
    assert heavy_imports('import puzzle_research.core.data', names)[0] == []


@pytest.mark.slow
@pytest.mark.skipif(not any((d/'cifar10/train.parquet').exists() for d in D.data_folders()),
                    reason='no CIFAR-10 on this machine: put it on PUZZLE_DATA')
def test_cifar10_is_whole(monkeypatch, tmp_path):
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    train, test = (D.load('cifar10', split, data='real') for split in ('train', 'test'))
    assert len(train) + len(train.dropped) == 50_000 and len(test) + len(test.dropped) == 10_000
    assert np.allclose(train.arrays['image'].mean((0, 2, 3))/255, (.4914, .4822, .4465), atol=5e-4)
    assert np.bincount(test.arrays['label']).max() == 1000
