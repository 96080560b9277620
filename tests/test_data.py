"""Data errors, the cache and the hub: what crosses processes, fills disks or waits."""
import errno
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import puzzle_research.core.data as D
from puzzle_research.core.config import root

IMAGE = D.DECODERS['cifar10']


def picture(k, fmt='png', size=32):
    out = io.BytesIO()
    Image.fromarray(np.random.RandomState(k).randint(0, 256, (size, size, 3), np.uint8)).save(out, fmt, **({'lossless': True} if fmt == 'webp' else {}))
    return out.getvalue()


def write(folder, blobs, split='train', columns=('img', 'label')):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{columns[0]: {'bytes': b, 'path': f'{k}.png'}, columns[1]: k % 10} for k, b in enumerate(blobs)]
    pq.write_table(pa.Table.from_pylist(rows), folder/f'{split}.parquet', row_group_size=100)
    return folder/f'{split}.parquet'


@pytest.fixture
def lake(tmp_path, monkeypatch):
    (tmp_path/'lake').mkdir()
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'lake'))
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    D._unreachable.clear()
    return tmp_path/'lake'


def left_in_cache(): return sorted(p.name for p in (D.cache_folder()/'decoded').glob('*'))


def python(code, **env):
    return subprocess.Popen([sys.executable, '-c', code], env=os.environ | env, cwd=root(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# reading

def test_arrays_equal_pillow_pixel_for_pixel(lake):
    blobs = [picture(k, fmt) for k, fmt in enumerate(['png', 'webp']*30)]
    write(lake/'cifar10', blobs)
    ds = D.load('cifar10', 'train')
    for k, b in enumerate(blobs):
        assert np.array_equal(ds.arrays['image'][k].transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(b))))
    assert ds.arrays['label'].tolist() == [k % 10 for k in range(60)] and ds.arrays['label'].dtype == np.int16
    assert ds.rows.tolist() == list(range(60)) and ds.origin == 'local'


def test_second_load_does_not_decode_or_hash(lake, monkeypatch):
    write(lake/'cifar10', [picture(k) for k in range(5)])
    first = D.load('cifar10', 'train')
    def never(*a): raise AssertionError('called again')
    monkeypatch.setattr(D, '_sha256', never)
    monkeypatch.setattr(D, '_fill', never)
    assert D.load('cifar10', 'train').fingerprint == first.fingerprint


@pytest.mark.parametrize('keep', [0, 3, 100, 0.5, 0.99])
def test_truncated_parquet_is_one_clear_error(lake, keep):
    path = write(lake/'cifar10', [picture(k) for k in range(50)])
    data = path.read_bytes()
    path.write_bytes(data[:int(keep*len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r'train\.parquet is not a readable Parquet file of cifar10 .*cut short; expected a complete file.*puzzle data fetch cifar10'):
        D.load('cifar10', 'train')
    assert left_in_cache() == []


def test_damage_inside_a_parquet_never_gives_silently_other_pixels(lake):
    path = write(lake/'cifar10', [picture(k) for k in range(200)])
    (lake/'SHA256SUMS').write_text(f'{hashlib.sha256(path.read_bytes()).hexdigest()}  ./cifar10/train.parquet\n')
    data = bytearray(path.read_bytes())
    for at in range(5000, 5400): data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match='differs from SHA256SUMS'): D.load('cifar10', 'train')


def test_damaged_page_header_is_the_clear_error(lake):
    path = write(lake/'cifar10', [picture(k) for k in range(200)])
    data = bytearray(path.read_bytes())
    data[4:40] = b'\xff'*36
    path.write_bytes(data)
    with pytest.raises(ValueError, match='not a readable Parquet file of cifar10'): D.load('cifar10', 'train')
    assert left_in_cache() == []


def test_missing_column_names_the_nearest(lake):
    write(lake/'cifar10', [picture(0)], columns=('image', 'label'))
    with pytest.raises(ValueError, match="has no column 'img'; the nearest is 'image'. Expected for cifar10: img, label"): D.load('cifar10', 'train')


def test_damaged_local_file_is_not_replaced_by_the_bundled_set(lake):
    (lake/'cifar10').mkdir()
    (lake/'cifar10/train.parquet').write_bytes(b'<html>404</html>')
    with pytest.raises(ValueError, match='not a readable Parquet'): D.load('cifar10', 'train', data='auto')


# broken items

@pytest.mark.parametrize('bad, why', [
    (b'PNG, honestly', 'not a PNG, WebP or JPEG picture'), (picture(1)[:-200], ''), (picture(1, 'jpeg')[:-300], 'truncated'),
    (picture(1, size=33), 'RGB picture of 33x33'), (b'', 'no image bytes'), (None, 'no image bytes'), (picture(1, 'webp')[:-50], '')])
def test_a_broken_item_is_dropped_counted_and_named(lake, bad, why):
    blobs = [picture(k) for k in range(150)]
    blobs[70] = bad
    write(lake/'cifar10', blobs)
    ds = D.load('cifar10', 'train')
    assert [(d['row'], d['item'], d['kind']) for d in ds.dropped] == [(70, '70.png', 'broken')]
    assert why in ds.dropped[0]['why'] and ds.dropped[0]['why']
    assert len(ds) == 149 and 70 not in ds.rows
    assert np.array_equal(ds.arrays['image'][70].transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(blobs[71]))))


