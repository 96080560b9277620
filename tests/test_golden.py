"""The packaged codecs write the digits they wrote when the files in golden/ were made, and read them back.

Twenty items of each kind, of the bundled data. `*_first` were written by version 0.1: an encoder may come to
choose otherwise, with a word in the change log, but what was written once is read for ever."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from puzzle_research.audio_puzzle import AudioPuzzle, mel
from puzzle_research.codec.files import weights_id
from puzzle_research.core.data import load
from puzzle_research.core.model_hub import weights_path
from puzzle_research.language_puzzle import LanguagePuzzle
from puzzle_research.text.any_text import decode_any, encode_any
from puzzle_research.vision_puzzle import VisionPuzzle

GOLDEN = Path(__file__).parent/'golden'


def golden(name): # -> dict of tensors
    with np.load(GOLDEN/f'{name}.npz', allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def bundled(name, column): # -> tensor of the first twenty test items
    return torch.from_numpy(np.array(load(name, 'test', 'bundled').arrays[column][:20]))


@pytest.fixture(scope='module')
def pictures():
    return bundled('cifar10', 'image'), VisionPuzzle.from_pretrained(recipe='stream'), golden('vision')


@pytest.fixture(scope='module')
def sounds():
    codec = AudioPuzzle.from_pretrained(recipe='stream')
    return mel(bundled('speech_commands', 'sound')), codec, golden('audio')


@pytest.fixture(scope='module')
def texts():
    codec = LanguagePuzzle.from_pretrained(recipe='stream')
    return json.loads((GOLDEN/'text.json').read_text()), codec, golden('text')


@pytest.mark.parametrize('kind', ['pictures', 'sounds', 'texts'])
def test_the_same_digits_are_written(kind, request):
    items, codec, want = request.getfixturevalue(kind)
    assert torch.equal(codec.encode(items), want['digits'])


@pytest.mark.parametrize('name', ['vision', 'vision_first'])
def test_pictures_are_read_to_the_byte(pictures, name):
    codec, want = pictures[1], golden(name)
    assert torch.equal(codec.decode(want['digits']), want['decoded'])


@pytest.mark.parametrize('name', ['audio', 'audio_first'])
def test_sounds_are_read_to_a_64th_of_a_decibel(sounds, name):
    "The polish at the end is a network in floats, whose last bits are the machine's affair."
    codec, want = sounds[1], golden(name)
    read = (codec.decode(want['digits'])*64).round()
    assert (read - want['decoded']).abs().max() <= 1


def test_texts_are_read_to_the_character(texts):
    strings, codec, want = texts
    assert codec.decode(want['digits']) == strings


@pytest.mark.parametrize('model', ['learned', 'plain', 'bytes'])
def test_any_text_is_written_and_read_as_it_was(model):
    "Seven thousand characters in ten scripts and code; and what the two models that know nothing write."
    with np.load(GOLDEN/'any_text.npz', allow_pickle=False) as stored:
        digits, text = stored[model], stored[f'{model}_text'].tobytes().decode()
    assert decode_any(digits) == text
    if model != 'bytes':                         # which another model writes shorter today
        assert np.array_equal(encode_any(text), digits)


@pytest.mark.parametrize('name, first', [
    ('vision', 'e52fad2343bc79b9'), ('audio', '93a7348c9e7a0771'), ('language', 'f54894718616c87d')])
def test_weights_that_were_sealed_anew_keep_their_name(name, first):
    "Puzzle files say which weights wrote them, and are read by no others."
    assert weights_id(weights_path(f'{name}_puzzle')) == first
