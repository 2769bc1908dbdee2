"""On PYTHONPATH, Python runs this first: stages are those of fake_stages.py, whichever process starts them."""

from gpt2.stage.table import STAGES

for _name in STAGES:
    STAGES[_name] = STAGES[_name].model_copy(update={"module": "fake_stages"})

import tasks.registry  # noqa: E402  there is no model that could be registered

tasks.registry.register = lambda *arguments, **options: "1"
