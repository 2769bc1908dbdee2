from gpt2.pretrained.stage import work
from gpt2.stage.directory import main

main(work)
