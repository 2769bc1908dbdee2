from gpt2.console import command
from gpt2.generate.sample import main

command(main)
