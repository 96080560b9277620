"The hub: one that never answers, one that answers something else, and what is fetched."
import errno, functools, socket, threading

import datasets, numpy as np, pytest

import puzzle_research.core.data as D
import puzzle_research.core.hub as H
from shared import pixels, png

PROXIES = ('HTTP_PROXY', 'HTTPS_PROXY', 'http_proxy', 'https_proxy', 'ALL_PROXY', 'all_proxy')


@pytest.fixture
def online(lake, no_cifar10, monkeypatch):
    "A machine without CIFAR-10 that may ask the hub, for a third of a second."
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(H, 'hub_problem', functools.partial(H.hub_problem, timeout=.3))
    return monkeypatch


@pytest.fixture
def asked(monkeypatch):
    "The calls to the hub, in threads that may outlive their patience."
    calls, ask = [], H._ask
    monkeypatch.setattr(H, '_ask', lambda *args: calls.append(args) or ask(*args))
    return calls


def both_splits():
    assert D.load('cifar10', 'train').origin == D.load('cifar10', 'test').origin == 'bundled'


def test_a_hub_that_takes_the_call_and_never_answers(online, asked):
    with socket.create_server(('127.0.0.1', 0)) as server:
        online.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.getsockname()[1]}')
        both_splits()
    assert len(asked) == 1                           # the second split does not wait again
    assert any('no answer' in why or 'timed out' in why for why, _ in H.UNREACHABLE.values())


def test_a_name_server_that_never_answers(online, asked):
    released, before = threading.Event(), set(threading.enumerate())
    def hang(*args, **kwargs):
        released.wait(30)
        raise socket.gaierror('released')
    online.setattr(socket, 'getaddrinfo', hang)
    both_splits()
    assert len(asked) == 1
    released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


def test_a_closed_port_is_not_asked_twice(online, asked):
    online.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    both_splits()
    assert len(asked) == 1


@pytest.fixture
def server(online):
    "Sends `answer`, bytes, to every call."
    class Server:
        answer = b''
    listener = socket.create_server(('127.0.0.1', 0))
    def serve():
        while True:
            try:
                call, _ = listener.accept()
            except OSError:
                return
            call.recv(1000)
            call.sendall(Server.answer)
            call.close()
    threading.Thread(target=serve, daemon=True).start()
    online.setenv('HF_ENDPOINT', f'http://127.0.0.1:{listener.getsockname()[1]}')
    yield Server
    listener.close()


def http(status, body=b''):
    head = b'HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n'
    return head % (status, len(body)) + body


@pytest.mark.parametrize('answer, why', [
    (b'hello, who is there?' + bytes(10), 'hello'),
    (b'', 'closed|reset'),
    (http(b'403 Forbidden'), 'HTTP 403'),
    (http(b'503 Busy'), 'HTTP 503'),
    (http(b'404 Not Found'), 'HTTP 404 for .*/api/datasets/uoft-cs/cifar10'),
    (http(b'200 OK', b'<html>please log in</html>'), "not the hub's"),
    (http(b'200 OK', b'[]'), "not the hub's"),
])
def test_a_gateway_that_answers_instead_of_the_hub(online, server, answer, why):
    def never(*args, **kwargs):
        raise AssertionError('the hub was asked for the data')
    online.setattr(datasets, 'load_dataset', never)
    server.answer = answer
    both_splits()
    with pytest.raises(ConnectionError, match=f'cifar10 cannot be fetched .*({why}).*Instead'):
        D.fetch('cifar10')


@pytest.fixture
def answering(online, server):
    server.answer = http(b'200 OK', b'{"id": "uoft-cs/cifar10"}')
    return online


def hub_copy(files, columns=('img', 'label')):
    image, label = columns
    rows = {image: [dict(bytes=b, path=None) for b in files], label: [k % 10 for k in range(len(files))]}
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(num_classes=10)})
    return datasets.Dataset.from_dict(rows, features=features)


def test_fetched_from_the_hub_once_then_local(answering):
    calls, files = [], [png(k) for k in range(12)]
    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return hub_copy(files)
    answering.setattr(datasets, 'load_dataset', load_dataset)
    ds = D.load('cifar10', 'train')
    assert calls == [(('uoft-cs/cifar10', 'plain_text'), dict(split='train', revision=None))]
    assert ds.origin == 'hub' and np.array_equal(ds.arrays['image'][7], pixels(files[7]))
    assert D.load('cifar10', 'train').fingerprint == ds.fingerprint and len(calls) == 1


def test_fetch_writes_whole_files(answering, tmp_path):
    answering.setattr(datasets, 'load_dataset', lambda *args, **kwargs: hub_copy([png(0)]))
    found = [p.relative_to(tmp_path/'to').as_posix() for p in D.fetch('cifar10', folder=tmp_path/'to')]
    assert found == ['cifar10/train.parquet', 'cifar10/test.parquet']
    other = hub_copy([png(0)], ('image', 'label'))
    answering.setattr(datasets, 'load_dataset', lambda *args, **kwargs: other)
    with pytest.raises(ConnectionError, match="has no column 'img'; the nearest is 'image'.*Instead: put"):
        D.fetch('cifar10', folder=tmp_path/'other')
    assert [p for p in (tmp_path/'other').rglob('*') if p.is_file()] == []


def test_what_the_hub_lacks_is_replaced_and_a_full_disk_is_not(answering):
    def fails(error):
        def load_dataset(*args, **kwargs):
            raise error
        answering.setattr(datasets, 'load_dataset', load_dataset)
    fails(datasets.exceptions.DatasetNotFoundError('no such set'))
    with pytest.raises(ConnectionError, match='DatasetNotFoundError: no such set.*PUZZLE_DATA'):
        D.fetch('cifar10')
    assert D.load('cifar10', 'train').origin == 'bundled'
    fails(OSError(errno.ENOSPC, 'No space left on device'))
    with pytest.raises(OSError, match='No space') as e:
        D.load('cifar10', 'train')
    assert e.value.errno == errno.ENOSPC
