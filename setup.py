"""The wheel carries notebooks, bundled data and published numbers, so that `puzzle run` works by itself."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithNotebooks(build_py):
    "Copies notebooks, bundled sets and summaries into the built package, as `puzzle_research/bench/`."
    def run(self):
        super().run()
        bundled = sorted(Path('data').glob('bundled_*'))
        for folder in (Path('nbs'), Path('reports', 'summaries'), *bundled):
            target = Path(self.build_lib, 'puzzle_research', 'bench', folder)
            hidden = shutil.ignore_patterns('.*', '__pycache__')
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=hidden)


setup(cmdclass=dict(build_py=WithNotebooks))
