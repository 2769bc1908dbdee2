import sys

from gpt2.evaluate.stage import main
from gpt2.stage.torchrun import exit_now

exit_now(main(sys.argv[1:]))
