"""All that a commit needs: export the notebooks, run those that changed, clean, render what is published.

`--check` changes nothing and says what is out of step; `--no-run` leaves stale outputs as they are."""
import argparse
import base64
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
from execnb.nbio import read_nb, write_nb  # noqa: E402
from nbdev.clean import _nbdev_clean  # noqa: E402
from nbdev.doclinks import nbglob  # noqa: E402
from nbdev.export import nb_export  # noqa: E402

from puzzle_research.core.runs import notebook_hash  # noqa: E402

KERNEL = dict(display_name='python3', language='python', name='python3')
LANGUAGE = dict(
    codemirror_mode=dict(name='ipython', version=3), file_extension='.py', mimetype='text/x-python',
    name='python', nbconvert_exporter='python', pygments_lexer='ipython3')


def notebooks() -> list:
    return sorted(Path(p) for p in nbglob(as_path=True))


def is_experiment(path:Path) -> bool:
    return path.parent.name == 'nbs' and path.stem[0].isdigit()


def number_cells(nb):
    "Execution counts 1, 2, ... in the order of the cells, so that a code host shows the notebook as run."
    run = 'executed' in nb.metadata
    code = [c for c in nb.cells if c.cell_type == 'code']
    said = [c for c in code if c.source.strip()]
    counts = {id(c): i for i, c in enumerate(said, 1)} if run else {}
    for cell in code:
        cell.execution_count = counts.get(id(cell))
        for output in cell.outputs:
            if output['output_type'] == 'execute_result':
                output['execution_count'] = cell.execution_count


def cleaned(path:Path) -> str:
    "The notebook's text with nothing in it that a diff should not show."
    nb = read_nb(path)
    was_run = 'language_info' in nb.metadata or not stale(path)
    _nbdev_clean(nb)
    nb.metadata['kernelspec'] = dict(KERNEL)
    for name in ('jupytext', 'widgets'):    # an editor's, and the state of widgets, which is large
        nb.metadata.pop(name, None)
    if was_run:
        nb.metadata['language_info'] = LANGUAGE
        number_cells(nb)
    with tempfile.TemporaryDirectory() as d:
        write_nb(nb, Path(d)/'nb.ipynb')
        return (Path(d)/'nb.ipynb').read_text()


def export(paths, to:Path):
    "Modules that stay as they were keep their time: compiled functions are cached by it."
    before = {f: (f.read_bytes(), f.stat()) for f in to.rglob('*.py')}
    for p in paths:
        nb_export(p, to)
    for f, (data, was) in before.items():
        if f.read_bytes() == data:
            os.utime(f, ns=(was.st_atime_ns, was.st_mtime_ns))


def readme() -> str:
    "README.md from the index notebook: code cells are left out, outputs stay, links start from here."
    sys.modules.setdefault('rfc3987_syntax', None)  # compiles a grammar for two seconds; no notebook needs it
    import nbformat
    from nbconvert import MarkdownExporter
    exporter = MarkdownExporter(exclude_input=True)
    body, _ = exporter.from_notebook_node(nbformat.read(ROOT/'nbs'/'index.ipynb', 4))
    body = body.replace('](../', '](').replace('src="../', 'src="').replace('href="../', 'href="')
    lines = [line.rstrip() for line in body.strip().splitlines()]
    text = '\n'.join(line for i, line in enumerate(lines) if line or i and lines[i-1])
    return f'<!-- rendered from nbs/index.ipynb by tools/prepare.py; edit that -->\n\n{text}\n'


def state(path:Path) -> str:
    "Hash of what a notebook's outputs come from: its code, and for the index the published summaries."
    if path.name != 'index.ipynb':
        return notebook_hash(path)
    shown = b''.join(p.read_bytes() for p in sorted((ROOT/'reports'/'summaries').glob('*.json')))
    return hashlib.sha256(notebook_hash(path).encode() + shown).hexdigest()[:16]


def stale(path:Path) -> bool:
    return json.loads(path.read_text())['metadata'].get('executed') != state(path)


def small_png(text:str) -> str:
    "A base64 PNG with a palette of 256 colours, where that is shorter."
    from PIL import Image
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    picture.convert('RGB').quantize(256).save(out, 'PNG', optimize=True)
    return min(text, base64.b64encode(out.getvalue()).decode(), key=len)


