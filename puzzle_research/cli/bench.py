"The bench itself: `puzzle new` adds to it, `puzzle doctor` says what it stands on."
import os
from typing import Annotated

from puzzle_research.core.params import root

from .app import app, argument


@app.command()
def new(
    kind:Annotated[str, argument('system or codec.')],
    name:Annotated[str, argument('Of its module, such as word_puzzle.')],
):
    "Write a small working notebook to begin with: `puzzle new system NAME`, `puzzle new codec NAME`."
    from puzzle_research.core.scaffold import new_notebook
    path = new_notebook(kind, name)
    shown = os.path.relpath(path)
    print(f'{shown}\ntrain  puzzle run {path.stem}\ntest   nbdev_test --path {shown}')


@app.command()
def doctor():
    "What this bench stands on: versions, device, threads, disk, data found."
    import shutil, torch
    from puzzle_research.core.data import SOURCES, find
    from puzzle_research.core.device import pick_device
    from puzzle_research.core.provenance import git_state, versions
    git = git_state()
    have = [name for name, s in SOURCES.items() if any(find(name, split) for split in s.splits)]
    lines = {name: version or 'MISSING' for name, version in versions().items()} | {
        'commit': f"{git['commit']}{' (dirty)' if git['dirty'] else ''}",
        'device': f'{pick_device()}   threads {torch.get_num_threads()} of {os.cpu_count()} cores',
        'disk free': f'{shutil.disk_usage(root()).free/2**30:.1f} GiB',
        'data': ', '.join(have) or 'none found; set PUZZLE_DATA or run `puzzle data fetch NAME`',
    }
    for name, text in lines.items():
        print(f'{name:18} {text}')
