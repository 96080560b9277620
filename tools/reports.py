"""Run every system for every seed and publish. A finished run of the same parameters and code is kept, an
unfinished one resumed."""
import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from puzzle_research.core.publish import publish  # noqa: E402
from puzzle_research.core.runs import Run, notebook_hash, runs_folder  # noqa: E402


def unchanged(modules:dict) -> bool: # name -> hash
    "Do the package's modules still have the hashes that a run recorded?"
    for name, recorded in modules.items():
        path = ROOT.joinpath(*name.split('.')).with_suffix('.py')
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest()[:16] != recorded:
            return False
    return True


def runs_of(notebook:Path, budget:str, seed:int) -> list:
    "Runs of this notebook's code at its defaults, newest first."
    want = dict(budget=budget, seed=seed)

    def same(run):
        manifest = run.manifest
        asked = {k: run.config[k] for k in want} == want and set(manifest['changed']) <= set(want)
        code = manifest['code']
        return asked and code['notebook'] == notebook_hash(notebook) and unchanged(code['modules'])
    paths = sorted(runs_folder().glob(f'{notebook.stem}/*/manifest.json'), reverse=True)
    return [run for run in (Run(p.parent) for p in paths) if same(run)]


def regenerate(notebook:Path, budget:str, seed:int) -> Run:
    "A finished run: the one that is there, else one made now."
    have = runs_of(notebook, budget, seed)
    finished = [r for r in have if r.finished]
    if finished:
        return finished[0]
    command = [str(Path(sys.executable).parent/'puzzle'), 'run', str(notebook)]
    if have and have[0].status in ('died', 'interrupted'):
        command += ['--resume', have[0].id]
    else:
        command += ['-p', 'budget', budget, '-p', 'seed', str(seed)]
    subprocess.run(command, check=True)
    return next(r for r in runs_of(notebook, budget, seed) if r.finished)


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