def test_more_than_one_percent_broken_fails_and_lists_the_first(lake):
    blobs = [picture(k) for k in range(200)]
    for k in (5, 50, 150): blobs[k] = b'nothing'
    write(lake/'cifar10', blobs)
    with pytest.raises(ValueError, match=r'3 of 200 items are broken \(1.50%, limit 1.00%\): row 5 \(5.png\).*row 50.*row 150'): D.load('cifar10', 'train')
    with pytest.raises(ValueError, match='3 of 200'): D.load('cifar10', 'train')
    assert len(D.load('cifar10', 'train', limit_rate=.02)) == 197


def test_exactly_one_percent_passes(lake):
    blobs = [picture(k) for k in range(200)]
    blobs[0] = blobs[1] = b'nothing'
    write(lake/'cifar10', blobs)
    assert D.load('cifar10', 'train').describe()['dropped'] == {'broken': 2, 'listed': 0}


def test_all_items_broken_fails_whatever_the_limit(lake):
    write(lake/'cifar10', [b'x']*20)
    with pytest.raises(ValueError, match='20 of 20 items are broken'): D.load('cifar10', 'train', limit_rate=1.)


def test_a_bug_in_the_decoder_is_not_a_broken_item(lake):
    write(lake/'cifar10', [picture(k) for k in range(5)])
    with pytest.raises(KeyError): D.load('cifar10', 'train', decoder=D.Decoder('bug', lambda row: row['imgs']))
    assert left_in_cache() == []


def test_listed_rows_are_dropped_by_name_and_do_not_count_as_broken(lake):
    write(lake/'cifar10', [picture(k) for k in range(100)])
    (lake/'cifar10/lossy_rows.json').write_text(json.dumps([{'split': 'train', 'row': r, 'path': f'{r}.png'} for r in range(30)] + [{'split': 'test', 'row': 99, 'path': ''}]))
    ds = D.load('cifar10', 'train')
    assert ds.describe()['dropped'] == {'broken': 0, 'listed': 30} and ds.rows.tolist() == list(range(30, 100))
    (lake/'cifar10/lossy_rows.json').unlink()
    again = D.load('cifar10', 'train')
    assert len(again) == 100 and again.fingerprint != ds.fingerprint and again.sha256 == ds.sha256


@pytest.mark.parametrize('text, why', [('[{"split": "train"}]', 'is damaged'), ('{', 'is damaged'), ('[{"split": "train", "row": 0, "path": "other.png"}]', 'belongs to another copy'),
    ('[{"split": "train", "row": 2}]', 'lists row 2 of train, which has 2 rows: the list belongs to another copy')])
