"""Faults are injected in tests/faults, and every try is counted.

The fixture `faults` counts; `pytest tests/faults -m 'slow or not slow' --reliability` (`make reliability`)
writes the table reports/reliability.md from what was counted."""
import time
from collections import Counter

import pytest

from puzzle_research.core.config import root
from puzzle_research.core.table import Table

OUTCOMES = ('right', 'refused', 'lost')
REPORT = root()/'reports'/'reliability.md'
_counted, _lost, _tests, _began = Counter(), [], [], time.monotonic()


class Faults:
    "What came of the faults that one test injects."
    def __init__(self):
        self.tries, self.lost = Counter(), []

    def count(self, what, fault, outcome, said=''):
        """One try: `what` was damaged, `fault` is how, `outcome` is `right` (the result is what it would have
        been), `refused` (one clear line, nothing else changed) or `lost` (anything else; `said` tells)."""
        assert outcome in OUTCOMES, outcome
        self.tries[what, fault, outcome] += 1
        if outcome == 'lost':
            self.lost.append(f'{what}, {fault}: {said}')


@pytest.fixture
def faults(request):
    "Counts the tries of this test, which fails where one is lost or none was made."
    counted = Faults()
    yield counted
    tries = [[*key, n] for key, n in counted.tries.items()]
    request.node.user_properties.append(('faults', [tries, counted.lost]))
    assert tries, 'no fault was injected'
    assert not counted.lost, f'{len(counted.lost)} lost, first: {counted.lost[0]}'


def pytest_addoption(parser):
    parser.addoption('--reliability', action='store_true',
                     help='write reports/reliability.md from the faults injected')


def pytest_runtest_logreport(report):
    "Also in the process that gathers what others ran: properties travel with the report."
    if report.when == 'teardown':
        for tries, lost in (value for name, value in report.user_properties if name == 'faults'):
            _counted.update({tuple(key): n for *key, n in tries})
            _lost.extend(lost)
            _tests.append(report.nodeid)


def pytest_sessionfinish(session):
    in_worker = hasattr(session.config, 'workerinput')
    if session.config.getoption('--reliability') and _counted and not in_worker:
        REPORT.write_text(rendered(_counted, _lost, len(_tests), time.monotonic() - _began))


def _row(name, outcomes):
    tries = sum(outcomes.values())
    shown = (tries, tries - outcomes['lost'], outcomes['refused'], outcomes['lost'])
    return [*name, *(f'{n:,}' for n in shown)]


def rendered(counted, lost, tests, seconds) -> str: # markdown
    "The table: a line for each thing and fault, and one for all."
    by_fault, whole = {}, Counter()
    for (what, fault, outcome), n in sorted(counted.items()):
        by_fault.setdefault((what, fault), Counter())[outcome] += n
        whole[outcome] += n
    rows = [_row(name, outcomes) for name, outcomes in by_fault.items()]
    head = ['what', 'fault', 'tries', 'survived', 'of these refused', 'lost']
    table = Table(head, [_row(('**all**', ''), whole), *rows], right=(2, 3, 4, 5)).markdown()
    claim = 'Faults injected on purpose, and what came of them. Written by `make reliability`.'
    survived = ('*Survived*: the result is what it would have been without the fault, or, where nothing can '
                'be done, one line says what is wrong and nothing else has changed (*refused*).')
    listed = '\n'.join(f'- {text}' for text in lost)
    said = f'\n\n## Lost\n\n{listed}' if lost else ''
    took = f'Counted by {tests} tests of `tests/faults` in {seconds/60:.0f} minutes.'
    return f'# Reliability\n\n> {claim}\n\n{survived} {took}\n\n{table}{said}\n'
