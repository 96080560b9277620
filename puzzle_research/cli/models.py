"Trained models at work: `puzzle words` draws an ARC task with the words of its objects."
from pathlib import Path
from typing import Annotated, Optional

from .app import Usage, app, argument, option
from .files import FORCE, must_exist


def _chosen(tasks, name, file): # the task called so, or the only one
    from puzzle_research.core.params import nearest
    ids = [task.id for task in tasks]
    if name and name not in ids:
        raise Usage(nearest(name, ids, 'task'))
    if not name and len(tasks) > 1:
        raise Usage(f"{file} holds {len(tasks)} tasks; choose one with --task, such as {', '.join(ids[:3])}")
    return tasks[ids.index(name) if name else 0]


@app.command()
def words(
    file:Annotated[Path, argument('ARC tasks in JSON.')],
    out:Annotated[Optional[Path], option('-o', '--out', metavar='FILE',
                                         help='Picture to write; default FILE.words.png.')] = None,
    task:Annotated[str, option(metavar='ID', help='Which one, of a file with several.')] = '',
    model:Annotated[Optional[str], option(metavar='NAME', help='A run of 04_jepa_vq, a folder that '
                                          'save_pretrained wrote, owner/name on the hub; default the weights '
                                          'of the package.')] = None,
    force:Annotated[bool, FORCE] = False,
):
    """Draw an ARC task, each object of its grids with the word that a JEPA has for it.

    Example: puzzle words task.json --model 20260301
    """
    must_exist(file)
    from puzzle_research.arc.files import read_tasks
    chosen = _chosen(read_tasks(file), task, file)
    from puzzle_research.core.outputs import whole_output
    from puzzle_research.jepa.use import JEPA, draw_task_words
    jepa = JEPA.from_pretrained(model)
    out = out or file.with_name(f'{file.name.removesuffix(".json")}.words.png')
    with whole_output(out, file, force, '.png') as aside:
        draw_task_words(jepa, chosen).savefig(aside, dpi=150)
    print(out)