def test_a_wrong_list_of_rows_is_an_error(lake, text, why):
    write(lake/'cifar10', [picture(0), picture(1)])
    (lake/'cifar10/lossy_rows.json').write_text(text)
    with pytest.raises(ValueError, match=why): D.load('cifar10', 'train')


def test_lenient_pillow_is_refused(lake, monkeypatch):
    from PIL import ImageFile
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    write(lake/'cifar10', [picture(0)])
    with pytest.raises(AssertionError, match='LOAD_TRUNCATED_IMAGES'): D.load('cifar10', 'train')


# cache

class DiskFull(D.NpyAppender):
    "A disk with room for 40 rows of each array."
    def append(self, block):
        if self.n+len(block) > 40: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().append(block)


def test_full_disk_leaves_no_half_cache(lake, monkeypatch):
    write(lake/'cifar10', [picture(k) for k in range(1200)])
    with monkeypatch.context() as m:
        m.setattr(D, 'NpyAppender', DiskFull)
        with pytest.raises(OSError, match='No space left on device while decoding cifar10/train into .*PUZZLE_CACHE') as e: D.load('cifar10', 'train')
    assert e.value.errno == errno.ENOSPC and left_in_cache() == []
    assert len(D.load('cifar10', 'train')) == 1200


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full on this system')
def test_a_disk_that_fills_at_the_last_flush(lake, monkeypatch):
    class LastFlush(D.NpyAppender):
        def close(self):
            with open('/dev/full', 'wb') as f: f.write(b'x'*10)
    write(lake/'cifar10', [picture(k) for k in range(3)])
    monkeypatch.setattr(D, 'NpyAppender', LastFlush)
    with pytest.raises(OSError, match='No space left on device while decoding'): D.load('cifar10', 'train')
    assert left_in_cache() == []


def test_a_damaged_entry_is_decoded_again(lake, caplog):
    write(lake/'cifar10', [picture(k) for k in range(20)])
    whole = np.array(D.load('cifar10', 'train').arrays['image'])
    [entry] = (D.cache_folder()/'decoded').iterdir()
    for damage in (lambda: os.truncate(entry/'image.npy', 5000), lambda: (entry/'meta.json').write_text('{'), lambda: (entry/'label.npy').unlink()):
        damage()
        assert np.array_equal(D.load('cifar10', 'train').arrays['image'], whole)
    assert 'damaged' in caplog.text


def test_what_a_killed_process_left_is_swept_after_a_day(lake):
    write(lake/'cifar10', [picture(0)])
    old, new = (D.cache_folder()/'decoded'/f'.aside-{n}' for n in ('old', 'new'))
    for p in (old, new): p.mkdir(parents=True)
    os.utime(old, (time.time()-90000,)*2)
    D.load('cifar10', 'train')
    assert not old.exists() and new.exists()


def test_decoder_version_and_options_change_the_fingerprint(lake):
    write(lake/'cifar10', [picture(k) for k in range(3)])
    prints = {D.load('cifar10', 'train', decoder=D.Decoder('image', D.decode_image, v, options={'size': 32, 'classes': c})).fingerprint for v, c in ((1, 10), (2, 10), (1, 11))}
    assert len(prints) == 3 and len(left_in_cache()) == 3


def test_changed_file_of_the_same_size_is_noticed(lake):
    path = write(lake/'cifar10', [picture(0)])
    first = D.load('cifar10', 'train')
    data = bytearray(path.read_bytes())
    at = data.index(b'0.png')
    data[at:at+5] = b'9.png'
    path.write_bytes(data)
    assert D.load('cifar10', 'train').sha256 != first.sha256


RACE = '''
import time, pathlib, puzzle_research.core.data as D
gate = pathlib.Path({gate!r})
def slow(row, **options):
    if not seen:
        seen.append(1); (gate/{me!r}).touch()
        while len(list(gate.iterdir())) < 2: time.sleep(.005)
    return D.decode_image(row, **options)
seen = []
ds = D.load('cifar10', 'train', decoder=D.Decoder('image', slow, options={{'size': 32, 'classes': 10}}))
print(len(ds), int(ds.arrays['image'].astype('int64').sum()))
'''


