"""Run every system for every seed and publish. A finished run of the same parameters and code is kept, an
unfinished one resumed."""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from puzzle_research.core.publish import publish  # noqa: E402
from puzzle_research.core.runs import Run  # noqa: E402
from puzzle_research.core.same import Known  # noqa: E402


def regenerate(notebook:Path, budget:str, seed:int) -> Run:
    "A finished run: the one that is there, else one made now."
    want, system = dict(budget=budget, seed=seed), notebook.stem
    have = Known(system).of(want)
    finished = [r for r in have if r.finished]
    if finished:
        return finished[0]
    command = [str(Path(sys.executable).parent/'puzzle'), 'run', str(notebook)]
    if have and have[0].status in ('died', 'interrupted'):
        command += ['--resume', have[0].id]
    else:
        command += ['-p', 'budget', budget, '-p', 'seed', str(seed)]
    subprocess.run(command, check=True)
    return next(r for r in Known(system).of(want) if r.finished)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--budget', default='full')
    ap.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    ap.add_argument('--systems', nargs='*', help='stems of notebooks; default all')
    a = ap.parse_args()
    for notebook in sorted((ROOT/'nbs').glob('[0-9]*_*.ipynb')):
        if not a.systems or notebook.stem in a.systems:
            print(publish([regenerate(notebook, a.budget, seed).dir for seed in a.seeds]))


if __name__ == '__main__':
    main()
