"""Write requirements.txt: the exact versions of what pyproject.toml installs here, and of nothing else.

Run it in an environment where the tests pass: `make lock`. The file is a constraint (`pip install -c`), so that
a line for another platform, or for an extra that is not asked for, installs nothing."""
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
HEAD = '# The exact versions that were tested. Written by tools/lock.py (`make lock`) from pyproject.toml.\n'
EXTRAS = ('dev', 'docs')


def name_of(text):
    "A package's name as the index compares it."
    return re.sub(r'[-_.]+', '-', text).lower()


def wanted(path=ROOT/'pyproject.toml', extras=EXTRAS):
    "What pyproject asks for by name."
    project = tomllib.loads(path.read_text())['project']
    asked = [*project['dependencies'], *(r for e in extras for r in project['optional-dependencies'].get(e, []))]
    return [Requirement(r) for r in asked]


def applies(requirement, extras):
    "Is a dependency of a package needed on this machine, for these extras of the package?"
    if not requirement.marker: return True
    return any(requirement.marker.evaluate({'extra': e}) for e in ('', *extras))


def closure(requirements):
    "Everything that these requirements install: name -> (name as it is written, version); not installed: left out."
    found, seen, queue = {}, set(), [(r.name, tuple(sorted(r.extras))) for r in requirements]
    while queue:
        name, extras = queue.pop()
        if (name_of(name), extras) in seen: continue
        seen.add((name_of(name), extras))
        try: dist = distribution(name)
        except PackageNotFoundError: continue
        found[name_of(name)] = (dist.metadata['Name'], dist.version)
        needs = [Requirement(r) for r in dist.requires or []]
        queue += [(r.name, tuple(sorted(r.extras))) for r in needs if applies(r, extras)]
    return found


def pinned(path=ROOT/'requirements.txt'):
    "What requirements.txt pins: name -> version."
    lines = [line.split('#')[0].strip() for line in path.read_text().splitlines()]
    pairs = [line.split('==') for line in lines if line]
    return {name_of(name): version for name, version in pairs}


def main():
    asked = wanted()
    found = closure(asked)
    missing = [r.name for r in asked if name_of(r.name) not in found]
    if missing: sys.exit(f"not installed here: {', '.join(missing)}; install with `.[{','.join(EXTRAS)}]` first")
    lines = [f'{name}=={version}\n' for _, (name, version) in sorted(found.items())]
    (ROOT/'requirements.txt').write_text(HEAD + ''.join(lines))
    print(f'requirements.txt: {len(lines)} packages')


if __name__ == '__main__':
    main()
