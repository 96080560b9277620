"""All that a commit needs: export the notebooks, refresh outputs of those whose code changed, clean them, render the README.

`--check` changes nothing and says what is out of step; `--no-run` leaves stale outputs as they are."""
import argparse, base64, hashlib, io, json, os, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
from execnb.nbio import read_nb, write_nb
from nbdev.clean import _nbdev_clean
from nbdev.doclinks import nbglob
from nbdev.export import nb_export

from puzzle_research.core.runs import notebook_hash

KERNEL = dict(display_name='python3', language='python', name='python3')


def notebooks(): return sorted(Path(p) for p in nbglob(as_path=True))
def is_system(p): return p.parent.name == 'nbs' and p.stem[0].isdigit()


def cleaned(path):
    "The notebook's text with nothing in it that a diff should not show."
    nb = read_nb(path)
    _nbdev_clean(nb)
    nb.metadata['kernelspec'] = dict(KERNEL)
    with tempfile.TemporaryDirectory() as d:
        write_nb(nb, Path(d)/'nb.ipynb')
        return (Path(d)/'nb.ipynb').read_text()


def export(paths, to):
    for p in paths: nb_export(p, to)


def readme():
    "README.md from the index notebook: its code cells are left out, their outputs stay, its links start from here."
    import nbformat
    from nbconvert import MarkdownExporter
    ex = MarkdownExporter(exclude_input=True, exclude_output_prompt=True, exclude_input_prompt=True)
    body, _ = ex.from_notebook_node(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    lines = [l.rstrip() for l in body.replace('](../', '](').strip().splitlines()]
    text = '\n'.join(l for i, l in enumerate(lines) if l or i and lines[i-1])
    return '<!-- rendered from nbs/index.ipynb by tools/prepare.py; edit that -->\n\n' + text + '\n'


def state(path):
    "Hash of what a notebook's outputs come from: its code, and for the index the published summaries that it shows."
    shown = sorted((ROOT/'reports'/'summaries').glob('*.json')) if path.name == 'index.ipynb' else []
    return hashlib.sha256(notebook_hash(path).encode() + b''.join(p.read_bytes() for p in shown)).hexdigest()[:16] if shown else notebook_hash(path)


def stale(path): return json.loads(path.read_text())['metadata'].get('executed') != state(path)


def small_png(text):
    "A base64 PNG with a palette of 256 colours, where that is shorter."
    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(text))).convert('RGB').quantize(256).save(out, 'PNG', optimize=True)
    return min(text, base64.b64encode(out.getvalue()).decode(), key=len)


def shrink(nb):
    "Figures of a notebook as small PNGs."
    for c in nb.cells:
        for o in c.get('outputs', []):
            if 'image/png' in o.get('data', {}): o['data']['image/png'] = small_png(o['data']['image/png'])
    return nb


def execute(path):
    "Run a notebook in place, as JupyterLab would, and mark it with the hash of the code that ran."
    import nbformat
    from nbclient import NotebookClient
    print(f'running {path.relative_to(ROOT)}', flush=True)
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=1800, kernel_name='python3', extra_arguments=['--IPKernelApp.log_level=ERROR'], resources=dict(metadata=dict(path=str(path.parent)))).execute()
    nb.metadata['executed'] = state(path)
    nbformat.write(shrink(nb), path)


def exports_to(path):
    "Modules that a notebook exports."
    cells = json.loads(path.read_text())['cells']
    return [l.split()[-1] for c in cells for l in ''.join(c['source']).splitlines() if l.startswith('#| default_exp')]


def modules(): return {f: f.read_text() for f in (ROOT/'puzzle_research').rglob('*.py') if f.name not in ('_modidx.py', '__init__.py', 'cli.py')}


def out_of_step(paths):
    "Modules that an export would change, or that no notebook exports. nbdev resolves imports by the package's own folder, so it exports there; all is put back."
    before = modules()
    try:
        export(paths, ROOT/'puzzle_research')
        after = modules()
    finally:
        for f in modules().keys() - before.keys(): f.unlink()
        for f, text in before.items():
            if f.read_text() != text: f.write_text(text)
    exported = {name for p in paths for name in exports_to(p)}
    for f in sorted(after):
        name = '.'.join(f.relative_to(ROOT/'puzzle_research').with_suffix('').parts)
        if name not in exported: yield f'{f.relative_to(ROOT)}: no notebook exports it'
        elif before.get(f) != after[f]: yield f'{f.relative_to(ROOT)}: differs from what the notebooks export'


def findings(paths):
    "What is out of step, each with the file it is about."
    for p in paths:
        name = p.relative_to(ROOT)
        if cleaned(p) != p.read_text(): yield f'{name}: not clean'
        if stale(p): yield f'{name}: outputs are older than its code or what it shows'
        if is_system(p) and not any('parameters' in c['metadata'].get('tags', []) for c in json.loads(p.read_text())['cells']):
            yield f'{name}: no cell is tagged `parameters`'
    yield from out_of_step(paths)
    if (ROOT/'README.md').read_text() != readme(): yield 'README.md: differs from nbs/index.ipynb'


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--check', action='store_true')
    ap.add_argument('--no-run', action='store_true')
    a = ap.parse_args()
    paths = notebooks()
    if a.check:
        bad = list(findings(paths))
        if bad: sys.exit('\n'.join(bad) + '\nmend with: make prepare')
        return print(f'{len(paths)} notebooks clean, exported and in step with the README')
    export(paths, ROOT/'puzzle_research')
    for p in paths:
        if stale(p) and not a.no_run: execute(p)
        p.write_text(cleaned(p))
    (ROOT/'README.md').write_text(readme())
    print(f'{len(paths)} notebooks prepared')


if __name__ == '__main__': main()
