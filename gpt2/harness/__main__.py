import sys
from pathlib import Path

from gpt2.console import command
from gpt2.harness import lm_eval, stage
from gpt2.stage.directory import main

if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
    main(stage.work)
else:
    command(lambda: lm_eval.main(sys.argv[1:]))
