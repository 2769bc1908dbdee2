from gpt2.stage.directory import main
from gpt2.tokenize.stage import tokenize

main(tokenize)