def test_two_processes_decoding_at_once_do_not_clash(lake, tmp_path):
    write(lake/'cifar10', [picture(k) for k in range(600)])
    (tmp_path/'gate').mkdir()
    both = [python(RACE.format(gate=str(tmp_path/'gate'), me=me)) for me in 'ab']
    done = [(p.communicate(timeout=120), p.returncode) for p in both]
    assert [rc for _, rc in done] == [0, 0], done
    total = sum(int(np.asarray(Image.open(io.BytesIO(picture(k)))).sum()) for k in range(600))
    assert [out.split() for (out, _), _ in done] == [['600', str(total)]]*2
    assert len(left_in_cache()) == 1


KILLED = '''
import os, signal, puzzle_research.core.data as D
n = []
def die(row, **options):
    n.append(1)
    if len(n) == 700: os.kill(os.getpid(), signal.SIGKILL)
    return D.decode_image(row, **options)
D.load('cifar10', 'train', decoder=D.Decoder('image', die, options={'size': 32, 'classes': 10}))
'''


def test_killed_in_the_middle_leaves_no_entry(lake):
    write(lake/'cifar10', [picture(k) for k in range(1000)])
    p = python(KILLED)
    p.communicate(timeout=120)
    assert p.returncode == -9 and [n for n in left_in_cache() if not n.startswith('.aside-')] == []
    assert len(D.load('cifar10', 'train')) == 1000


def test_ragged_items(lake):
    texts = ['one', '', 'naïve', 'x'*3000]*300
    (lake/'wikitext-2-v1').mkdir()
    pq.write_table(pa.table({'text': texts}), lake/'wikitext-2-v1/test.parquet')
    ds = D.load('wikitext-2-v1', 'test', decoder=D.Decoder('utf8', lambda row: {'text': np.frombuffer(row['text'].encode(), np.uint8)}, ragged=('text',)))
    assert [bytes(ds.item(i)['text']).decode() for i in range(len(ds))] == texts
    own = D.load('wikitext-2-v1', 'test')
    assert [bytes(own.item(i)['text']).decode() for i in range(len(own))] == texts
    (lake/'svamp').mkdir()
    pq.write_table(pa.table({'text': texts}), lake/'svamp/test.parquet')
    with pytest.raises(ValueError, match='svamp has no decoder of its own: pass decoder='): D.load('svamp', 'test')


# finding

def test_search_order(lake, tmp_path, monkeypatch):
    other = tmp_path/'second'
    here, there = write(lake/'cifar10', [picture(0)]), write(other/'cifar10', [picture(1)])
    monkeypatch.setenv('PUZZLE_DATA', f'{other}{os.pathsep}{lake}')
    assert D.find('cifar10', 'train') == there
    there.unlink()
    assert D.find('cifar10', 'train') == here
    here.unlink()
    assert D.find('cifar10', 'train') in (None, root()/'data/cifar10/train.parquet')


def test_a_named_folder_goes_before_the_data_folder_of_the_project(lake, tmp_path, monkeypatch):
    (tmp_path/'project').mkdir()
    monkeypatch.setenv('PUZZLE_ROOT', str(tmp_path/'project'))
    named, own = write(lake/'cifar10', [picture(0)]), write(tmp_path/'project/data/cifar10', [picture(1)])
    assert D.find('cifar10', 'train') == named
    named.unlink()
    assert D.find('cifar10', 'train') == own


def test_relative_folders_count_from_the_project_root(tmp_path, monkeypatch):
    path = write(tmp_path/'cifar10', [picture(0)])
    monkeypatch.setenv('PUZZLE_DATA', os.path.relpath(tmp_path, root()))
    monkeypatch.chdir('/')
    monkeypatch.setenv('PUZZLE_ROOT', str(Path(D.__file__).parents[2]))
    assert D.find('cifar10', 'train').resolve() == path.resolve()


