"`python -m puzzle_research.cli`"
from . import main

main()
