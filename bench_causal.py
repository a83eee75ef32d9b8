"""Time and memory of causal flash attention beside normal attention and PyTorch's own. Options as for bench.py.

python bench_causal.py --type all
"""

import sys

from bench import main

if __name__ == "__main__":
    sys.exit(main(causal=True))