def test_a_folder_that_is_not_there_is_said_once(lake, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv('PUZZLE_DATA', str(tmp_path/'typo'))
    for _ in range(3): D.find('cifar10', 'train')
    assert caplog.text.count('which is not a folder') == 1


def test_bundled_is_announced_and_recorded(lake, monkeypatch, caplog):
    monkeypatch.setattr(D, 'find', lambda name, split, real=D.find: None if name == 'cifar10' else real(name, split))
    ds = D.load('cifar10', 'train')
    assert ds.origin == 'bundled' and ds.name == 'bundled_photos' and 'not cifar10 numbers' in ds.describe()['fallback']
    assert 'USING THE BUNDLED SET' in caplog.text and 'HF_HUB_OFFLINE' in caplog.text
    with pytest.raises(FileNotFoundError, match='cifar10/train is not on this machine.*puzzle data fetch|cifar10/train is not on this machine.*PUZZLE_DATA'): D.load('cifar10', 'train', data='real')
    with pytest.raises(ValueError, match='is the bundled set'): D.load('bundled_photos', 'train', data='real')
    with pytest.raises(FileNotFoundError, match='no bundled set stands in for it.*hub has no copy in this layout'): D.load('asdiv', 'validation')


def test_manifest_entry_is_json_without_a_path_of_the_machine(lake, tmp_path):
    write(lake/'cifar10', [picture(k) for k in range(3)])
    for text in (json.dumps(D.load('cifar10', 'train').describe()), json.dumps(D.load('cifar10', 'train', data='bundled').describe())):
        assert str(tmp_path) not in text and str(root()) not in text


# hub

def elapsed(f):
    start = time.monotonic()
    f()
    return time.monotonic()-start


@pytest.fixture
def online(lake, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    for v in ('HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy', 'ALL_PROXY', 'all_proxy'): monkeypatch.delenv(v, raising=False)
    monkeypatch.setattr(D, 'find', lambda name, split, real=D.find: None if name == 'cifar10' else real(name, split))
    return monkeypatch


def both_splits():
    assert D.load('cifar10', 'train').origin == D.load('cifar10', 'test').origin == 'bundled'


def test_a_hub_that_takes_the_call_and_never_answers(online):
    D.load('bundled_photos', 'train'), D.load('bundled_photos', 'test')
    with socket.create_server(('127.0.0.1', 0)) as server:
        online.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.getsockname()[1]}')
        assert 2 < elapsed(both_splits) < 5
    assert any('no answer' in why or 'timed out' in why for why, _ in D._unreachable.values())


def test_a_name_server_that_never_answers(online):
    D.load('bundled_photos', 'train'), D.load('bundled_photos', 'test')
    stop, before = threading.Event(), set(threading.enumerate())
    def hang(*a, **k):
        stop.wait(30)
        raise socket.gaierror('released')
    online.setattr(socket, 'getaddrinfo', hang)
    assert 2 < elapsed(both_splits) < 5
    stop.set()
    for t in set(threading.enumerate())-before: t.join(5)


def test_a_closed_port_costs_nothing(online):
    D.load('bundled_photos', 'train'), D.load('bundled_photos', 'test')
    online.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    assert elapsed(both_splits) < 2


@pytest.fixture
def server(online):
    "Sets `answer`, the bytes that the endpoint sends to every call."
    class Server: answer = b''
    listener = socket.create_server(('127.0.0.1', 0))
    def serve():
        while True:
            try: c, _ = listener.accept()
            except OSError: return
            c.recv(1000)
            c.sendall(Server.answer)
            c.close()
    threading.Thread(target=serve, daemon=True).start()
    online.setenv('HF_ENDPOINT', f'http://127.0.0.1:{listener.getsockname()[1]}')
    yield Server
    listener.close()


def http(status, body=b''): return b'HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n' % (status, len(body)) + body


@pytest.mark.parametrize('answer, why', [
    (b'hello, who is there?' + bytes(10), 'hello'), (b'', 'closed|reset'), (http(b'403 Forbidden'), 'HTTP 403'), (http(b'503 Busy'), 'HTTP 503'),
    (http(b'404 Not Found'), 'HTTP 404 for .*/api/datasets/uoft-cs/cifar10'), (http(b'200 OK', b'<html>please log in</html>'), "not the hub's"), (http(b'200 OK', b'[]'), "not the hub's")])
def test_a_gateway_that_answers_instead_of_the_hub(online, server, answer, why):
    import datasets
    D.load('bundled_photos', 'train'), D.load('bundled_photos', 'test')
    def asked(*a, **k): raise AssertionError('the hub was asked')
    online.setattr(datasets, 'load_dataset', asked)
    server.answer = answer
    assert elapsed(both_splits) < 2
    with pytest.raises(ConnectionError, match=f'cifar10 cannot be fetched .*({why}).*Instead'): D.fetch('cifar10')


@pytest.fixture
def answering(online, server):
    server.answer = http(b'200 OK', b'{"id": "uoft-cs/cifar10"}')
    return online


def hub_copy(blobs, columns=('img', 'label')):
    import datasets
    rows = {columns[0]: [{'bytes': b, 'path': None} for b in blobs], columns[1]: [k % 10 for k in range(len(blobs))]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(num_classes=10)}))


