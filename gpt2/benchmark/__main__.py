from gpt2.benchmark.stage import work
from gpt2.stage.directory import main

main(work)
