"""Faults are injected in tests/faults, and every try is counted.

The fixture `faults` counts, `costs` keeps what was measured. With `--reliability` what each test counted goes
into reports/reliability.json, in place of what it counted before, and reports/reliability.md is rendered from
there. `make reliability` runs them all, from an empty file."""
from collections import Counter

import pytest

from puzzle_research.core.config import root
from puzzle_research.core.files import read_json, write_json
from puzzle_research.core.table import Table

OUTCOMES = ('right', 'refused', 'lost')
REPORT = root()/'reports'/'reliability.md'
_counted = {} # name of a test -> what it counted


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


class Costs:
    "What safety costs, measured by one test. A clock fails no test: what is above its bar is marked."
    def __init__(self, command):
        self.rows, self.command = [], command

    def _put(self, what, seconds, beside, value, bar):
        self.rows.append([what, seconds, beside, value, bar, self.command])

    def share(self, what, seconds, beside, whole, bar):
        "`seconds` of the `whole` time of `beside`."
        self._put(what, seconds, beside, seconds/whole, bar)

    def seconds(self, what, seconds, bar):
        self._put(what, seconds, '', seconds, bar)


@pytest.fixture
def costs(request):
    "Keeps what this test measured for the report."
    measured = Costs(f'pytest {request.node.nodeid} -m slow --reliability')
    yield measured
    request.node.user_properties.append(('costs', measured.rows))
    assert measured.rows, 'nothing was measured'


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
            _counted[report.nodeid] = dict(tries=tries, lost=lost)
        for rows in (value for name, value in report.user_properties if name == 'costs'):
            _counted[report.nodeid] = dict(tries=[], lost=[], costs=rows)


def pytest_sessionfinish(session):
    in_worker = hasattr(session.config, 'workerinput')
    if session.config.getoption('--reliability') and _counted and not in_worker:
        record = REPORT.with_suffix('.json')
        counted = (read_json(record) if record.exists() else {}) | _counted
        write_json(record, counted)
        REPORT.write_text(rendered(counted))


def _row(name, outcomes):
    tries = sum(outcomes.values())
    shown = (tries, tries - outcomes['lost'], outcomes['refused'], outcomes['lost'])
    return [*name, *(f'{n:,}' for n in shown)]


def _costs(counted) -> str: # markdown
    "What safety costs, and the bar; empty where nothing was measured."
    rows = [row for c in counted.values() for row in c.get('costs', ())]
    if not rows:
        return ''
    def shown(what, seconds, beside, value, bar, command):
        share = f'{value:.2%} of {beside}' if beside else ''
        limit = (f'{bar:.0%}' if beside else f'{bar:g} s') + (' ✓' if value <= bar else ' **✗**')
        return [what, f'{1000*seconds:,.1f} ms', share, limit, f'`{command}`']
    head = ['what', 'takes', 'share', 'bar, at most', 'measured by']
    table = Table(head, [shown(*row) for row in rows], right=(1, 3)).markdown()
    return f'\n\n## Costs\n\nOne processor core; the least of three where a process is repeated.\n\n{table}'


def rendered(counted) -> str: # markdown; name of a test -> dict(tries, lost, costs)
    "The table: a line for each thing and fault, and one for all."
    by_fault, whole = {}, Counter()
    for what, fault, outcome, n in sorted(tuple(row) for c in counted.values() for row in c['tries']):
        by_fault.setdefault((what, fault), Counter())[outcome] += n
        whole[outcome] += n
    rows = [_row(name, outcomes) for name, outcomes in by_fault.items()]
    head = ['what', 'fault', 'tries', 'survived', 'of these refused', 'lost']
    table = Table(head, [_row(('**all**', ''), whole), *rows], right=(2, 3, 4, 5)).markdown()
    claim = 'Faults injected on purpose, and what came of them. Written by `make reliability`.'
    survived = ('*Survived*: the result is what it would have been without the fault, or, where nothing can '
                'be done, one line says what is wrong and nothing else has changed (*refused*).')
    lost = '\n'.join(f'- {text}' for c in counted.values() for text in c['lost'])
    said = f'\n\n## Lost\n\n{lost}' if lost else ''
    tests = sum(bool(c['tries']) for c in counted.values())
    told = f'{survived} Counted by {tests} tests.{_costs(counted)}'
    return f'# Reliability\n\n> {claim}\n\n{told}\n\n## Tries\n\n{table}{said}\n'
