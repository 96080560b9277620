"One network over three modalities: what retrieval, masks and the network must do, and what they refuse."
import math

import pytest
import torch
import torch.nn.functional as F

from puzzle_research.modalities.items import (
    ENDS, MODALITIES, Encoded, Part, codecs, encoded, other_language, pictures, sounds, spoken_anew, texts,
    tones, turned)
from puzzle_research.modalities.judged import by_place, diversity, judged, learned_judge, texts_judged
from puzzle_research.modalities.measures import by_nearest_mean, few_shot, mean_of, retrieval, six_directions
from puzzle_research.modalities.network import Trimodal, from_tokens, to_tokens
from puzzle_research.modalities.phrases import NOUNS, NUMBERS, meanings, number_in, phrases, split_of
from puzzle_research.modalities.training import (
    TrimodalBatches, attraction, coarse_places, orders, trimodal_loss, writing_loss)
from puzzle_research.modalities.translation import Pairs, Writers, drawn, train_writers


def tiny(**sizes):
    torch.manual_seed(0)
    return Trimodal(**dict(width=16, layers=1, narrow=8, dim=16) | sizes).eval()


def digits(n, seed=0):
    return torch.randint(0, 10, (n, 30, 30), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def noise_parts(n=20):
    return {m: Encoded(digits(2*n, k).view(n, 2, 30, 30), torch.arange(n) % 10)
            for k, m in enumerate(MODALITIES)}


COARSE = {m: torch.arange(25) < 3 for m in ('picture', 'sound')}


# retrieval

def test_embeddings_that_are_their_classes_find_everything():
    y = torch.arange(10).repeat(3)
    sides = {m: (F.one_hot(y, 10).float(), y) for m in MODALITIES}
    found = six_directions(sides)
    assert len(found) == 6 and mean_of(found) == mean_of(found, 'map') == 100


def test_embeddings_of_the_next_class_find_nothing():
    y = torch.arange(10)
    x = F.one_hot(y, 10).float()
    found = retrieval(x, y, x.roll(1, 0), y)
    assert found['p_at_1'] == 0


def test_noise_is_at_chance():
    g = torch.Generator().manual_seed(1)
    a, b = F.normalize(torch.randn(2, 1000, 32, generator=g), dim=2)
    y = torch.arange(1000) % 10
    found = retrieval(a, y, b, y)
    assert abs(found['p_at_1'] - 10) < 4 and abs(found['map'] - 10) < 2


def test_average_precision_by_hand():
    "Right answers at places 1, 3 and 4 of four: (1 + 2/3 + 3/4)/3."
    found = retrieval(torch.tensor([[1., 0]]), torch.tensor([0]),
                      torch.tensor([[1., 0], [.9, .1], [.8, .2], [.7, .3]]), torch.tensor([0, 1, 0, 0]))
    assert found['p_at_1'] == 100 and math.isclose(found['map'], 100*(1 + 2/3 + 3/4)/3)


def test_a_class_that_the_other_side_lacks_is_left_out():
    y, x = torch.arange(10), torch.eye(10)
    found = retrieval(x, y, x[:9], y[:9])
    assert found == dict(p_at_1=100., map=100., n=9, left_out=1)
    with pytest.raises(ValueError, match='share no class'):
        retrieval(x[9:], y[9:], x[:9], y[:9])


def test_a_missing_modality_is_named():
    y, x = torch.arange(10), torch.eye(10)
    with pytest.raises(ValueError, match='sound is missing'):
        six_directions(dict(picture=(x, y), text=(x, y)))


def test_nearest_means_and_probes():
    y, x = torch.arange(10).repeat(6), torch.eye(10).repeat(6, 1)
    assert by_nearest_mean(x, y, x, y) == 100
    assert by_nearest_mean(x, y, x.roll(1, 1), y) == 0
    assert few_shot(x, y, x, y, 5, draws=2)[0] == 100
    assert few_shot(x, y, x, y, 7) is None


# items

def test_splits_share_no_phrase_no_noun_and_no_picture():
    splits = ('train', 'validation', 'test')
    by_split = {s: {p.text for p in phrases(s)} for s in splits}
    assert not by_split['train'] & by_split['test'] and not by_split['validation'] & by_split['test']
    assert sum(map(len, by_split.values())) == len(meanings()) == len(phrases())
    for nouns in NOUNS.values():
        kept = {s: {n for k, n in enumerate(nouns) if split_of(k) == s} for s in splits}
        assert all(kept.values()) and sum(map(len, kept.values())) == len(set(nouns))
    assert ENDS['train'][1] == ENDS['validation'][0] and ENDS['validation'][1] == ENDS['test'][0]
    with pytest.raises(ValueError, match='unknown split'):
        phrases('dev')


@pytest.mark.parametrize('text, number', [
    ('page two', 2), ('pagina 7, la', 7), ('lesson ix', 9), ('page', None), ('two or three', None),
    ('two two', None), ('twofold', None)])
def test_the_number_in_a_text(text, number):
    assert number_in(text) == number


def test_no_number_word_stands_for_two_numbers():
    assert all(number_in(p.text) == p.digit for p in phrases('test')) and len(NUMBERS) > 60


def test_puzzles_of_an_unknown_recipe_are_refused():
    with pytest.raises(ValueError, match="unknown recipe 'best'; known: grid, stream"):
        codecs('best')


def test_nothing_cannot_be_encoded():
    with pytest.raises(ValueError, match='no picture to encode'):
        encoded(Part('picture', '', torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0)), None)


