"""Write requirements.txt: the exact versions of what pyproject.toml installs here, and of nothing else.

Run it where the tests pass: `make lock`. The file is a constraint (`pip install -c`), so a line for another
platform, or for an extra that nobody asks for, installs nothing."""
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
HEAD = '# The exact versions that were tested. Written by tools/lock.py (`make lock`) from pyproject.toml.\n'
EXTRAS = ('dev', 'docs', 'browser')
INSTALLERS = ('pip', 'setuptools', 'wheel')   # come with the environment


def name_of(text:str) -> str:
    "A package's name as an index compares it."
    return re.sub(r'[-_.]+', '-', text).lower()


def wanted(extras=EXTRAS) -> list: # of Requirement
    "What pyproject.toml asks for by name."
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    optional = project['optional-dependencies']
    return [Requirement(r) for r in [*project['dependencies'], *(r for e in extras for r in optional[e])]]


def applies(requirement:Requirement, extras) -> bool:
    "Is a dependency of a package needed on this machine, for these extras of the package?"
    marker = requirement.marker
    return marker is None or any(marker.evaluate({'extra': e}) for e in ('', *extras))


def closure(requirements:list) -> dict: # name -> (name as written, version)
    "Everything that these requirements install. A package that is not installed here is left out."
    found, seen, queue = {}, set(), [(r.name, tuple(sorted(r.extras))) for r in requirements]
    while queue:
        name, extras = queue.pop()
        if (name_of(name), extras) in seen:
            continue
        seen.add((name_of(name), extras))
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        found[name_of(name)] = (dist.metadata['Name'], dist.version)
        needs = [Requirement(r) for r in dist.requires or []]
        queue += [(r.name, tuple(sorted(r.extras))) for r in needs if applies(r, extras)]
    return {name: pin for name, pin in found.items() if name not in INSTALLERS}


def pinned() -> dict: # name -> version
    "What requirements.txt pins."
    lines = [line.split('#')[0].strip() for line in (ROOT/'requirements.txt').read_text().splitlines()]
    return {name_of(name): version for name, version in (line.split('==') for line in lines if line)}


def main():
    asked = wanted()
    found = closure(asked)
    missing = [r.name for r in asked if name_of(r.name) not in found]
    if missing:
        sys.exit(f"not installed here: {', '.join(missing)}; install `.[{','.join(EXTRAS)}]` first")
    lines = [f'{name}=={version}\n' for _, (name, version) in sorted(found.items())]
    (ROOT/'requirements.txt').write_text(HEAD + ''.join(lines))
    print(f'requirements.txt: {len(lines)} packages')


if __name__ == '__main__':
    main()
