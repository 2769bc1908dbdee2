from gpt2.console import command
from gpt2.export.hf import main

command(main)
