"The `puzzle` command, a module a task. Heavy imports stay inside the commands, so that help answers at once."
from . import running, sweeps, runs, bench, data, codecs, files, models     # in the order of `puzzle --help`
from .app import main