def test_the_first_view_is_the_item_itself_and_views_repeat():
    codec, part = codecs('grid')['picture'], pictures('test').only(range(3))
    one, two = (encoded(part, codec, views=3) for _ in range(2))
    assert one.puzzles.equal(two.puzzles) and one.puzzles[:, 0].equal(codec.encode(part.items))
    assert not one.puzzles[:, 1].equal(one.puzzles[:, 0])
    assert encoded(texts('test', 3), codecs('grid')['text'], views=3).puzzles.shape[1] == 1


def test_changed_items_stay_items():
    g = torch.Generator().manual_seed(0)
    heard, seen = tones('test', 1), pictures('test').only(range(4))
    anew = spoken_anew(heard.items, g)
    assert anew.shape == heard.items.shape and anew.isfinite().all() and not anew.equal(heard.items)
    assert turned(seen.items, g).shape == seen.items.shape


def test_tones_stand_in_for_speech_and_real_asks_for_it(lake):
    assert sounds('test', 'auto', 1).source == other_language('test', 'auto', 1).source == 'generated tones'
    assert not sounds('test', 'bundled', 1).items.equal(other_language('test', 'bundled', 1).items)
    with pytest.raises(FileNotFoundError):
        sounds('test', 'real')


# network

@pytest.mark.parametrize('modality', MODALITIES)
def test_tokens_hold_every_digit_that_is_read(modality):
    puzzles = digits(3)
    back = from_tokens(to_tokens(puzzles, modality), modality)
    rows = slice(0, 2) if modality == 'text' else slice(0, 30)
    assert back[:, rows].equal(puzzles[:, rows])


def test_an_embedding_does_not_hang_on_its_batch():
    model, puzzles = tiny(), digits(6)
    for m in MODALITIES:
        together = model.embed(puzzles, m)
        assert torch.allclose(together[2:3], model.embed(puzzles[2:3], m), atol=1e-5)
        assert torch.allclose(together.norm(dim=1), torch.ones(6))


def test_untold_equals_told_by_its_guess():
    model, puzzles = tiny(), digits(30)
    torch.nn.init.normal_(model.guess.weight, std=3.)
    guess = model.modality_logits(puzzles).argmax(1)
    assert len(guess.unique()) > 1
    untold = model.embed(puzzles)
    for k, m in enumerate(MODALITIES):
        mine = guess == k
        assert torch.allclose(untold[mine], model.embed(puzzles, m)[mine], atol=1e-5)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="unknown modality 'smell'"):
        tiny().embed(digits(1), 'smell')
    with pytest.raises(ValueError):
        tiny().embed(digits(1) + 5, 'picture')


