"One process of `puzzle run --launch N`, as accelerate starts it."
import sys

from puzzle_research.core.launch import main

if __name__ == '__main__':
    main(sys.argv[1])
