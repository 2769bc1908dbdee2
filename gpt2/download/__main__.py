from gpt2.download.stage import work
from gpt2.stage.directory import main

main(work)