def test_saved_and_loaded_it_says_the_same(tmp_path):
    model = tiny()
    model.save(tmp_path/'m.safetensors')
    assert Trimodal.load(tmp_path/'m.safetensors').specimen().equal(model.specimen())
    codecs('grid')['text'].save(tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match='other weights'):
        Trimodal.load(tmp_path/'other.safetensors')


# training

def test_attraction_is_ln_n_at_chance_and_falls_to_the_share_of_positives():
    y = torch.arange(4).repeat(3)
    assert math.isclose(attraction(F.normalize(torch.ones(12, 4), dim=1), y), math.log(11), rel_tol=1e-5)
    assert math.isclose(attraction(F.one_hot(y, 4).float(), y, .02), math.log(2), rel_tol=1e-5)
    assert attraction(torch.eye(4), torch.arange(4)) == 0


def test_a_class_that_is_absent_is_named():
    parts = noise_parts()
    parts['sound'] = Encoded(parts['sound'].puzzles, parts['sound'].labels.clamp(max=8))
    with pytest.raises(ValueError, match='sound: no item of class 9'):
        TrimodalBatches(parts, COARSE, 10)


def test_a_batch_is_a_function_of_its_step():
    a, b = (TrimodalBatches(noise_parts(), COARSE, 20, seed=3) for _ in range(2))
    assert all(x.equal(b(7)[k]) for k, x in a(7).items())
    assert any(not x.equal(a(8)[k]) for k, x in a(7).items())


def test_two_processes_take_a_batch_between_them():
    whole, halves = TrimodalBatches(noise_parts(), COARSE, 20), [TrimodalBatches(noise_parts(), COARSE, 20)
                                                                 for _ in range(2)]
    for rank, half in enumerate(halves):
        half.share(rank, 2)
    for name, x in whole(5).items():
        assert torch.cat([half(5)[name] for half in halves]).equal(x), name


def test_first_digits_come_before_the_others_and_texts_from_the_left():
    g = torch.Generator().manual_seed(0)
    order = orders(2, 'sound', COARSE['sound'], g)
    assert (order[..., :3] < 1).all() and (order[..., 3:] >= 1).all()
    assert (orders(1, 'text', None, g).flatten().diff() > 0).all()
    assert coarse_places(codecs('grid')['picture']).sum() == 3


def test_a_known_digit_costs_nothing():
    "Where the cut is at the end, nothing is hidden; the loss is 0 and has no gradient."
    model = tiny()
    batch = TrimodalBatches(noise_parts(), COARSE, 10)(0) | dict(cut=torch.full((10,), 2.))
    z = F.normalize(torch.randn(10, 16), dim=1)
    assert all(writing_loss(model, batch, m, z) == 0 for m in MODALITIES)


def test_one_batch_is_learned():
    model = tiny(dim=32, width=32).train()
    batch = TrimodalBatches(noise_parts(), COARSE, 20, wrong=0.)(0)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    before = trimodal_loss(model, batch)[1]
    for _ in range(25):
        loss, after = trimodal_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert after['attraction'] < before['attraction'] - .3 and after['guess'] < before['guess']
    assert all(after[f'write_{m}'] < before[f'write_{m}'] for m in MODALITIES)


# translation

def test_every_symbol_is_written_and_the_same_seed_writes_the_same(tmp_path):
    torch.manual_seed(0)
    writers, z = Writers(COARSE, 16).eval(), F.normalize(torch.randn(3, 16), dim=1)
    writers.save(tmp_path/'writers.safetensors')
    again = Writers.load(tmp_path/'writers.safetensors').eval()
    for m in MODALITIES:
        made = writers.translate(z, m, seed=1)
        assert made.shape == (3, 30, 30) and made.max() <= 9
        assert made.equal(again.translate(z, m, seed=1))
        assert not made.equal(writers.translate(z, m, 2., seed=2))
    with pytest.raises(ValueError, match="unknown modality 'smell'; known: picture, sound, text"):
        writers.translate(z, 'smell')


