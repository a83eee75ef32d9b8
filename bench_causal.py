"""Time and memory of causal flash attention beside normal attention and PyTorch's own. Options as for bench.py.

python bench_causal.py --type all
"""

from functools import partial

from bench import main
from flash_attention.command_line import run

if __name__ == "__main__":
    run(partial(main, causal=True))