def test_fetched_from_the_hub_once_then_local(answering):
    import datasets
    calls, blobs = [], [picture(k) for k in range(12)]
    answering.setattr(datasets, 'load_dataset', lambda *a, **k: calls.append((a, k)) or hub_copy(blobs))
    ds = D.load('cifar10', 'train')
    assert calls == [(('uoft-cs/cifar10', 'plain_text'), {'split': 'train', 'revision': None})]
    assert ds.origin == 'hub' and np.array_equal(ds.arrays['image'][7].transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(blobs[7]))))
    assert D.load('cifar10', 'train').fingerprint == ds.fingerprint and len(calls) == 1


def test_fetch_writes_whole_files_and_names_the_way_around(answering, tmp_path):
    import datasets
    answering.setattr(datasets, 'load_dataset', lambda *a, **k: hub_copy([picture(0)]))
    assert [p.relative_to(tmp_path/'to').as_posix() for p in D.fetch('cifar10', folder=tmp_path/'to')] == ['cifar10/train.parquet', 'cifar10/test.parquet']
    answering.setattr(datasets, 'load_dataset', lambda *a, **k: hub_copy([picture(0)], ('image', 'label')))
    with pytest.raises(ConnectionError, match="has no column 'img'; the nearest is 'image'.*Instead: put"): D.fetch('cifar10', folder=tmp_path/'other')
    assert list((tmp_path/'other').rglob('*.parquet')) == [] and list((tmp_path/'other').rglob('*.aside')) == []
    def gone(*a, **k): raise datasets.exceptions.DatasetNotFoundError('no such set')
    answering.setattr(datasets, 'load_dataset', gone)
    with pytest.raises(ConnectionError, match='DatasetNotFoundError: no such set.*PUZZLE_DATA'): D.fetch('cifar10')
    assert D.load('cifar10', 'train').origin == 'bundled'
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    answering.setattr(datasets, 'load_dataset', full)
    with pytest.raises(OSError, match='No space') as e: D.load('cifar10', 'train')
    assert e.value.errno == errno.ENOSPC


# the rest

def test_check_reports_and_never_stops(lake):
    write(lake/'cifar10', [picture(k) for k in range(10)])
    (lake/'cifar10/test.parquet').write_bytes(b'half')
    (lake/'corrupt_audio').mkdir()
    (lake/'corrupt_audio/a.flac').write_bytes(b'fLaC')
    (lake/'gsm8k').mkdir()
    pq.write_table(pa.table({'question': ['1+1?'], 'answers': ['2']}), lake/'gsm8k/train.parquet')
    lines = {(l['name'], l.get('split')): l for l in D.check()}
    assert lines['cifar10', 'train']['rows'] == 10 and lines['cifar10', 'train']['status'] == 'ok'
    assert 'cut short' in lines['cifar10', 'test']['status']
    assert "has no column 'answer'; the nearest is 'answers'" in lines['gsm8k', 'train']['status']
    assert lines['corrupt_audio', '*.flac']['rows'] == 1
    assert lines['bundled_photos', 'test']['status'] == 'ok' and 'not found' in lines['re-arc', None]['status']
    assert {n for n, _ in lines} == set(D.SOURCES)