def test_writers_learn_what_an_embedding_says():
    "Two kinds of puzzles for even and odd numbers: each is written from its embedding, in all its digits."
    labels = torch.arange(40) % 10
    puzzles = digits(2)[labels % 2][:, None]
    parts = {m: Encoded(puzzles, labels) for m in COARSE} | dict(text=Encoded(puzzles % 9, labels))
    z = F.one_hot(labels % 2, 16).float()
    torch.manual_seed(0)
    writers = Writers(COARSE, 16)
    train_writers(writers, Pairs(dict(picture=(z, labels)), parts, 64), 120, 1e-2)
    for m in COARSE:
        made = writers.eval().translate(z[:2], m, .3)
        assert (made == puzzles[:2, 0]).float().mean() > .95
    written = writers.translate(z[:2], 'text', .3)[:, :2]
    assert (written == (puzzles[:2, 0] % 9)[:, :2]).float().mean() > .9


def test_pairs_are_of_one_number_and_a_missing_one_is_named():
    labels = torch.arange(30) % 10
    puzzles = labels.view(-1, 1, 1, 1).expand(-1, 1, 30, 30).to(torch.uint8)
    parts = dict(picture=Encoded(puzzles, labels))
    known = {m: (F.one_hot(labels, 16).float(), labels) for m in ('sound', 'text')}
    z, tokens = Pairs(known, parts, 50)(3)['picture']
    assert z.argmax(1).equal(tokens[:, 0, 0]) and len(tokens.unique()) == 10
    with pytest.raises(ValueError, match='picture: no item of class 7'):
        Pairs(known, dict(picture=Encoded(digits(20)[:, None], labels[:20].masked_fill(labels[:20] == 7, 1))))


def test_what_is_drawn_by_place_is_of_the_class():
    labels = torch.arange(20) % 10
    puzzles = labels.view(-1, 1, 1).expand(-1, 30, 30).to(torch.uint8)
    asked = torch.tensor([3, 3, 8])
    assert by_place(puzzles, labels, asked, 'picture')[:, 0, 0].equal(asked.to(torch.uint8))


def test_copies_are_not_new_and_one_picture_is_not_diverse():
    part = pictures('train').only(range(200))
    judge = learned_judge(part.items[:, :1].float()/127.5 - 1, part.labels, 60)
    real = part.items[100:], part.labels[100:]
    copies = judged(judge, part.items[:40], part.labels[:40], *real, part.items[:100])
    same, number = part.items[:1].expand(20, -1, -1, -1), part.labels[:1].expand(20)
    one = judged(judge, same, number, *real, part.items[100:])
    assert copies['recognised'] > 80 and copies['novelty'] < .05 and copies['diversity'] > .5
    assert one['diversity'] == 0 and one['novelty'] > .5


def test_texts_count_only_to_the_letter():
    found = texts_judged(['page two', 'page tw', 'page nine'], torch.tensor([2, 2, 2]), ['page two'])
    assert math.isclose(found['exact'], 100/3) and math.isclose(found['new'], 200/3)


def test_a_low_temperature_draws_the_likeliest():
    logits = torch.tensor([[0., 1, 3], [2, 1, 0]]).expand(50, 2, 3)
    g = torch.Generator().manual_seed(0)
    assert drawn(logits, 0., g).unique(dim=0).tolist() == [[2, 0]]
    assert len(drawn(logits, 2., g).unique(dim=0)) > 3


def test_a_prototype_has_no_diversity():
    y = torch.arange(10).repeat(5)
    assert diversity(F.one_hot(y, 10).float(), y) == 0
    assert math.isclose(diversity(torch.tensor([[0.], [2.], [4.]]), torch.zeros(3)), 8/3, rel_tol=1e-6)
