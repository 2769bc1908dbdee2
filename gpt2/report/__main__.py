from gpt2.report.stage import report
from gpt2.stage.directory import main

main(report)