def test_bundled_photos_are_cut_from_the_pictures_as_the_tool_says(tmp_path, monkeypatch):
    import importlib.util
    spec = importlib.util.spec_from_file_location('make_bundled_images', root()/'tools/make_bundled_images.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    cut = {path: p for split, name, package, file, sha in tool.PICTURES for path, p in tool.patches(tool.picture(package, file, sha), name, split)}
    assert tuple(p[1] for p in tool.PICTURES) == D.PHOTOS
    stored = 0
    for split in ('train', 'test'):
        path = D.find('bundled_photos', split)
        ds, table = D.load('bundled_photos', split), pq.read_table(path)
        assert table.schema.equals(pa.schema([('img', pa.struct([('bytes', pa.binary()), ('path', pa.string())])), ('label', pa.int64())]))
        paths = [r['path'] for r in table['img'].to_pylist()]
        assert len(ds) == D.SOURCES['bundled_photos'].splits[split] and all(p.startswith(split) for p in paths)
        for i, p in enumerate(paths): assert np.array_equal(ds.arrays['image'][i].transpose(1, 2, 0), cut.pop(p)), p
        stored += path.stat().st_size
    assert not cut and stored < 4e6
    with pytest.raises(ValueError, match='is another picture'): tool.picture('skimage.data', 'chelsea.png', 'f'*64)


def test_holdout_is_frozen():
    train, valid = D.holdout(50000, 5000, 0)
    assert len(train) == 45000 and len(np.union1d(train, valid)) == 50000 and not np.isin(valid, train).any()
    assert valid[:5].tolist() == FROZEN
    for n in (0, -1, 50000):
        with pytest.raises(ValueError, match='n_valid'): D.holdout(50000, n)


FROZEN = [14, 22, 24, 28, 64]


def test_import_is_light():
    p = python("import sys, puzzle_research.core.data; print([m for m in ('torch', 'datasets', 'pandas', 'pyarrow', 'PIL', 'matplotlib') if m in sys.modules])")
    assert p.communicate(timeout=60)[0].strip() == '[]'


@pytest.mark.skipif(not any((d/'cifar10/train.parquet').exists() for d in D.data_folders()), reason='no CIFAR-10 on this machine: put it on PUZZLE_DATA')
def test_cifar10_decodes_well_under_a_minute(monkeypatch, tmp_path):
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    start, threads = time.process_time(), threading.active_count()
    train, test = D.load('cifar10', 'train', data='real'), D.load('cifar10', 'test', data='real')
    assert time.process_time()-start < 45 and threading.active_count() <= threads
    assert len(train)+len(train.dropped) == 50000 and len(test)+len(test.dropped) == 10000
    assert np.allclose(train.arrays['image'].mean((0, 2, 3))/255, (.4914, .4822, .4465), atol=5e-4)
    assert np.bincount(test.arrays['label']).max() == 1000
    assert elapsed(lambda: D.load('cifar10', 'train')) < 1


def test_bundled_prose_is_what_the_tool_makes(tmp_path, monkeypatch):
    import importlib.util
    spec = importlib.util.spec_from_file_location('make_bundled_prose', root()/'tools/make_bundled_prose.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setenv('PUZZLE_CACHE', str(tmp_path))
    stored = {s: [bytes(ds.item(i)['text']).decode() for i in range(len(ds))] for s in ('train', 'validation', 'test') if (ds := D.load('bundled_prose', s))}
    assert {s: len(rows) for s, rows in stored.items()} == D.SOURCES['bundled_prose'].splits
    assert sum(len(set(rows)) for rows in stored.values()) == len(set().union(*stored.values()))    # no paragraph in two splits, none twice
    if hashlib.sha256(Path(tool.source.__file__).read_bytes()).hexdigest() != tool.SHA256: pytest.skip('another Python: another reference')
    assert tool.splits() == stored