def shrink(nb):
    "Figures of a notebook as small PNGs."
    outputs = [o for c in nb.cells for o in c.get('outputs', [])]
    for data in (o['data'] for o in outputs if 'image/png' in o.get('data', {})):
        data['image/png'] = small_png(data['image/png'])


def execute(path:Path):
    "Run a notebook in place, as JupyterLab would, and mark it with the hash of the code that ran."
    import nbformat
    from nbclient import NotebookClient
    print(f'running {path.relative_to(ROOT)}', flush=True)
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=1800, kernel_name='python3', extra_arguments=['--IPKernelApp.log_level=ERROR'],
                   resources=dict(metadata=dict(path=str(path.parent)))).execute()
    nb.metadata['executed'] = state(path)
    nb.metadata['language_info'] = LANGUAGE
    shrink(nb)
    nbformat.write(nb, path)


def exports_to(path:Path) -> list:
    "Modules that a notebook exports."
    sources = [''.join(c['source']).splitlines() for c in json.loads(path.read_text())['cells']]
    return [line.split()[-1] for lines in sources for line in lines if line.startswith('#| default_exp')]


def modules() -> dict: # path -> text
    "What the notebooks export; the command line is written by hand."
    package = ROOT/'puzzle_research'
    aside = {package/'_modidx.py', *package.rglob('__init__.py'), *(package/'cli').glob('*.py')}
    return {f: f.read_text() for f in package.rglob('*.py') if f not in aside}


def exported_afresh(paths) -> dict: # path -> text
    "The modules as an export makes them. nbdev exports into the package's own folder; all is put back."
    before = modules()
    try:
        export(paths, ROOT/'puzzle_research')
        return modules()
    finally:
        for f in modules().keys() - before.keys():
            f.unlink()
        for f, text in before.items():
            if f.read_text() != text:
                f.write_text(text)


def out_of_step(paths):
    "Modules that an export would change, or that no notebook exports."
    before, after = modules(), exported_afresh(paths)
    exported = {name for p in paths for name in exports_to(p)}
    for f in sorted(after):
        name = '.'.join(f.relative_to(ROOT/'puzzle_research').with_suffix('').parts)
        if name not in exported:
            yield f'{f.relative_to(ROOT)}: no notebook exports it'
        elif before.get(f) != after[f]:
            yield f'{f.relative_to(ROOT)}: differs from what the notebooks export'


def not_rendered():
    "Published texts that are not what their sources render to."
    from puzzle_research.bench.board import render_codecs
    from puzzle_research.core import publish
    docs = publish.documents(ROOT)
    texts = {ROOT/'reports'/f'{publish.stem_of(doc)}.md': publish.published_report(doc, docs) for doc in docs}
    texts |= {ROOT/'reports'/'index.md': publish.render_board(docs), ROOT/'README.md': readme()}
    texts[ROOT/'reports'/'codecs.md'] = render_codecs(ROOT)
    for path, text in texts.items():
        if not path.exists() or path.read_text() != text:
            yield f'{path.relative_to(ROOT)}: differs from what it is rendered from'


def findings(paths):
    "What is out of step, each with the file it is about."
    for p in paths:
        if cleaned(p) != p.read_text():
            yield f'{p.relative_to(ROOT)}: not clean'
        if stale(p):
            yield f'{p.relative_to(ROOT)}: outputs are older than its code or what it shows'
    yield from out_of_step(paths)
    yield from not_rendered()


def prepare(paths, run:bool=True):
    export(paths, ROOT/'puzzle_research')
    from puzzle_research.bench.board import render_codecs       # as just exported
    from puzzle_research.core.publish import render_published
    for p in paths:
        if run and stale(p):
            execute(p)
        p.write_text(cleaned(p))
    render_published(ROOT)
    (ROOT/'reports'/'codecs.md').write_text(render_codecs(ROOT))
    (ROOT/'README.md').write_text(readme())


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--check', action='store_true')
    ap.add_argument('--no-run', action='store_true')
    a = ap.parse_args()
    paths = notebooks()
    if not a.check:
        prepare(paths, run=not a.no_run)
        return print(f'{len(paths)} notebooks prepared')
    bad = list(findings(paths))
    if bad:
        sys.exit('\n'.join(bad) + '\nmend with: make prepare')
    print(f'{len(paths)} notebooks clean, exported and in step with README and reports')


if __name__ == '__main__':
    main()
