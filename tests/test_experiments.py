"Every experiment, run once at budget=test with `puzzle run`: what it leaves behind."
import json

import pytest
import torch

from puzzle_research.core import publish
from puzzle_research.core.config import root
from puzzle_research.core.report import render

from shared import CHOSEN

EXPERIMENTS = sorted(path.stem for path in (root()/'nbs').glob('[0-9]*.ipynb'))


GRIDS = ('01_vision_puzzle', '02_audio_puzzle', '03_language_puzzle')
RUNS = {name: (name, CHOSEN.get(name, {})) for name in EXPERIMENTS}
RUNS |= {f'{name}.grid': (name, dict(seed=3)) for name in GRIDS}


@pytest.fixture(scope='module', params=RUNS)
def run(request, finished_run):
    system, chosen = RUNS[request.param]
    return finished_run(system, **chosen)


def test_it_ends_well_and_holds_its_files(run):
    assert run.status == 'ok'
    names = {path.name for path in run.dir.iterdir()}
    assert names >= {'manifest.json', 'config.json', 'summary.json', 'report.md', 'notebook.ipynb', 'log.txt',
                     'figures', 'checkpoints'}
    counted = run.system == '03_language_puzzle' and run.config['recipe'] == 'grid'   # nothing is trained
    assert counted or 'metrics.jsonl' in names
    own = run.config['recipe'] == 'grid'
    assert run.config.items() >= ({} if own else CHOSEN.get(run.system, {})).items()


def test_its_numbers_have_units_and_its_bars_are_judged(run):
    metrics = run.summary['metrics'].values()
    assert all(m['unit'] and m['direction'] in ('min', 'max', 'none') for m in metrics)
    assert run.summary['criteria'] and run.summary['baselines']


def test_its_figures_have_captions(run):
    drawn = {path.stem for path in (run.dir/'figures').glob('*.png')}
    captions = json.loads((run.dir/'figures'/'captions.json').read_text())
    assert drawn and captions.keys() == drawn and all(captions.values())


def test_its_report_is_rendered_from_its_files(run):
    assert (run.dir/'report.md').read_text() == render(run.dir)


def test_its_notebook_shows_no_warning(run):
    cells = json.loads((run.dir/'notebook.ipynb').read_text())['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    said = ''.join(text for o in outputs if o.get('name') == 'stderr' for text in o['text'])
    assert 'Warning' not in said, said


def says(model):
    "What a model makes of the same question each time."
    if hasattr(model, 'specimen'):
        return model.specimen()
    return model.decode(torch.arange(2*900).view(2, 30, 30).remainder(10).to(torch.uint8))


def test_its_models_come_back_to_the_bit_and_would_be_packed(run, tmp_path, monkeypatch):
    kinds = [kind for kind in publish.models_of(run.system) if (run.dir/kind.in_run).exists()]
    assert kinds or run.system not in GRIDS
    for kind in kinds:
        model = kind.from_pretrained(run.dir)
        again = kind.from_pretrained(model.save_pretrained(tmp_path/kind.__name__))
        assert says(again) == says(model) if isinstance(says(model), list) else says(again).equal(says(model))
    assert publish.weights_of(run.dir) == {}             # of budget test
    monkeypatch.setattr(publish, 'worth_shipping', lambda manifest: True)
    assert len(publish.weights_of(run.dir)) == sum(getattr(kind, 'ships', True) for kind in kinds)
