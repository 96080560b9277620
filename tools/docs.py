"""Build the documentation from what is here: notebooks as they were run, reports, guides, the contract.

Everything keeps its place in a copy of the tree below build/, so that links are the same on a code host and
on the site. Nothing is fetched. Then every link and picture of every page is looked up; a dead one fails."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT/'build'
TEXTS = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff', 'LICENSE', 'AGENTS.md']
FOLDERS = ['nbs', 'reports', 'figures', 'docs']
PARTS = {
    'codec': 'What the codecs share', 'vision': 'Pictures', 'audio': 'Sounds', 'text': 'Texts', 'arc': 'ARC',
    'jepa': 'JEPA', 'modalities': 'Three modalities',
    'ternary': 'Ternary operations', 'lm': 'Language model', 'core': 'Core',
}


def title(path:Path) -> str:
    "The first heading of a notebook or a text."
    text = path.read_text()
    if path.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    heading = re.search(r'^# (.+)$', text, re.M)
    return heading[1].strip() if heading else path.stem


def pages(folder:str, pattern:str) -> list: # one-entry dicts, as mkdocs wants them
    paths = sorted((ROOT/folder).glob(pattern))
    return [{title(p): p.relative_to(ROOT).as_posix()} for p in paths if p.name != 'index.md']


def contents() -> list:
    "The table of contents, from the tree."
    folders = sorted(p.name for p in (ROOT/'nbs').iterdir() if p.is_dir() and p.name != 'guides')
    named = PARTS | {folder: folder.capitalize() for folder in folders if folder not in PARTS}
    parts = {name: pages(f'nbs/{folder}', '[0-9]*.ipynb') for folder, name in named.items()}
    guides = [{'The contract': 'docs/contract.md'}, {'Contributing': 'CONTRIBUTING.md'}]
    return [
        {'Home': 'README.md'},
        {'Guides': [*pages('nbs/guides', '*.ipynb'), *guides]},
        {'Systems': pages('nbs', '[0-9]*.ipynb')},
        {'Reports': [{'All systems': 'reports/index.md'}, *pages('reports', '*.md')]},
        {'Parts': [{name: some} for name, some in parts.items() if some]},
        {'Data': 'data/README.md'},
        {'Changelog': 'CHANGELOG.md'},
    ]


def lay_out(docs:Path):
    "A copy of what the site shows, and of what its pages link to."
    shutil.rmtree(docs, ignore_errors=True)
    aside = shutil.ignore_patterns('runs', '.*', '__pycache__')
    for name in FOLDERS:
        shutil.copytree(ROOT/name, docs/name, ignore=aside)
    (docs/'data').mkdir()
    for name in [*TEXTS, 'data/README.md']:
        shutil.copy(ROOT/name, docs/name)
    (docs/'nbs'/'index.ipynb').unlink()   # the README is rendered from it
    for path in (docs/'nbs').rglob('*.ipynb'):
        path.write_text(with_formulas(path.read_text()))


MATH = re.compile(r'(```.*?```|`[^`]*`)|(\$\$?)([^$]+?)\2', re.S)

def with_formulas(notebook:str) -> str: # both as JSON
    "TeX in text cells as MathML, which browsers show without a script."
    from latex2mathml.converter import convert

    def formula(m):
        return m[0] if m[1] else convert(m[3], display='block' if m[2] == '$$' else 'inline')
    nb = json.loads(notebook)
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = MATH.sub(formula, ''.join(cell['source']))
    return json.dumps(nb)


def build(build:Path=BUILD) -> Path: # of the site
    "Lay out, write the configuration with the table of contents, and let mkdocs build it."
    import yaml
    lay_out(build/'docs')
    settings = yaml.safe_load((ROOT/'mkdocs.yml').read_text()) | dict(nav=contents())
    (build/'mkdocs.yml').write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '-f', str(build/'mkdocs.yml')]
    quiet = os.environ | dict(NO_MKDOCS_2_WARNING='1')
    subprocess.run(command, check=True, env=quiet, cwd=build)   # mkdocs-jupyter leaves a cache where it runs
    (build/'site'/'404.html').unlink()   # its links fit one address only
    for page in (build/'site').rglob('*.html'):
        page.write_text(with_own_ids(to_pages(page.read_text())))
    return build/'site'


def to_pages(html:str) -> str:
    "Links within notebooks, which mkdocs leaves as they are, point to pages."
    def page(m):
        path = m[2].replace('README.md', 'index.html')
        return m[1] + re.sub(r'\.(ipynb|md)$', '.html', path) + m[3]
    return re.sub(r'(href=")(?![a-z]+:)([^"#]+\.(?:ipynb|md))([#"])', page, html)


def with_own_ids(html:str) -> str:
    "Headings of one page that share a name are numbered, as the table of contents expects it."
    seen = Counter()

    def own(m):
        n = seen[m[2]]
        seen[m[2]] += 1
        return f'{m[1]}{m[2]}_{n}"' if n else m[0]
    return re.sub(r'(<h[1-6][^>]* id=")([^"]+)"', own, html)


class Links(HTMLParser):
    "What a page links to, and the names that can be linked to."
    def __init__(self, text):
        super().__init__()
        self.targets, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.targets += [(tag, attrs[k]) for k in ('href', 'src') if attrs.get(k)]


LOADED = ('script', 'link', 'img', 'iframe')   # what a browser fetches to show a page

def dead_links(site:Path) -> list:
    "Links to what is not there, and whatever a page would load from another host."
    pages = {p: Links(p.read_text()) for p in site.rglob('*.html')}
    out = []
    for page, links in pages.items():
        for tag, target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or target.startswith('//'):
                if tag in LOADED and parts.scheme != 'data':
                    out.append(f'{page.relative_to(site)} loads {target}')
            elif not there(page, parts, pages):
                out.append(f'{page.relative_to(site)} links to {target}')
    return sorted(set(out))


def there(page:Path, parts, pages:dict) -> bool:
    "Is the target of a link a file of the site, with the name after the `#`?"
    path = (page.parent/unquote(parts.path)).resolve() if parts.path else page
    path = path/'index.html' if path.is_dir() else path
    if not path.exists():
        return False
    return not parts.fragment or path not in pages or unquote(parts.fragment) in pages[path].names


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--to', type=Path, default=BUILD, help='folder to build in')
    site = build(ap.parse_args().to.resolve())
    dead = dead_links(site)
    if dead:
        sys.exit('\n'.join(dead[:40]) + f'\n{len(dead)} dead links')
    n = len(list(site.rglob('*.html')))
    print(f'{n} pages, no dead link. To read them: python -m http.server -d {site}')


if __name__ == '__main__':
    main()
