import sys

from gpt2.stage.torchrun import exit_now, main
from gpt2.train.loop import work

if len(sys.argv) != 2:
    sys.exit("usage: python -m gpt2.train DIRECTORY")
exit_now(main(work, sys.argv[1]))
