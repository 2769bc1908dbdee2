"""The table of stages: what each is called, its version, and how it is started."""

from __future__ import annotations

from gpt2.config.section import Section


class Stage(Section):
    name: str
    version: int
    """Bump with the bytes: an edit that changes what the stage writes must change its addresses. Tests of golden
    values fail where it is forgotten: of the shards, of every benchmark's reader and prompt, of training's data order,
    losses and weights, of evaluation's scores, and of the report."""
    module: str
    """started as `python -m <module> <directory>`"""
    parallel: bool
    """whether it is started through torchrun, one process a GPU"""
    reproducible: bool = True
    """whether its address decides its bytes, on any machine; a training's weights also depend on GPUs and precision"""

    checks_itself: bool = False
    """whether it verifies its files before it goes on from them, so that a damaged one need not be removed first"""

    def command(self, directory: str) -> list[str]:
        return ["-m", self.module, directory]


STAGES = {
    stage.name: stage
    for stage in (
        Stage(name="download", version=1, module="gpt2.download", parallel=False),
        Stage(name="tokenize", version=1, module="gpt2.tokenize", parallel=False),
        Stage(name="benchmark", version=1, module="gpt2.benchmark", parallel=False),
        Stage(name="train", version=1, module="gpt2.train", parallel=True, reproducible=False, checks_itself=True),
        Stage(name="evaluate", version=1, module="gpt2.evaluate", parallel=True, reproducible=False),
        Stage(name="pretrained", version=1, module="gpt2.pretrained", parallel=False),
        Stage(name="harness", version=1, module="gpt2.harness", parallel=False, reproducible=False),
        Stage(name="report", version=3, module="gpt2.report", parallel=False, reproducible=False),
    )
}
