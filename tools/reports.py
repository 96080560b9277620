"""Run every system for every seed and publish. A finished run of the same parameters and code is kept, an unfinished one resumed."""
import argparse, hashlib, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from puzzle_research.core.publish import publish
from puzzle_research.core.runs import Run, notebook_hash, runs_folder


def unchanged(modules):
    "Do the package's modules still have the hashes that a run recorded?"
    path = lambda name: ROOT.joinpath(*name.split('.')).with_suffix('.py')
    return all(hashlib.sha256(path(k).read_bytes()).hexdigest()[:16] == v for k, v in modules.items() if path(k).exists())


def runs_of(nb, budget, seed):
    "Runs of this notebook's code at its defaults, newest first."
    runs = [Run(p.parent) for p in sorted(runs_folder().glob(f'{nb.stem}/*/manifest.json'), reverse=True)]
    want = dict(budget=budget, seed=seed)
    return [r for r in runs if {k: r.config[k] for k in want} == want and set(r.manifest['changed']) <= set(want)
            and r.manifest['code']['notebook'] == notebook_hash(nb) and unchanged(r.manifest['code']['modules'])]


def regenerate(nb, budget, seed):
    have = runs_of(nb, budget, seed)
    if any(r.finished for r in have): return next(r for r in have if r.finished)
    cmd = [str(Path(sys.executable).parent/'puzzle'), 'run', str(nb), '-p', 'budget', budget, '-p', 'seed', str(seed)]
    if have and have[0].status in ('died', 'interrupted'): cmd = cmd[:3] + ['--resume', have[0].id]
    subprocess.run(cmd, check=True)
    return next(r for r in runs_of(nb, budget, seed) if r.finished)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--budget', default='full')
    ap.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    ap.add_argument('--systems', nargs='*', help='stems of notebooks; default all')
    a = ap.parse_args()
    for nb in sorted((ROOT/'nbs').glob('[0-9]*_*.ipynb')):
        if not a.systems or nb.stem in a.systems: print(publish([regenerate(nb, a.budget, s).dir for s in a.seeds]))


if __name__ == '__main__': main()
